"""A generator against past discriminators, on the mixture of 8 Gaussians.

Appendix B.1, Figs. App.1 and App.2 of Metz, Poole, Pfau and Sohl-Dickstein, "Unrolled Generative
Adversarial Networks" (ICLR 2017, https://arxiv.org/abs/1611.02163): G's loss is the mean over an
ensemble of N discriminators of the past, the last N, or one in every so many. Does looking back do
what looking ahead does? The paper: no, and longer delays make the game less stable.

    python examples/mog_history.py                              Figs. App.1 and App.2, three seeds
    python examples/mog_history.py --members 5 --delays 100     one of their rows
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lab import appendix, cli, planar, runs, seeds
from lab.appendix import QUICK
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

import unroll

DELAYED = 5  # members of the ensembles with a delay, Fig. App.2


@dataclass(frozen=True)
class Config(appendix.Settings):
    """Runs of one setting, the seeds side by side.

    With `live`, the newest member is D as it is; else it is D as it was when last sampled.
    """

    members: int = 1
    delay: int = 1
    live: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        super().__post_init__()
        for name in ("members", "delay"):
            if getattr(self, name) <= 0:
                flag = name.replace("delay", "delays")
                raise ValueError(f"--{flag} must be positive, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        """Return the name of the setting in figures."""
        if self.unroll_steps:
            return f"K = {self.unroll_steps}"
        if self.delay == 1:
            return f"N = {self.members}"
        return f"delay {self.delay}" + ", sampled" * (not self.live)

    def checkpoint(self, folder: Path) -> Path:
        """Return where the runs are kept."""
        arm = f"K{self.unroll_steps}-N{self.members}-delay{self.delay}"
        arm += "-sampled" * (not self.live)
        return folder / "checkpoints" / f"{arm}-seeds{self.first_seed}+{self.seeds}.pt"


PRESETS = {"quick": Config(**QUICK), "paper": Config()}


class Ensemble(nn.Module):
    """Discriminators of the past, side by side as more independent networks.

    Args:
        discriminator: The networks of all seeds that are trained.
        members: How many of the past are kept.
        delay: Updates of D from one member to the next.
        live: Whether the newest member follows D between.
    """

    def __init__(
        self, discriminator: nn.Module, *, members: int, delay: int, live: bool = True
    ) -> None:
        super().__init__()
        self.discriminator = [discriminator]  # in a list: it is no part of the state
        self.size, self.delay, self.live = members, delay, live
        self.names = [name for name, _ in discriminator.named_parameters()]
        for name, parameter in discriminator.named_parameters():
            past = parameter.detach().new_zeros(members, *parameter.shape)
            self.register_buffer(name.replace(".", "_"), past)
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def follow(self) -> None:
        """Look at D after an update of it."""
        updates = int(self.updates)
        if self.live or updates % self.delay == 0:
            place = updates // self.delay % self.size
            for name, parameter in self.discriminator[0].named_parameters():
                self.get_buffer(name.replace(".", "_"))[place] = parameter
        self.updates += 1

    def __len__(self) -> int:
        """Return how many members there are already."""
        return min(-(-int(self.updates) // self.delay), self.size)

    def forward(self, x: Tensor) -> Tensor:
        """Return all members' logits of every seed's samples, `(members * seeds, 1, samples)`."""
        past = {n: self.get_buffer(n.replace(".", "_"))[: len(self)] for n in self.names}
        side_by_side = {name: stack.flatten(0, 1) for name, stack in past.items()}
        (discriminator,) = self.discriminator
        return functional_call(discriminator, side_by_side, x.repeat(len(self), 1, 1))


def train(config: Config, line: int, *, folder: Path, resume: bool) -> Config:
    """Train the GANs of all seeds; what comes of them is in their checkpoint."""
    players = appendix.players(config)
    ensemble = Ensemble(
        players.discriminator, members=config.members, delay=config.delay, live=config.live
    )
    unrolled = unroll.UnrolledGeneratorLoss(
        players.discriminator, players.d_optimizer, players.game, unroll_steps=config.unroll_steps
    )
    iterations = players.iterate(
        folder,
        resume=resume,
        label=config.label,
        line=line,
        evaluate=partial(appendix.look, players),
        ensemble=ensemble,
    )
    for _ in iterations:
        players.train_discriminator()
        ensemble.follow()
        fake, real = players.fake(), players.real()
        if config.unroll_steps:
            players.follow(unrolled(fake, real))
        else:  # f, but for its real-data term, which is constant in theta_G here
            players.follow(-config.seeds * softplus(ensemble(fake)).mean())
    return config


def record_rows(config: Config, log: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is kept of finished runs."""
    return appendix.record_rows("mog_history", config, log)


