"""A convolutional GAN on CIFAR-10, without and with unrolling.

Section 3.4, Fig. 4 and Appendix D of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163). The claim: samples look alike
for every K, but more look-ahead steps make them more diverse. `cifar10_diversity.py` measures the
diversity on the checkpoints of this script.

    python examples/cifar10.py                             a quarter of the channels
    python examples/cifar10.py --data-root FOLDER          on any folder of images
    python examples/cifar10.py --preset paper --seeds 5    Appendix D, for a GPU
    torchrun --nproc-per-node 2 examples/cifar10.py --preset paper --device cuda
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import ranks, runs, study
from lab.data import image_folder
from lab.data.image_folder import Sampler
from lab.data.pixels import as_bytes, as_floats
from lab.figures import images
from lab.networks import dcgan
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import unroll

SHOWN = 64  # samples of each look at the training
GAME = unroll.NonSaturating()
LOSSES = {"d_loss": "D's loss", "f_0": "$f_0$", "f_K": "$f_K$"}


@dataclass(frozen=True)
class Config(study.OneModel):
    """One run: Appendix D. "Ours" marks a choice where the paper is silent."""

    data: str = ""
    images: int = 0
    unroll_steps: int = 10  # K, look-ahead steps of D in G's loss
    size: float = 1.0  # X: the channels of both networks, in parts of the paper's
    generator_learning_rate: float = 1e-4  # Adam's
    discriminator_learning_rate: float = 2e-4  # Adam's
    beta1: float = 0.5  # Adam's (ours; as in Appendix C)
    noise_size: int = 256  # of the generator's input
    ema: float = 0.0  # decay of an average of G's parameters, which then makes the samples
    amp: bool = False  # both networks run in bfloat16 where that is safe
    channels_last: bool = False  # the memory format that GPUs like
    compile: bool = False  # compile the look-ahead steps
    checkpointed: bool = False  # recompute the look-ahead steps in backward: memory flat in K
    ranks: int = 1
    evaluate_every: int = 2500  # pairs
    pairs: int = 50_000  # of updates, D first (ours); 100,000 updates
    batch_size: int = 128  # of all ranks together (ours)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.ranks or self.batch_size < 2 * self.ranks:
            raise ValueError(
                f"--batch-size must be at least 2 for each of {self.ranks} ranks and the same for "
                f"all of them, got {self.batch_size}"
            )


PAPER = Config()
SMALL = {"size": 0.25, "pairs": 2000, "batch_size": 32, "evaluate_every": 100}
PRESETS = {"small": replace(PAPER, preset="small", **SMALL), "paper": PAPER}


class Losses(nn.Module):
    """Averages of losses over about the last ten pairs of updates: state, as parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.full((len(LOSSES),), torch.nan))

    def add(self, *losses: Tensor) -> None:
        fresh = torch.stack([loss.detach().float() for loss in losses])
        self.values = torch.where(self.values.isnan(), fresh, 0.9 * self.values + 0.1 * fresh)

    def row(self) -> dict[str, float]:
        return dict(zip(LOSSES, self.values.tolist(), strict=True))


def train(config: Config, options: study.DataOptions, line: int) -> None:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    device = ranks.join(config.device)
    rng = torch.Generator(device).manual_seed(config.seed)
    pixels = image_folder.load(options.data_root).pixels.to(device)
    g = dcgan.generator(config.size, rng, noise_size=config.noise_size).to(memory_format=layout)
    d = dcgan.discriminator(config.size, rng).to(memory_format=layout)
    decay = get_ema_multi_avg_fn(config.ema)
    averaged = AveragedModel(g, multi_avg_fn=decay, use_buffers=True).requires_grad_(False)
    betas = (config.beta1, 0.999)
    g_optimizer = torch.optim.Adam(g.parameters(), config.generator_learning_rate, betas)
    d_optimizer = torch.optim.Adam(d.parameters(), config.discriminator_learning_rate, betas)
    losses = Losses().to(device)
    parts: dict[str, Any] = {"g": g, "d": d, "g_adam": g_optimizer, "d_adam": d_optimizer}
    parts |= {"losses": losses, "ema": averaged} if config.ema else {"losses": losses}

    def noise(count: int = config.batch_size) -> Tensor:
        return torch.randn(count, config.noise_size, generator=rng, device=device)

    def real() -> Tensor:
        chosen = torch.randint(len(pixels), (config.batch_size,), generator=rng, device=device)
        return as_floats(pixels[ranks.share(chosen)]).to(memory_format=layout)

    held_out = noise(SHOWN)

    @torch.no_grad()
    def evaluate(pairs: int, _: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Tensor]:
        network = averaged.module if config.ema else g
        samples = as_bytes(network.eval()(held_out)).cpu()
        network.train()
        return {"player_updates": 2 * pairs, **losses.row()}, samples.contiguous()

    generator, discriminator = ranks.wrapped(g), ranks.wrapped(d)
    how = {"checkpoint": config.checkpointed, **config.look_ahead}
    unrolled = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, GAME, **how)
    standard = unroll.UnrolledGeneratorLoss(discriminator, d_optimizer, GAME, unroll_steps=0)
    # bfloat16 has the exponents of float32: its losses need no scaling.
    precision = partial(torch.autocast, torch.device(device).type, torch.bfloat16, config.amp)
    path, run = config.checkpoint(options.out), f"{config.label}, seed {config.seed}"
    writes = ranks.first()
    for pair in runs.iterate(config, options, line, parts, rng, evaluate, writes=writes):
        with torch.no_grad(), precision():
            fake = generator(ranks.share(noise()))
        with precision():
            d_loss = GAME.discriminator_loss(discriminator, fake, real())
        runs.update(d_optimizer, d_loss, f"D at pair {pair} of {run}", path)

        with precision():
            fake, batch = generator(ranks.share(noise())), real()
            f_k = unrolled(fake, batch)
        with torch.no_grad(), precision():
            f_0 = standard(fake, batch) if config.unroll_steps else f_k
        runs.update(g_optimizer, f_k, f"G at pair {pair} of {run}", path)

        losses.add(d_loss, f_0, f_k)
        if config.ema:
            averaged.update_parameters(g)
    ranks.wait()  # for the last checkpoint


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
    """Return a function that makes a checkpoint generator's images, for `evaluate.py`."""
    g, config = trained(path, device)

    def make(count: int, rng: torch.Generator) -> Tensor:
        noise = torch.randn(count, config.noise_size, generator=rng, device=rng.device)
        return as_bytes(generated(g, noise))

    return make


def report(results: study.Results) -> str:
    images.report("cifar10_samples", results, curves=LOSSES, table=tuple(LOSSES))
    return results.sentence("f_0", "ends with a generator's loss of {}")


def arms(configs: Sequence[Config], options: study.DataOptions) -> list[Config]:
    ranks.join(options.device)
    data = image_folder.load(options.data_root)
    facts = {"data": data.name, "images": len(data.pixels), "ranks": ranks.count()}
    return [replace(config, **facts) for config in configs]


SWEEP = {"unroll_steps": (0, 1, 5, 10)}
HOOKS = {"options": study.DataOptions(), "arms": arms, "leads": ranks.first}
main = partial(study.main, __doc__, PRESETS, train, report, "cifar10", SWEEP, **HOOKS)
if __name__ == "__main__":
    main()
    ranks.leave()
