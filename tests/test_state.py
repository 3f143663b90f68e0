"""Nothing that the user holds changes: D, its buffers and gradients, the optimizer and its future.

Everything is compared by identity and by bytes (see ``tests/snapshot.py``).
"""

import copy
import gc
import pickle
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests.players import LR, OPTIMIZERS, batches, fakes, small, tanh_net, train, with_options
from tests.settings import DEVICE, randn
from tests.snapshot import bits, changes, snapshot
from unroll import R1, Minimax, UnrolledGeneratorLoss

WARM = batches(3, seed=1)
NAMES = [
    "Adam",
    "Adam amsgrad",
    "Adam tensor lr",
    "AdamW",
    "SGD",
    "SGD dampening",
    "torchopt.Adam",
    "torchopt.RMSprop centered",
    "torchopt.SGD dampening",
    "torchopt.Optimizer of a chain",
    "torchopt.MetaAdam",
    "torchopt.MetaSGD",
    "torchopt.FuncOptimizer",
]

Call = Callable[[UnrolledGeneratorLoss, Tensor, Tensor], None]


def trained(name: str) -> tuple[nn.Module, Any]:
    """Return a D with gradients on some of its parameters, and an optimizer with some state."""
    torch.manual_seed(0)
    d = small()
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, WARM)
    if not isinstance(optimizer, torchopt.MetaOptimizer):
        for number, parameter in enumerate(d.parameters()):
            parameter.grad = None if number % 2 else torch.full_like(parameter, 0.125)
    return d, optimizer