def report(args: argparse.Namespace, configs: Sequence[Config]) -> None:
    """Write the time series and the figures, and print the tables."""
    folder = args.figures or args.out
    logs = {c: runs.read_log(c.checkpoint(args.out)) for c in configs}
    fifth = {c: log for c, log in logs.items() if c.members == DELAYED}
    figures = {
        "ensembles": {c.label: log for c, log in logs.items() if c.delay == 1},
        "delays": {f"delay {c.delay}": log for c, log in fifth.items() if c.live},
        "sampled": {
            f"delay {c.delay}": log for c, log in fifth.items() if c.delay == 1 or not c.live
        },
    }
    first = configs[0]
    for name, shown in figures.items():
        if shown:
            planar.report(
                f"mog_history_{name}",
                shown,
                appendix.mixture(),
                folder=folder,
                seed=first.first_seed,
                caption=f"preset {first.preset}",
            )
    named = {c.label: log for c, log in logs.items()}
    seeds.write_series(args.out, named, first.first_seed)
    cli.written(args, folder)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("the method").add_argument
    add(
        "--members",
        dest="sizes",
        type=int,
        nargs="*",
        default=[1, 5, 20, 50],
        metavar="N",
        help="sizes of the ensembles of the last N discriminators; 1 is the standard GAN "
        "(default: 1 5 20 50)",
    )
    add(
        "--delays",
        type=int,
        nargs="*",
        default=[10, 100, 500],
        metavar="STEPS",
        help=f"updates of D from one of {DELAYED} members to the next (default: 10 100 500)",
    )
    add(
        "--newest",
        nargs="+",
        choices=("live", "sampled"),
        default=("live", "sampled"),
        help="the newest member of an ensemble with a delay: D as it is, or as it was when last "
        "sampled; the paper does not say (default: both)",
    )
    text = "look-ahead steps of D in the generator's loss, without an ensemble, to compare with"
    cli.add_unroll_steps(add, 10, nargs="*", text=text)
    add = parser.add_argument_group("the experiment").add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="paper: Appendix A. quick (default), as in mog.py: both learning rates 1e-3 for 1e-4, "
        "batches of 256 for 512 and 3,500 pairs for 25,000",
    )
    cli.add_iterations(add)
    cli.add_run_flags(parser, "mog_history", seeds=3, figures=True)
    return parser


def build(given: Mapping[str, Any]) -> list[Config]:
    """Return the settings that the command line asks for."""
    base = cli.chosen(given, PRESETS)
    arms: list[dict[str, Any]] = [{"members": size} for size in given["sizes"]]
    arms += [
        {"members": DELAYED, "delay": delay, "live": newest == "live" or delay == 1}
        for newest in given["newest"]
        for delay in given["delays"]
    ]
    arms += [{"unroll_steps": k} for k in given["steps"]]
    return list(dict.fromkeys(replace(base, **arm) for arm in arms))


def main() -> None:
    """Train what the command line asks for, record it and draw it."""
    parser = arguments()
    args = parser.parse_args()
    report(args, cli.carry_out(parser, args, build, train, record_rows))


if __name__ == "__main__":
    main()
