"""The second term of the unrolled gradient, on the mixture of 8 Gaussians.

Appendix B.2, Figs. App.3 and App.4 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): the whole gradient of f_K
(Eq. 12), its first term alone (stop-gradient), and the first term of the mean of f_1..f_K, with one
and with five generator steps per discriminator step. The size of the second term, against the
first, is measured over training.

    python examples/mog_second_gradient.py                          everything, five seeds
    python examples/mog_second_gradient.py --unroll-steps 3 --generator-steps 1
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import appendix, cli, records, runs, seeds
from lab.data.mixtures import TABLE
from lab.figures import plots
from torch import Tensor

import unroll

GRADIENTS = {
    "full": {},
    "first": {"stop_gradient": True},
    "averaged": {"stop_gradient": True, "average": True},
}
NAMES = {"full": "both terms", "first": "first term", "averaged": "first term, averaged"}
CURVES = {
    "modes": "modes captured",
    "percent_outside": "samples outside the figures (%)",
    "reverse_kl_all": "reverse KL, all samples (nats)",
    "second_term": "second term / first term",
}


@dataclass(frozen=True)
class Config(appendix.Settings):
    """Runs of one setting, the seeds side by side. `pairs` are of one D update and its G's."""

    stop_gradient: bool = False
    average: bool = False
    seeds: int = 5

    @property
    def gradient(self) -> str:
        """Return the name of the gradient that G follows."""
        return "averaged" if self.average else "first" if self.stop_gradient else "full"

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        arm = f"{self.gradient}-K{self.unroll_steps}-{self.generator_steps}to1"
        return folder / "checkpoints" / f"{arm}-seeds{self.first_seed}+{self.seeds}.pt"


PRESETS = {
    "quick": Config("quick", learning_rate=2e-3, batch_size=128, pairs=1200, evaluate_every=30),
    "paper": Config(),
}


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    players = appendix.players(config)
    generator, size = players.generator, config.batch_size
    look_ahead = partial(
        unroll.UnrolledGeneratorLoss,
        players.discriminator,
        players.d_optimizer,
        players.game,
        unroll_steps=config.unroll_steps,
    )
    unrolled = look_ahead(stop_gradient=config.stop_gradient, average=config.average)
    whole = look_ahead()
    held_out = players.held_out[..., :size], players.real(seeds.generators(config))

    def evaluate(pairs: int, earlier: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
        row, snapshot = appendix.look(players, pairs, earlier)
        z, real = held_out
        terms = unroll.gradient_terms(whole, generator(z), real, generator.parameters())
        first, second = map(norms, terms)
        for each, ratio in zip(row["each"], (second / first).tolist(), strict=True):
            each["second_term"] = ratio
        return row, snapshot

    label = f"{config.gradient} K={config.unroll_steps} {config.generator_steps}:1"
    for _ in players.iterate(folder, resume=resume, label=label, line=line, evaluate=evaluate):
        players.train_discriminator()
        for _ in range(config.generator_steps):
            players.follow(unrolled(players.fake(), players.real()))
    return config


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of every seed's gradient in all parameters."""
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of finished runs."""
    return appendix.record_rows("mog_second_gradient", config, log, ["second_term"])


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the tables."""
    folder = args.figures or args.out
    logs = {c: runs.read_log(c.checkpoint(args.out)) for c in configs}
    first = configs[0]
    everything = {}
    for steps, gradient in dict.fromkeys((c.generator_steps, c.gradient) for c in configs):
        arms = {
            f"K = {c.unroll_steps}": log
            for c, log in logs.items()
            if (c.generator_steps, c.gradient) == (steps, gradient)
        }
        everything |= {f"{steps}:1, {gradient}, {label}": log for label, log in arms.items()}
        histories = {label: seeds.histories(log) for label, log in arms.items()}
        print(f"\n{NAMES[gradient]}, {steps} G steps per D step, preset {first.preset}\n")
        print(records.table(histories, TABLE | {"second_term": "second / first"}))

        name = f"mog_second_gradient_{steps}_{gradient}"
        updates = [row["player_updates"] for row in next(iter(histories.values()))[0]]
        columns = sorted({round(i * (len(updates) - 1) / 6) for i in range(7)})
        plots.heat_maps(
            folder / f"{name}.png",
            {label: [log["snapshots"][i][0] for i in columns] for label, log in arms.items()},
            [f"{updates[i]:,}" for i in columns],
            appendix.mixture().sample(first.samples, torch.Generator().manual_seed(0)),
            extent=appendix.WINDOW,
            caption=f"updates of G and D ({NAMES[gradient]}, {steps} G steps per D step, "
            f"seed {first.first_seed})",
        )
        ideal = {"modes": appendix.MODES}
        plots.curves(
            folder / f"{name}_curves.png", histories, CURVES, x="player_updates", ideal=ideal
        )
    seeds.write_series(args.out, everything, first.first_seed)
    cli.written(args, folder)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    text = "look-ahead steps of D in the generator's loss"
    cli.add_unroll_steps(add, 1, 3, 5, 10, 20, text=text)
    add(
        "--gradients",
        nargs="+",
        choices=GRADIENTS,
        default=list(GRADIENTS),
        help="full: both terms of Eq. 12. first: the first alone, of f_K. averaged: the first "
        "alone, of the mean of f_1..f_K (default: all)",
    )
    add(
        "--generator-steps",
        dest="ratios",
        type=cli.positive,
        nargs="+",
        default=[1, 5],
        metavar="N",
        help="updates of G per update of D; 5 keeps D out of equilibrium (default: 1 5)",
    )
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="paper: Appendix A, 50,000 updates. quick (default): 2,400 updates at twenty times "
        "its learning rates, batches of 128 for 512",
    )
    add("--learning-rate", type=float, metavar="ETA", help="of both players")
    text = "of one D and one G update; with more G updates, the same number of updates in all"
    cli.add_iterations(add, text)
    cli.add_run_flags(parser, "mog_second_gradient", seeds=5, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)

    def as_many_updates(pairs: int, steps: int) -> int:
        return max(2 * pairs // (1 + steps), 1) if pairs > 0 else pairs

    return [
        replace(
            base,
            unroll_steps=k,
            generator_steps=steps,
            pairs=as_many_updates(base.pairs, steps),
            evaluate_every=as_many_updates(base.evaluate_every, steps),
            **GRADIENTS[gradient],
        )
        for steps in given["ratios"]
        for gradient in given["gradients"]
        for k in given["steps"]
    ]


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
