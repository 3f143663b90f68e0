"""A convolutional GAN on CIFAR-10, without and with unrolling.

Section 3.4, Fig. 4 and Appendix D of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163). The claim: samples look alike
for every K, but are more diverse the more steps D is unrolled. `cifar10_diversity.py` measures that
on the checkpoints of this script.

    python examples/cifar10.py                             a quarter of the channels, K=0, 1, 5, 10
    python examples/cifar10.py --data-root FOLDER          on any folder of images
    python examples/cifar10.py --preset paper --seeds 5    Appendix D, for a GPU
    torchrun --nproc-per-node 2 examples/cifar10.py --preset paper --device cuda
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import cli, ranks, records, runs
from lab.data import image_folder
from lab.data.pixels import as_bytes
from lab.figures import cifar
from lab.metrics.samples import Sampler
from lab.networks import dcgan
from lab.updates import Losses, update
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unroll

SHOWN = 64  # samples of each look at the training
GAME = unroll.NonSaturating()
LOSSES = ("d_loss", "f_0", "f_K")


@dataclass(frozen=True)
class Config:
    """One run. The defaults are Appendix D; "ours" marks a choice where the paper is silent."""

    preset: str = "paper"
    data: str = ""
    images: int = 0
    unroll_steps: int = 10
    size: float = 1.0  # X: the channels of both networks, in parts of the paper's
    generator_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    beta1: float = 0.5  # ours; as in Appendix C
    noise_size: int = 256
    ema: float = 0.0  # decay of an average of G's parameters, which then makes the samples
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    checkpointed: bool = False
    ranks: int = 1
    evaluate_every: int = 2500
    device: str = "cpu"
    seed: int = 0
    pairs: int = 50_000  # of updates, D first (ours); 100,000 updates
    batch_size: int = 128  # ours

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        rates = {"generator_lr": "generator-lr", "discriminator_lr": "discriminator-lr"}
        cli.check(self, pairs="iterations", size="size", **rates)
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must be at least 0 and below 1, got {self.ema}")
        if self.batch_size % self.ranks or self.batch_size < 2 * self.ranks:
            raise ValueError(
                f"--batch-size must be at least 2 for each of {self.ranks} ranks and the same for "
                f"all of them, got {self.batch_size}"
            )

    def checkpoint(self, folder: Path) -> Path:
        """Return where the run is kept."""
        return folder / "checkpoints" / f"K{self.unroll_steps}-seed{self.seed}.pt"


PRESETS = {
    "small": Config("small", size=0.25, pairs=2000, batch_size=32, evaluate_every=100),
    "paper": Config("paper"),
}


def train(config: Config, line: int, *, folder: Path, resume: bool, root: Path | None) -> Config:
    """Train one GAN; what comes of it is in its checkpoint."""
    torch.set_num_threads(1)  # a process a core
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    device = ranks.join(config.device)
    rng = torch.Generator(device).manual_seed(config.seed)
    pixels = image_folder.load(root).pixels.to(device)
    g = dcgan.generator(config.size, rng, noise_size=config.noise_size).to(memory_format=layout)
    d = dcgan.discriminator(config.size, rng).to(memory_format=layout)
    decay = get_ema_multi_avg_fn(config.ema)
    averaged = AveragedModel(g, multi_avg_fn=decay, use_buffers=True).requires_grad_(False)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_lr, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_lr, betas)
    losses = Losses(LOSSES).to(device)
    parts: dict[str, Any] = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    parts |= {"losses": losses, "ema": averaged} if config.ema else {"losses": losses}

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=device)

    def real() -> Tensor:
        chosen = torch.randint(len(pixels), (config.batch_size,), generator=rng, device=device)
        return image_folder.batch(pixels, ranks.share(chosen)).to(memory_format=layout)

    held_out = noise(SHOWN)

    @torch.no_grad()
    def evaluate(pairs: int, _: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        network = averaged.module if config.ema else g
        samples = as_bytes(network.eval()(held_out)).cpu()
        network.train()
        return {"player_updates": 2 * pairs, **losses.row()}, samples.contiguous()

    path, run = config.checkpoint(folder), f"K={config.unroll_steps} seed {config.seed}"
    iterations = runs.iterate(
        path,
        asdict(config),
        parts,
        rng,
        evaluate,
        length=config.pairs,
        every=config.evaluate_every,
        resume=resume,
        bar={"desc": run, "position": line, "unit": "pair"},
        writes=ranks.first(),
    )

    generator, discriminator = ranks.wrapped(g), ranks.wrapped(d)
    unrolled = unroll.UnrolledGeneratorLoss(
        discriminator,
        d_optimizer,
        GAME,
        unroll_steps=config.unroll_steps,
        checkpoint=config.checkpointed,
        compile=config.compile,
    )
    standard = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, GAME, unroll_steps=0)
    # bfloat16 has the exponents of float32: its losses need no scaling.
    precision = partial(torch.autocast, torch.device(device).type, torch.bfloat16, config.amp)

    for pair in iterations:
        with torch.no_grad(), precision():
            fake = generator(ranks.share(noise()))
        with precision():
            d_loss = GAME.discriminator_loss(discriminator, fake, real())
        update(d_optimizer, d_loss, f"D at pair {pair} of {run}", path)

        with precision():
            fake, images = generator(ranks.share(noise())), real()
            f_k = unrolled(fake, images)
        with torch.no_grad(), precision():
            f_0 = standard(fake, images) if config.unroll_steps else f_k
        update(g_optimizer, f_k, f"G at pair {pair} of {run}", path)

        losses.add(d_loss, f_0, f_k)
        if config.ema:
            averaged.update_parameters(g)
    ranks.wait()  # for the last checkpoint
    return config


def trained(path: Path, device: str = "cpu") -> tuple[nn.Module, Config]:
    """Return the generator of a checkpoint, in evaluation mode, and how it was trained."""
    content = torch.load(path, map_location=device, weights_only=True)
    config = Config(**content["settings"])
    rng = torch.Generator(device)
    g: nn.Module = dcgan.generator(config.size, rng, noise_size=config.noise_size)
    if config.ema:
        average = AveragedModel(g)
        average.load_state_dict(content["parts"]["ema"])
        g = average.module
    else:
        g.load_state_dict(content["parts"]["g"])
    return g.eval().requires_grad_(False), config


@torch.no_grad()
def generated(g: nn.Module, noise: Tensor) -> Tensor:
    """Return samples on the CPU."""
    device = next(g.parameters()).device
    return torch.cat([g(z.to(device)).cpu() for z in noise.split(250)])


def sampler(path: Path, device: str = "cpu") -> Sampler:
    """Return what makes images as a checkpoint's generator does: for `evaluate.py`."""
    g, config = trained(path, device)

    def make(count: int, rng: torch.Generator) -> Tensor:
        noise = torch.randn(count, config.noise_size, generator=rng, device=rng.device)
        return as_bytes(generated(g, noise))

    return make


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of a finished run: its settings, its last losses, their provenance."""
    return [records.row("cifar10", config, log["history"][-1], log)]


def arguments() -> argparse.ArgumentParser:
    """Return the command line, explained in the paper's terms."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the experiment").add_argument
    cli.add_unroll_steps(add, 0, 1, 5, 10)
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help="paper: Appendix D, 100,000 updates of G and D. small (default): a quarter of the "
        "channels, batches of 32 for our 128, and 4,000 updates",
    )
    add(
        "--data-root",
        type=Path,
        metavar="FOLDER",
        help="images, in any folders below FOLDER (below FOLDER/train where there is one), or "
        "torchvision's copy of CIFAR-10 (default: that, in $UNROLL_DATA or data/, downloaded)",
    )
    add("--size", type=float, metavar="X", help="channels, in parts of Appendix D's")
    add("--generator-lr", type=float, metavar="ETA", help="Adam's learning rate for G")
    add("--discriminator-lr", type=float, metavar="ETA", help="and for D, real or unrolled steps")
    add("--batch-size", type=cli.positive, metavar="N", help="of all ranks together")
    cli.add_iterations(add, "of one D and one G update; the paper counts single ones")
    add("--evaluate-every", type=cli.positive, metavar="PAIRS", help="default: the preset's")
    add("--ema", type=float, metavar="DECAY", help="samples come from an average of G (default: 0)")
    add = parser.add_argument_group("speed").add_argument
    add("--amp", action="store_true", help="both networks run in bfloat16 where that is safe")
    add("--channels-last", action="store_true", help="the memory format that GPUs like")
    add("--compile", action="store_true", help="compile the look-ahead steps")
    add(
        "--checkpoint",
        dest="checkpointed",
        action="store_true",
        help="recompute the look-ahead steps in the backward pass: memory flat in K",
    )
    cli.add_run_flags(parser, "cifar10", figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the runs that the command line asks for."""
    data = image_folder.load(given.get("data_root"))
    facts = {"data": data.name, "images": len(data.pixels), "ranks": ranks.count()}
    base = replace(cli.chosen(given, PRESETS), **facts)
    first = given["seed"]
    return [
        replace(base, unroll_steps=k, seed=seed)
        for k in dict.fromkeys(given["steps"])
        for seed in range(first, first + given["seeds"])
    ]


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the table."""
    logs = [(config, runs.read_log(config.checkpoint(args.out))) for config in configs]
    series: list[dict[str, Any]] = []
    histories: dict[str, list[Any]] = {}
    for config, log in logs:
        run = {"unroll_steps": config.unroll_steps, "seed": config.seed}
        series += [run | row for row in log["history"]]
        histories.setdefault(f"K = {config.unroll_steps}", []).append(log["history"])
    records.write(args.out / "metrics.csv", series)
    columns = {name: name.replace("_loss", "'s loss") for name in LOSSES}
    print(f"\n{configs[0].pairs:,} pairs of updates on {configs[0].images:,} images.\n")
    print(records.table(histories, columns | {"seconds": "seconds"}))
    folder = args.figures or args.out
    first = {f"K = {c.unroll_steps}": log for c, log in logs if c.seed == args.seed}
    cifar.samples(folder, first)
    cifar.losses(folder, histories)
    print(f"\nTime series and checkpoints are in {args.out}/, figures in {folder}/")


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    ranks.join(args.device)
    args.workers = args.workers if ranks.count() == 1 else 1
    args.record = args.record if ranks.first() else None
    task = partial(train, root=args.data_root)
    configs = cli.carry_out(parser, args, build, task, record_rows, keep=True)
    if ranks.first():
        report(args, configs)
    ranks.leave()


if __name__ == "__main__":
    main()