def _forward(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    loss(fake, real)


def _backward(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    loss(fake, real).backward()
    assert fake.grad is not None


def _no_grad(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    with torch.no_grad():
        assert not loss(fake, real).requires_grad


def _unroll(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    ahead = loss.unroll(fake, real)
    ahead(fake).mean().backward()


def _in_place_on_the_result(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    """Whoever writes into what ``unroll`` returned writes into nothing of the user's."""
    with torch.no_grad():
        ahead = loss.unroll(fake, real)
        for tensors in (ahead.parameters, ahead.buffers):
            for tensor in tensors.values():
                tensor.add_(1)
        for leaf in torchopt.pytree.tree_leaves(ahead.optimizer_state):
            if isinstance(leaf, Tensor):
                leaf.add_(1)


def _resampled(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    pairs = [(fake * (k + 1), real) for k in range(loss.unroll_steps)]
    loss(fake, real, minibatches=pairs).backward()


def _average(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    with_options(loss, average=True)(fake, real).backward()


def _stop_gradient(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> None:
    with_options(loss, stop_gradient=True)(fake, real).backward()


CALLS: dict[str, Call] = {
    "forward": _forward,
    "backward": _backward,
    "no_grad": _no_grad,
    "unroll": _unroll,
    "resampled": _resampled,
    "average": _average,
    "stop_gradient": _stop_gradient,
}


def graph_leaf(fake: Tensor) -> Tensor:
    """Return fakes of their own that require a gradient."""
    return fake.clone().requires_grad_()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_nothing_changes(name: str, k: int) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = trained(name)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=k)
    before = snapshot(d, optimizer)
    for call_name, call in CALLS.items():
        call(loss, graph_leaf(fake), real)
        assert not changes(before, d, optimizer), call_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_results_share_no_memory_with_the_users_tensors(name: str, k: int) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = trained(name)
    before = snapshot(d, optimizer)
    _in_place_on_the_result(UnrolledGeneratorLoss(d, optimizer, unroll_steps=k), fake, real)
    assert not changes(before, d, optimizer)


def test_the_snapshot_sees_what_it_should() -> None:
    """A test of the tests: each of these changes has to be noticed."""
    d, optimizer = trained("torchopt.SGD dampening")
    torch_optimizer = torch.optim.Adam(d.parameters())
    before = snapshot(d, optimizer, torch_optimizer)
    assert not changes(before, d, optimizer, torch_optimizer)

    def noticed(change: Callable[[], object], undo: Callable[[], object]) -> bool:
        change()
        seen = bool(changes(before, d, optimizer, torch_optimizer))
        undo()
        assert not changes(before, d, optimizer, torch_optimizer)
        return seen

    layers: Any = d
    weight, mean = layers[0].weight, layers[1].running_mean
    assert noticed(lambda: weight.data.mul_(2), lambda: weight.data.div_(2))
    assert noticed(lambda: mean.mul_(2), lambda: mean.div_(2))
    assert noticed(lambda: weight.grad.mul_(2), lambda: weight.grad.div_(2))
    assert noticed(d.eval, d.train)
    assert noticed(lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True))
    assert noticed(lambda: setattr(layers[2], "n", 1), lambda: delattr(layers[2], "n"))
    group = torch_optimizer.param_groups[0]
    assert noticed(lambda: group.update(lr=1.0), lambda: group.update(lr=1e-3))
    groups: Any = tuple(optimizer.state_groups)
    assert len(torchopt.pytree.tree_leaves(groups)) == 5  # momenta; the flag below is in a closure
    flags = [path for path in before if "first_call" in path]
    assert flags
    saved = copy.copy(optimizer.state_groups)
    momenta = torchopt.pytree.tree_map(torch.zeros_like, saved[0])
    assert noticed(
        lambda: optimizer.state_groups.__setitem__(0, momenta),
        lambda: optimizer.state_groups.__setitem__(0, saved[0]),
    )


class Boom(Exception):
    """The user's own error."""


class Failing:
    """An objective that raises at the nth call of one of its methods."""

    def __init__(self, method: str, call: int) -> None:
        self.method, self.left, self.error = method, call, Boom(method)

    def _count(self, method: str) -> None:
        if method == self.method:
            self.left -= 1
            if self.left < 0:
                raise self.error

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Fail half way through the step, after D has run on the real batch."""
        d(real)
        self._count("discriminator_loss")
        return Minimax().discriminator_loss(d, fake, real)

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Fail after D has run."""
        d(real)
        self._count("generator_loss")
        return Minimax().generator_loss(d, fake, real)


class FailingD(nn.Module):
    """A D that raises at the nth call, after it has changed its buffers and attributes."""

    count: Tensor

    def __init__(self, body: nn.Module, call: int) -> None:
        super().__init__()
        self.body, self.call, self.calls, self.error = body, call, 0, Boom("forward")
        self.register_buffer("count", torch.zeros((), device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x)
        self.calls += 1
        self.count += 1
        if self.calls > self.call:
            raise self.error
        return output


@pytest.mark.parametrize("name", ["Adam", "torchopt.SGD dampening", "torchopt.MetaAdam"])
@pytest.mark.parametrize(
    ("method", "call"),
    [("discriminator_loss", 0), ("discriminator_loss", 2), ("generator_loss", 0)],
)
def test_when_the_objective_raises(name: str, method: str, call: int) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = trained(name)
    objective = Failing(method, call)
    loss = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=4)
    before = snapshot(d, optimizer)
    with pytest.raises(Boom, match=method) as raised:
        loss(graph_leaf(fake), real)
    assert raised.value is objective.error
    assert raised.value.__cause__ is None
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize("call", [0, 1, 5, 6])
def test_when_d_raises(call: int) -> None:
    ((fake, real),) = batches(1)
    d = FailingD(small(), call)
    optimizer = torch.optim.Adam(d.parameters())
    before = snapshot(d, optimizer)
    with pytest.raises(Boom, match="forward") as raised:
        UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)(graph_leaf(fake), real)
    assert raised.value is d.error
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize("name", ["Adam", "torchopt.SGD dampening"])
@pytest.mark.parametrize("source", ["project", "minibatches"])
def test_when_the_users_callbacks_raise(name: str, source: str) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = trained(name)
    error = Boom(source)
    left = [2]

    def project(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        left[0] -= source == "project"
        if not left[0]:
            raise error
        return {n: p.clamp(-0.1, 0.1) for n, p in parameters.items()}

    def minibatches() -> Iterator[tuple[Tensor, Tensor]]:
        yield graph_leaf(fake), real
        yield graph_leaf(fake), real
        if source == "minibatches":
            raise error
        yield graph_leaf(fake), real

    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, project=project)
    before = snapshot(d, optimizer)
    with pytest.raises(Boom, match=source) as raised:
        loss(graph_leaf(fake), real, minibatches=minibatches())
    assert raised.value is error
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 3])
def test_real_steps_go_on_as_if_nothing_had_happened(name: str, warm: int) -> None:
    """Also at the very first step, when torchopt's momentum has not made its ``first_call``."""

    def run(look: bool) -> list[bytes]:
        torch.manual_seed(0)
        d = small()
        optimizer = OPTIMIZERS[name](d)
        train(d, optimizer, WARM[:warm])
        if look:
            ((fake, real),) = batches(1)
            loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
            loss(graph_leaf(fake), real).backward()
            loss.unroll(graph_leaf(fake), real)
        train(d, optimizer, batches(3, seed=2))
        return [bits(t) for t in (*d.parameters(), *d.buffers())]

    assert run(look=True) == run(look=False)


def test_a_bare_transformation_is_left_as_it_was() -> None:
    """Its closures (``first_call``) and the state that the call was given."""
    ((fake, real),) = batches(1)
    d = small()
    for impl in (torchopt.sgd(LR, momentum=0.9, dampening=0.5), torchopt.adam(LR)):
        state = impl.init(tuple(d.parameters()))
        before = snapshot(d, impl, state)
        loss = UnrolledGeneratorLoss(d, impl, unroll_steps=2)
        loss(graph_leaf(fake), real, optimizer_state=state).backward()
        loss(graph_leaf(fake), real).backward()
        assert not changes(before, d, impl, state)


@pytest.mark.parametrize("name", ["Adam", "torchopt.SGD dampening", "torchopt.MetaAdam"])
def test_the_global_generator_stands_still(name: str) -> None:
    """Without dropout no random number is drawn, at construction or at any call."""
    ((fake, real),) = batches(1)
    d, optimizer = trained(name)
    before = torch.get_rng_state()
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    for call in CALLS.values():
        call(loss, graph_leaf(fake), real)
    assert torch.equal(torch.get_rng_state(), before)


class Remembering(nn.Module):
    """A D that keeps much about its calls, as users' modules do."""

    count: Tensor
    mean: Tensor
    unsaved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.calls = 0
        self.last: Tensor | None = None
        self.plain = torch.zeros(3)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.body(x))
        self.calls += 1
        self.count += 1  # in place
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)  # by assignment
        self.unsaved.add_(1)
        self.plain.add_(1)
        self.last = hidden
        self.late = hidden.detach()  # an attribute that was not there before
        output: Tensor = self.head(hidden - self.mean)
        return output


class Appending(Remembering):
    """A D that collects features in a list and counts in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x)
        self.counts["calls"] += 1
        return super().forward(x)


class Switching(nn.Module):
    """A D that switches a mode and a flag of its own parts in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        output: Tensor = self.head(self.norm(x))
        self.norm.momentum = 0.5
        return output


def _spectral(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), wrap(nn.Linear(6, 1)))
    return layers.to(DEVICE, torch.float64)


