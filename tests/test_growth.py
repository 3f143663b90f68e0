"""Nothing accumulates over calls, with the garbage collector off."""

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from tests.players import OPTIMIZERS, batches, fakes, small, tanh_net, train
from tests.settings import DEVICE, randn
from tests.zoo import ZOO
from unroll import R1, Criterion, Minimax, UnrolledGeneratorLoss

NAMES = ["Adam", "SGD dampening", "torchopt.SGD dampening", "torchopt.MetaAdam"]


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live_tensors() -> int:
    """Return the number of tensors that the interpreter knows."""
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def nodes(output: Tensor) -> int:
    """Return the size of the graph behind a tensor."""
    seen: set[Node] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return len(seen)


def resident() -> int:
    """Return the process's memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def game(name: str, d: nn.Module, **options: Any) -> tuple[UnrolledGeneratorLoss, nn.Module]:
    """Return a loss over a D that has been trained, and a generator."""
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, batches(2, seed=1))
    generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(DEVICE, torch.float64)
    return UnrolledGeneratorLoss(d, optimizer, **options), generator


def play(loss: UnrolledGeneratorLoss, generator: nn.Module) -> int:
    """Take the gradient of one generator step and return the size of its graph."""
    ((_, real),) = batches(1)
    fake = generator(torch.ones(5, 3, device=DEVICE, dtype=torch.float64))
    value = loss(fake, real)
    size = nodes(value)
    value.backward()
    return size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"unroll_steps": 0},
        {"unroll_steps": 3},
        {"unroll_steps": 3, "average": True},
        {"unroll_steps": 3, "stop_gradient": True},
        {"unroll_steps": 2, "objective": Minimax() + R1(1.0)},
    ],
    ids=str,
)
def test_tensors_and_nodes_are_constant(name: str, options: dict[str, Any]) -> None:
    loss, generator = game(name, small(), **options)
    play(loss, generator)
    tensors, sizes = [], []
    for _ in range(3):
        sizes.append(play(loss, generator))
        tensors.append(live_tensors())
    assert len(set(sizes)) == 1, sizes
    assert len(set(tensors)) == 1, tensors


@pytest.mark.parametrize("name", NAMES)
def test_constant_also_between_real_steps(name: str) -> None:
    """The state that a look-ahead starts from is detached from what came before."""
    loss, generator = game(name, small(), unroll_steps=2)
    tensors, sizes = [], []
    for _ in range(5):
        train(loss.discriminator, loss.optimizer, batches(1, seed=2))
        sizes.append(play(loss, generator))
        tensors.append(live_tensors())
    assert len(set(sizes[1:])) == 1, sizes
    assert len(set(tensors[1:])) == 1, tensors


@pytest.mark.plain
def test_the_counters_count() -> None:
    """A test of the tests: they see a graph that is kept, and its nodes."""
    loss, _ = game("Adam", small(), unroll_steps=2)
    ((fake, real),) = batches(1)
    before = live_tensors()
    kept = loss(fake.requires_grad_(), real)
    assert live_tensors() > before
    assert nodes(kept) > 100
    shorter = UnrolledGeneratorLoss(loss.discriminator, loss.optimizer, unroll_steps=1)
    assert nodes(shorter(fake, real)) < nodes(kept)


@pytest.mark.parametrize("name", [*NAMES, "torchopt.FuncOptimizer"])
@pytest.mark.parametrize("method", ["forward", "unroll", "raising"])
def test_the_fake_dies(name: str, method: str) -> None:
    loss, generator = game(name, small(), unroll_steps=3)
    ((_, real),) = batches(1)
    fake = generator(torch.ones(5, 3, device=DEVICE, dtype=torch.float64))
    dead = weakref.ref(fake)
    if method == "forward":
        value = loss(fake, real)
        value.backward()
        del value
    elif method == "unroll":
        ahead = loss.unroll(fake, real)
        ahead(fake).mean().backward()
        del ahead
    else:
        with pytest.raises(TypeError, match="int"):
            loss(fake, 3)
        gc.collect()  # the traceback of the error is a cycle of its own
    del fake
    assert dead() is None


@pytest.mark.parametrize(
    "kind",
    [
        "spectral norm",
        "spectral norm, hooks",
        "weight norm",
        "weight norm, hooks",
        "changing buffers",
        "LSTM",
        "transformer layer",
        "tied",
    ],
)
def test_modules_do_not_pin_the_graph(kind: str) -> None:
    """Old spectral and weight norm keep the last weight, with its graph, as an attribute."""
    animal = ZOO[kind]
    d = animal.make()
    optimizer = torch.optim.Adam(d.parameters())
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    x = torch.ones(5, *animal.shape, device=DEVICE, dtype=torch.float64, requires_grad=True)
    real = animal.feed(torch.zeros(5, *animal.shape, device=DEVICE, dtype=torch.float64))
    fake = x * 2
    dead = weakref.ref(fake)
    value = loss(animal.feed(fake), real)
    value.backward()
    del value, fake
    assert dead() is None


def test_without_backward_everything_dies_with_the_value() -> None:
    loss, _ = game("Adam", small(), unroll_steps=3)
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    counts = []
    for _ in range(4):
        loss(fake, real)
        loss.unroll(fake, real)
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1, counts


def test_memory_is_constant() -> None:
    """Coarsely: 40 calls whose graphs take about 8 MB each leave the process as it was."""
    d = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)).to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters())
    criterion = Criterion(nn.BCEWithLogitsLoss())
    loss = UnrolledGeneratorLoss(d, optimizer, criterion, unroll_steps=5)
    real = torch.zeros(256, 64, device=DEVICE)

    def call() -> None:
        fake = torch.ones(256, 64, device=DEVICE, requires_grad=True)
        loss(fake, real).backward()

    for _ in range(5):
        call()
    before = resident()
    for _ in range(40):
        call()
    assert resident() - before < 40 * 2**20


def test_points_on_the_way_are_not_kept() -> None:
    alive: list[int] = []

    def count(theta: Any) -> Any:
        alive.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        return theta

    d = tanh_net()
    loss = UnrolledGeneratorLoss(
        d,
        torch.optim.SGD(d.parameters(), lr=0.3),
        unroll_steps=8,
        stop_gradient=True,
        project=count,
    )
    loss(fakes(), randn(5, 3))
    assert alive[-1] <= alive[2] + 8  # the losses, one number a step


@pytest.mark.parametrize("compile", [False, True])
def test_references_to_none_are_not_used_up(compile: bool) -> None:
    d, ((fake, real),) = small(), batches(1)
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters()), unroll_steps=1, compile=compile
    )
    fake = fake.clone().requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            loss(fake, real)
        before = sys.getrefcount(None)
        for _ in range(100):
            loss(fake, real)
    assert sys.getrefcount(None) > before - 50
