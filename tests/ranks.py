"""One game played by several processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from unroll import NonSaturating, UnrolledGeneratorLoss

Outcome = Callable[[Any, int, int], Any]  # of a play, a rank and the number of ranks

SAMPLES = 16  # of all ranks together
PAIRS = 4  # of minibatches: the first for f itself

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda d: torch.optim.Adam(d.parameters(), lr=0.05, betas=(0.5, 0.9), eps=1e-3),
    "SGD": lambda d: torch.optim.SGD(d.parameters(), lr=0.2, momentum=0.5),
}


class Routed(nn.Module):
    """A D with a head for each kind of batch, so that a rank may leave one without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        head = self.heads[int(x.detach().sum() > 0)]
        output: Tensor = head(self.body(x).tanh())
        return output


def plain() -> nn.Module:
    """Return a D that treats samples one by one."""
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def normalised() -> nn.Module:
    """Return a D whose samples depend on each other."""
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def synchronised() -> nn.Module:
    """Return a D whose layer exchanges statistics between ranks."""
    return nn.Sequential(nn.Linear(3, 6), nn.SyncBatchNorm(6), nn.Tanh(), nn.Linear(6, 1))


@dataclass(frozen=True)
class Play:
    """What one generator step is made of."""

    steps: int
    optimizer: str = "Adam"
    resampled: bool = False
    discriminator: Callable[[], nn.Module] = plain
    objective: Any = field(default_factory=NonSaturating)
    options: dict[str, Any] = field(default_factory=dict)
    wrap: bool = True  # D in DistributedDataParallel
    of_rank_1: dict[str, Any] = field(default_factory=dict)  # settings that only rank 1 has

    def __str__(self) -> str:
        words = [self.optimizer, f"K={self.steps}", "resampled" if self.resampled else "fixed"]
        return " ".join([*words, *map(str, self.options)])


def gradients(play: Play, rank: int, world: int) -> list[Tensor]:
    """Return G's gradients on this rank, after one generator step on its share of the samples."""
    torch.manual_seed(0)  # the same networks and samples everywhere
    g, d = nn.Linear(2, 3).double(), play.discriminator().double()
    noise = torch.randn(PAIRS, SAMPLES, 2, dtype=torch.float64).chunk(world, 1)[rank]
    real = torch.randn(PAIRS, SAMPLES, 3, dtype=torch.float64).chunk(world, 1)[rank]
    optimizer = OPTIMIZERS[play.optimizer](d)
    many = dist.is_initialized()
    generator: nn.Module = DistributedDataParallel(g) if many else g
    discriminator = DistributedDataParallel(d) if many and play.wrap else d
    mine = play.of_rank_1 if rank == 1 else {}
    settings = {"unroll_steps": play.steps, **play.options, **mine.get("options", {})}
    loss = UnrolledGeneratorLoss(discriminator, optimizer, play.objective, **settings)
    fake = generator(noise[0])
    minibatches = None
    if play.resampled:
        pairs = [(g(z), r) for z, r in zip(noise[1:], real[1:], strict=True)]
        minibatches = pairs[: mine.get("minibatches", PAIRS)]
    if mine.get("detached"):
        fake = fake.detach()
    loss(fake, real[0], minibatches=minibatches).backward()
    assert all(p.grad is None for p in d.parameters())
    return [p.grad for p in g.parameters() if p.grad is not None]


def _outcome(of: Outcome, play: Any, rank: int, world: int) -> Any:
    try:
        return of(play, rank, world)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _rank(rank: int, world: int, of: Outcome, plays: list[Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = [_outcome(of, play, rank, world) for play in plays]
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()  # a rank that leaves early breaks the others' connections
    dist.destroy_process_group()


def played(plays: list[Any], world: int, folder: Path, of: Outcome = gradients) -> list[list[Any]]:
    """Return what each rank got in each play: what ``of`` returns, or the text of an error."""
    multiprocessing.set_forkserver_preload([__name__])  # all ranks share one import of torch
    context: Any = start_processes(
        _rank, (world, of, plays, str(folder)), world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=10):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