def _frozen() -> nn.Module:
    return small().requires_grad_(False)


def _half_evaluated() -> nn.Module:
    d = small()
    d.get_submodule("1").eval()
    return d


MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": small,
    "one layer in eval mode": _half_evaluated,
    "spectral norm": lambda: _spectral(nn.utils.parametrizations.spectral_norm),
    "spectral norm, hooks": lambda: _spectral(nn.utils.spectral_norm),
    "weight norm": lambda: _spectral(nn.utils.parametrizations.weight_norm),
    "weight norm, hooks": lambda: _spectral(_old_weight_norm),
    "buffers and attributes": Remembering,
    "lists and dictionaries": Appending,
    "modes": Switching,
    "frozen at the call": _frozen,
}


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_modules_with_a_memory(kind: str, evaluated: bool) -> None:
    ((fake, real),) = batches(1)
    d = MODULES[kind]()
    frozen = not any(p.requires_grad for p in d.parameters())
    d(fake)
    if evaluated:
        d.eval()
    optimizer = torch.optim.Adam(d.parameters())
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    before = snapshot(d, optimizer)
    for name, call in CALLS.items():
        call(loss, graph_leaf(fake), real)
        changed = changes(before, d, optimizer)
        assert not changed, name
    assert frozen is not any(p.requires_grad for p in d.parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_d_can_be_copied_and_pickled_afterwards(kind: str) -> None:
    """Nothing of the look-ahead's graph hangs on D."""
    ((fake, real),) = batches(1)
    d = MODULES[kind]()
    with torch.no_grad():
        d(fake)  # the hooks of the old weight norm hold a graph until then
    optimizer = torch.optim.Adam(d.parameters())
    UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)(graph_leaf(fake), real).backward()
    copied = copy.deepcopy(d)
    if kind != "spectral norm" and kind != "weight norm":  # torch refuses to pickle those
        restored = pickle.loads(pickle.dumps(d))
        torch.testing.assert_close(restored.state_dict(), d.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(copied.state_dict(), d.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("k", [0, 3])
def test_the_value_is_the_same_without_a_graph(kind: str, k: int) -> None:
    ((fake, real),) = batches(1)
    d = MODULES[kind]()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=k)
    value = loss(graph_leaf(fake), real)
    with torch.no_grad():
        without = loss(fake, real)
    assert not without.requires_grad
    torch.testing.assert_close(without, value.detach(), rtol=1e-14, atol=0)
    first_term = with_options(loss, stop_gradient=True)(graph_leaf(fake), real)
    assert first_term.requires_grad
    torch.testing.assert_close(first_term.detach(), value.detach(), rtol=1e-14, atol=0)


def test_a_frozen_d_gives_what_a_free_one_gives() -> None:
    ((fake, real),) = batches(1)
    d, optimizer = trained("Adam")
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    gradients = []
    for free in (True, False):
        d.requires_grad_(free)
        x = graph_leaf(fake)
        loss(x, real).backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert bits(gradients[0]) == bits(gradients[1])


def test_gradients_of_d_stay_none_through_a_generators_step() -> None:
    """The drop-in loop: the fakes come from a generator, and only it gets gradients."""
    torch.manual_seed(0)
    generator = nn.Linear(3, 4, device=DEVICE, dtype=torch.float64)
    d = small()
    d_optimizer = torch.optim.Adam(d.parameters())
    ((_, real),) = batches(1)
    z = torch.randn(5, 3, device=DEVICE, dtype=torch.float64)
    UnrolledGeneratorLoss(d, d_optimizer, unroll_steps=3)(generator(z), real).backward()
    assert all(p.grad is None for p in d.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


@pytest.mark.plain
def test_hooks_fire_but_stay() -> None:
    """2K + 2 calls for Minimax; a hook that changes the output counts, as in a real step."""
    ((fake, real),) = batches(1)
    d = small()
    calls = []
    d.register_forward_hook(lambda *_: calls.append(1))
    handle = d.register_forward_hook(lambda _module, _args, output: 2 * output)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    before = snapshot(d, optimizer)
    ahead = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    ahead(graph_leaf(fake), real)
    assert len(calls) == 8 + 8  # the first call looks at a step and at f, twice
    calls.clear()
    ahead(graph_leaf(fake), real)
    assert len(calls) == 8
    assert [p for p in changes(before, d, optimizer) if "<calls>" not in p] == []
    moved = ahead.unroll(graph_leaf(fake), real).parameters
    train(d, optimizer, [(fake, real)] * 3)
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(moved[name], parameter, rtol=1e-12, atol=1e-15)
    handle.remove()


class Lazy(nn.Module):
    """A D whose moving average does not exist before its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.mean: Tensor | None
        self.register_buffer("mean", None)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        output: Tensor = self.layer(torch.tanh(x - self.mean))
        return output


def test_a_buffer_that_is_none_until_d_runs_evolves() -> None:
    d, real, fake = Lazy(), randn(5, 3), fakes()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3)
    before = snapshot(d)
    value, ahead = loss(fake, real), loss.unroll(fake.detach(), real)
    assert not changes(before, d)
    assert unroll.check_gradients(loss, fake, real).ok
    train(d, loss.optimizer, [(fake.detach(), real)] * 3, Minimax())
    torch.testing.assert_close(ahead.buffers["mean"], d.get_buffer("mean").detach())
    wanted = Minimax().generator_loss(d, fake.detach(), real)
    torch.testing.assert_close(value.detach(), wanted.detach())


def test_a_buffer_that_becomes_none_does() -> None:
    class Once(Lazy):
        def __init__(self) -> None:
            super().__init__()
            self.mean = randn(3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x if self.mean is None else x - self.mean)
            self.mean = None
            return output

    d = Once()
    loss = UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2)
    before = snapshot(d)
    loss(fakes(), randn(5, 3)).backward()
    assert "mean" not in loss.unroll(randn(5, 3), randn(5, 3)).buffers
    assert not changes(before, d)


class LeCam:
    """Moving averages of D's outputs, kept by the objective (Tseng et al. 2021)."""

    def __init__(self) -> None:
        self.ema, self.in_place = torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)
        self.seen: list[Tensor] = []

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        outputs: Tensor = d(fake)
        self.ema = 0.9 * self.ema + 0.1 * outputs.detach().mean()
        self.in_place.mul_(0.9).add_(0.1 * outputs.detach().mean())
        self.seen.append(outputs)
        loss = Minimax().discriminator_loss(d, fake, real)
        return loss + 0.1 * (outputs - self.ema - self.in_place).square().mean()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = -d(fake).mean()
        return loss


@pytest.mark.plain
@pytest.mark.parametrize("with_penalty", [False, True])
def test_an_objective_is_given_back_as_it_was(with_penalty: bool) -> None:
    d, own, real, fake = tanh_net(), LeCam(), randn(5, 3), fakes()
    loss = UnrolledGeneratorLoss(
        d,
        torch.optim.Adam(d.parameters(), lr=0.05),
        own + R1(0.1) if with_penalty else own,
        unroll_steps=3,
    )
    before = snapshot(own)
    values = {loss(fake, real).item() for _ in range(3)}
    assert len(values) == 1
    assert not changes(before, own)
    inner = fake * 2
    pinned = weakref.ref(inner)
    loss(inner, real).backward()
    del inner
    gc.collect()
    assert pinned() is None


class Diary(nn.Module):
    """It writes down what it sees, in containers within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.last: deque[float] = deque(maxlen=5)
        self.pages: dict[str, list[float]] = {"means": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(x.mean().item())
        self.pages["means"].append(x.mean().item())
        output: Tensor = self.layer(x)
        return output


def test_nested_containers_are_given_back() -> None:
    d = Diary().to(DEVICE).double()
    UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)(
        fakes(), randn(5, 3)
    ).backward()
    assert not d.last
    assert d.pages == {"means": []}


class Holding:
    """A game that keeps a network, averages in a tuple and a count of its own."""

    def __init__(self) -> None:
        self.q = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(DEVICE, torch.float64)
        self.averages = torch.zeros((), device=DEVICE), [torch.zeros((), device=DEVICE)]
        self.same = self.averages[0]
        self.calls = Counter[str]()

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        self.calls["d"] += 1
        assert self.same is self.averages[0]
        for average in (self.averages[0], *self.averages[1]):
            average.add_(d(fake).detach().mean())
        of_q: Tensor = self.q(fake).square().mean()
        return Minimax().discriminator_loss(d, fake, real) + of_q

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        self.q(real)
        loss: Tensor = -d(fake).mean() + self.averages[0]
        return loss


@pytest.mark.plain
def test_what_an_objective_holds_is_given_back() -> None:
    d, game, fake = tanh_net(), Holding(), fakes()
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.3), game, unroll_steps=3)
    before, averages = snapshot(game.q), game.averages
    assert len({loss(fake, randn(5, 3)).item() for _ in range(2)} | {1.0}) > 1
    assert not changes(before, game.q)
    assert game.averages is averages
    assert not averages[0]
    assert not averages[1][0]
    assert not game.calls


class AutoClip:
    """Clip at a quantile of the norms so far (Seetharaman et al. 2020)."""

    def __init__(self) -> None:
        self.norms = [0.3, 0.5]

    def __call__(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        self.norms.append(float(norm.detach()))
        most = torch.tensor(self.norms).quantile(0.2).item()
        return {name: g * (most / norm).clamp(max=1) for name, g in gradients.items()}


@pytest.mark.plain
def test_functions_with_a_memory_are_given_back() -> None:
    d, clip, real, fake = tanh_net(), AutoClip(), randn(5, 3), fakes()
    optimizer = torch.optim.SGD(d.parameters(), 0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, transform_gradients=clip)
    assert len({loss(fake, real).item() for _ in range(3)}) == 1
    assert clip.norms == [0.3, 0.5]


class Owner:
    """A game that holds its own loss, a lazy layer, a cycle and what is no plain container."""

    def __init__(self, d: nn.Module, optimizer: Any) -> None:
        self.lazy = nn.LazyLinear(2).to(DEVICE, torch.float64)
        self.ring: dict[str, Any] = {}
        self.pair = torch.ones(2), self.ring
        self.ring["pair"], self.size = self.pair, torch.Size([2, 3])
        self.words = tuple(str(i) for i in range(2000))
        self.loss = UnrolledGeneratorLoss(d, optimizer, self, unroll_steps=3)

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        assert d
        of_lazy: Tensor = self.lazy(fake).square().mean()
        return Minimax().discriminator_loss(d, fake, real) + of_lazy

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = -d(fake).mean()
        return loss


@pytest.mark.plain
def test_an_objective_may_hold_anything() -> None:
    d = tanh_net()
    game = Owner(d, torch.optim.SGD(d.parameters(), 0.3))
    pair, words = game.pair, game.words
    for _ in range(2):
        game.loss(fakes(), randn(5, 3))
        assert game.loss.discriminator_losses.shape == (3,)
    assert game.pair is pair
    assert game.words is words


def test_many_layers_are_given_back_too() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    counting = Counting(3, 1)
    d = nn.Sequential(*[nn.Identity() for _ in range(1100)], counting).to(DEVICE, torch.float64)
    optimizer = torch.optim.SGD(d.parameters(), 0.3)
    UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)(fakes(), randn(5, 3))
    assert counting.calls == 0
