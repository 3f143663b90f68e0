"""``compile=True``: the eager gradient, from one piece of code for all K, or eager with a warning.

Most tests trace and differentiate as a compilation does, but run the graphs as they are; those
marked by ``generated`` have Inductor generate code.
"""

import copy
import gc
import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unroll
from tests.games import OBJECTIVES, Squared, normalised_discriminator
from tests.players import OPTIMIZERS, batches, fakes, small, tanh_net, train
from tests.settings import DEVICE, OLDEST, randn
from tests.snapshot import changes, snapshot
from tests.test_state import Lazy
from tests.zoo import ZOO
from tests.zoo_layers import Cubed
from unroll import UnrolledGeneratorLoss, gradient_terms
from unroll._functional import map_tensors
from unroll._look_ahead import inner_step
from unroll._modes import backend, compiled, decompositions
from unroll._modes.comparison import compare
from unroll._random import random_state

pytestmark = pytest.mark.plain  # one test below has both options

compilations: list[int] = []  # numbers of nodes


def as_it_is(graph: Any, _: Any, *, is_backward: bool) -> Any:  # noqa: ARG001
    """Run a graph without generating code for it, in place of :func:`backend.generated`."""
    return lambda inputs: graph(*inputs)


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compilations.clear()
    inner = backend.compiled_step

    def counted(graph: Any, inputs: Any) -> Any:
        compilations.append(len(graph.graph.nodes))
        return inner(graph, inputs)

    monkeypatch.setattr(compiled, "compiled_step", counted)
    if not request.node.get_closest_marker("generated"):
        monkeypatch.setattr(backend, "generated", as_it_is)
    yield
    torch._dynamo.reset()


generated = pytest.mark.generated


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def both(
    d: nn.Module, optimizer: Any, run: Callable[[UnrolledGeneratorLoss], Any], **options: Any
) -> tuple[Any, Any]:
    """Return what ``run`` gives with the eager loss and with the compiled one."""
    before, results = snapshot(d, optimizer), []
    for compile in (False, True):
        torch.manual_seed(5)
        loss = UnrolledGeneratorLoss(d, optimizer, compile=compile, **options)
        results.append((run(loss), torch.get_rng_state()))
    (eager, state), (fast, other_state) = results
    assert torch.equal(state, other_state), "the random numbers went apart"
    assert not changes(before, d, optimizer)
    return eager, fast


def assert_close(got: Any, wanted: Any, tolerance: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        error = (a - b).double().norm() / b.double().norm().clamp_min(1e-4)
        assert error <= tolerance, f"off by {error:.1e}"


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Tanh(), nn.Linear(5, 1)).to(
        DEVICE, torch.float64
    )


def head(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a D of one layer, traced in half of the time, where the test is not of D's layers."""
    return nn.Sequential(nn.Linear(4, 1), nn.Tanh()).to(DEVICE, dtype)


def value_and_gradients(loss: UnrolledGeneratorLoss, calls: int = 2) -> list[Tensor]:
    """Return f_K and its gradient in all fakes, of two calls with re-sampled minibatches."""
    found = []
    for _ in range(calls):
        pairs = batches(loss.unroll_steps + 1)
        fakes = [leaf(fake) for fake, _ in pairs]
        again = zip(fakes[1:], [real for _, real in pairs[1:]], strict=True)
        value = loss(fakes[0], pairs[0][1], minibatches=again)
        found += [value, *torch.autograd.grad(value, fakes)]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "Adam", "Adam amsgrad", "Adam tensor lr", "AdamW amsgrad", "SGD nesterov",
        "RMSprop centered", "Adagrad", "Adadelta", "Adamax", "NAdam decoupled",
        "torchopt.SGD dampening", "torchopt.MetaAdam",
    ],
)  # fmt: skip
def test_every_kind_of_optimizer(name: str) -> None:
    d = head()
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, batches(2, seed=1))
    eager, fast = both(d, optimizer, value_and_gradients, unroll_steps=3)
    assert_close(fast, eager, 1e-12)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "name",
    [
        "in-place LeakyReLU, conv", "BatchNorm1d", "GroupNorm", "spectral norm", "dropout",
        "attention, weights", "conditional, mapping", "many outputs", "unused parameters",
        "frozen backbone", "changing buffers, in place", "projection, mapping, R1",
        "weight norm + R1", "spectral norm + R1", "BatchNorm2d + WGAN-GP",
    ],
)  # fmt: skip
def test_every_kind_of_discriminator(name: str) -> None:
    animal = ZOO[name]
    d = animal.make()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.9))
    draws = randn(4, 5, *animal.shape)
    train(d, optimizer, [(animal.feed(draws[0]), animal.feed(draws[1]))], animal.objective)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        found = []
        for _ in range(2):
            fake, real = leaf(draws[2]), leaf(draws[3])
            value = loss(animal.feed(fake), animal.feed(real))
            found += [value, *torch.autograd.grad(value, (fake, real))]
        return found

    eager, fast = both(d, optimizer, run, objective=animal.objective, unroll_steps=3)
    assert_close(fast, eager, 1e-12)
    # The state of parameters that take no steps is apart from the first step on.
    assert len(compilations) == (2 if name == "unused parameters" else 1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("hinge", small), ("bce", head), ("average", small), ("pairing+r1+r2", normalised),
        ("wasserstein+gp", normalised), ("own", head),
    ],
)  # fmt: skip
def test_every_kind_of_objective(name: str, make: Callable[[], nn.Module]) -> None:
    d = make()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.5)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        return value_and_gradients(loss, calls=1)

    # The first two steps are eager: a momentum's first has no state yet.
    eager, fast = both(d, optimizer, run, objective=OBJECTIVES[name], unroll_steps=3)
    assert_close(fast, eager, 1e-12)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"average": True},
        {"stop_gradient": True},
        {"checkpoint": True},
        {"project": lambda theta: {name: p.clamp(-0.3, 0.3) for name, p in theta.items()}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option(options: dict[str, Any]) -> None:
    d = small()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    ((fake, real),) = batches(1)
    train(d, optimizer, batches(2, seed=1))

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        found = []
        for _ in range(2):
            x = leaf(fake)
            value = loss(x, real)
            found += [value, *torch.autograd.grad(value, x)]
            with torch.no_grad():
                found.append(loss(x, real))
        ahead = loss.unroll(fake, real)
        return [*found, *ahead.parameters.values(), ahead.losses, ahead(real)]

    eager, fast = both(d, optimizer, run, unroll_steps=3, **options)
    assert_close(fast, eager, 1e-12)
    assert 1 <= len(compilations) <= 3  # with gradients, without, and without those of fakes


@pytest.mark.parametrize("argument", ["project", "transform_gradients"])
def test_a_function_that_cannot_be_traced_runs_as_it_is(argument: str) -> None:
    def halved_if_large(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t / 2 if t.norm().item() > 0.1 else t for n, t in found.items()}

    d = head()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    train(d, optimizer, batches(2, seed=1))
    options: Any = {argument: halved_if_large}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, fast = both(d, optimizer, value_and_gradients, unroll_steps=3, **options)
    assert_close(fast, eager, 1e-12)
    assert len(compilations) == 1  # D's gradients


def test_central_differences() -> None:
    d = normalised_discriminator().to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    fake, real = randn(6, 2), randn(6, 2)
    train(d, optimizer, [(fake, real)])
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, compile=True)
    loss(leaf(fake), real)
    assert torch.autograd.gradcheck(lambda x: loss(x, real), leaf(fake), fast_mode=True)
    assert compilations


def test_the_two_terms_and_a_graph_that_is_kept() -> None:
    d, generator = head(), nn.Linear(3, 4).to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    ((_, real),) = batches(1)
    z = randn(5, 3)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        fake = generator(z)
        first, second = gradient_terms(loss, fake, real, generator.parameters())
        value = loss(fake, real)
        whole = [
            torch.autograd.grad(value, list(generator.parameters()), retain_graph=True)
            for _ in range(2)
        ]
        return [*first, *second, *whole[0], *whole[1]]

    eager, fast = both(d, optimizer, run, unroll_steps=3)
    assert_close(fast, eager, 1e-12)


def test_code_serves_all_steps_learning_rates_and_data() -> None:
    d = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    other = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    pairs = batches(6)
    train(d, optimizer, pairs[:1])

    def check() -> None:
        fake, real = pairs.pop()
        x, y = leaf(fake), leaf(fake)
        (a,) = torch.autograd.grad(loss(x, real), x)
        (b,) = torch.autograd.grad(other(y, real), y)
        assert_close([a], [b], 1e-12)

    check()
    assert len(compilations) == 1
    optimizer.param_groups[0]["lr"] = 0.02
    check()
    loss.unroll_steps = other.unroll_steps = 7
    check()
    train(d, optimizer, pairs[:1])  # the step count
    check()
    assert len(compilations) == 1
    d.eval()
    check()
    optimizer.param_groups[0]["betas"] = (0.3, 0.9)
    check()
    assert len(compilations) > 1


def test_every_loss_has_code_of_its_own() -> None:
    for size in (3, 4, 5):
        d = nn.Linear(size, 1)
        optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, compile=True)
        loss(torch.randn(size, size, requires_grad=True), torch.randn(size, size))
        train(d, optimizer, [(torch.randn(size, size), torch.randn(size, size))])
        loss(torch.randn(size, size, requires_grad=True), torch.randn(size, size))
    assert len(compilations) == 3


def test_a_change_in_the_discriminator_counts() -> None:
    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.alpha = nn.Linear(4, 1), nn.Linear(4, 1), 0.5

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = (1 - self.alpha) * self.a(x).tanh() + self.alpha * self.b(x).sin()
            return output

    d = Fading().to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    ((fake, real),) = batches(1)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        found = []
        for d.alpha in (0.5, 0.6, 0.7, 0.5):
            x = leaf(fake)
            value = loss(x, real)
            found += [value, *torch.autograd.grad(value, x)]
        return found

    eager, fast = both(d, optimizer, run, unroll_steps=3)
    assert_close(fast, eager, 1e-12)


@pytest.mark.parametrize(
    "what",
    [
        *("betas", "momentum", "number of the objective"),
        *("batch length", "batch length, images", "batch length, dropout"),
    ],
)
def test_numbers_that_change_compile_once_more(what: str) -> None:
    class Balanced(Squared):
        k = 0.0

        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            fakes: Tensor = discriminator(fake).square().mean()
            balanced: Tensor = discriminator(real).square().mean() - self.k * fakes
            return balanced

    d, objective, shape = head(), Balanced(), [4]
    if what == "batch length":
        d = normalised()
    elif what.endswith("images"):
        d, shape = (
            nn.Sequential(*list(image().children())[:3], nn.Flatten(), nn.Linear(16, 1)),
            [1, 4, 4],
        )
    elif what.endswith("dropout"):
        d = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1), nn.Tanh())
    d.to(DEVICE, torch.float64)
    optimizer: Any = torch.optim.Adam(d.parameters(), lr=0.05, betas=(0.5, 0.9))
    if what == "momentum":
        optimizer = torch.optim.SGD(d.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)
    losses = [
        UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=3, compile=compile)
        for compile in (False, True)
    ]
    fake, real = randn(2, 5, *shape)
    train(d, optimizer, [(fake, real)], objective)
    for i in range(3):
        if what == "betas":
            optimizer.param_groups[0]["betas"] = (0.5 + 0.1 * i, 0.9)
        elif what == "momentum":
            optimizer.param_groups[0]["momentum"] = 0.5 + 0.1 * i
        elif what.startswith("batch length"):
            fake, real = randn(2, 6 + i, *shape)
        else:
            objective.k = 0.1 + 0.2 * i
        found = []
        for loss in losses:
            torch.manual_seed(i)
            found.append(torch.autograd.grad(loss(x := leaf(fake), real), x))
        assert_close(found[1], found[0], 1e-12)
    # Where torch cannot trace a length as a symbol (dropout in torch.func), each has its code.
    assert len(compilations) == (3 if what.endswith("dropout") else 2)


def test_a_graph_goes_with_its_value() -> None:
    d = head()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, compile=True)
    ((fake, real),) = batches(1)
    loss(leaf(fake), real)
    x = leaf(fake)
    value, gone = loss(x, real), weakref.ref(x)
    value.backward()
    gc.disable()  # references that run in circles would be found
    try:
        del value, x
        assert gone() is None
    finally:
        gc.enable()


# What falls back.


def falls_back(
    d: nn.Module,
    reason: str,
    optimizer: Any = None,
    change: Callable[[], Any] = lambda: None,
    **options: Any,
) -> None:
    """Check that the result is that of the eager loss, after one warning."""
    optimizer = optimizer or torch.optim.Adam(d.parameters(), lr=0.05)
    change()
    ((fake, real),) = batches(1)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        found = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                x = leaf(fake)
                value = loss(x, real)
                found += [value, *torch.autograd.grad(value, x)]
        messages.append([str(w.message) for w in caught if "uncompiled" in str(w.message)])
        return found

    messages: list[list[str]] = []
    eager, fast = both(d, optimizer, run, unroll_steps=3, **options)
    assert_close(fast, eager, 0.0)
    (none, (message,)) = messages
    assert not none
    assert message.startswith("compile: the look-ahead runs uncompiled, with the same result: ")
    assert reason in message
    assert "\n" not in message


def test_code_that_cannot_be_traced() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)
            return output if output.sum() > 0 else 2 * output

    falls_back(Deciding().to(DEVICE, torch.float64), "ata-dependent")


def test_a_derivative_that_only_the_eager_step_has() -> None:
    d = nn.Sequential(nn.Linear(4, 1), Cubed())
    reason = "must override the setup_context" if OLDEST else "result is off by"
    falls_back(d.to(DEVICE, torch.float64), reason)


def test_random_numbers_in_another_order() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            dropped: Tensor = nn.functional.dropout(2 * self.layer(x).t())
            return dropped.t()

    falls_back(Transposed().to(DEVICE, torch.float64), "or dropout of a transposed tensor?)")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_gradient_that_the_objective_takes(by_hand: bool) -> None:
    class Penalised(Squared):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            x = real.clone().requires_grad_() if by_hand else fake
            (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
            loss: Tensor = super().discriminator_loss(discriminator, fake, real)
            return loss.add(slope.square().mean())

    d = head()
    message = "use unroll.R1, R2 or GradientPenalty, otherwise torch.func.grad"
    falls_back(d, message, objective=Penalised())
    falls_back(d, f"(at {__file__}, line ", objective=Penalised())


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_other_generators_than_torchs_are_given_back(draw: Callable[[], float]) -> None:
    class Drawing(Squared):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            loss: Tensor = super().discriminator_loss(discriminator, draw() * fake, real)
            return loss

    d, ((fake, real),), found = head(), batches(1), []
    for compile in (False, True):
        optimizer = torch.optim.SGD(d.parameters(), lr=0.5)
        loss = UnrolledGeneratorLoss(d, optimizer, Drawing(), unroll_steps=3, compile=compile)
        random.seed(0)
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((loss(leaf(fake), real).item(), draw()))
    assert found[0] == found[1]


def test_what_changes_at_every_call_is_named() -> None:
    class Named(Squared):
        def __init__(self) -> None:
            self.name = "a"

        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            return len(self.name) * super().discriminator_loss(discriminator, fake, real)

    d, objective = head(), Named()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    loss = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=3, compile=True)
    ((fake, real),) = batches(1)
    message = r"this changes from call to call: .*objective\.name =="
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(UserWarning, match=message):
        for objective.name in ("a", "aa", "aaa", "aaaa"):
            loss(leaf(fake), real)


def test_gradient_hooks() -> None:
    d = small()
    next(d.parameters()).register_hook(lambda g: 2 * g)
    falls_back(d, "hooks")


def test_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(backend, "generated", broken)
    falls_back(head(), "no compiler")


def test_the_compiler_is_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    waited: list[Any] = []
    compiler: Any = AsyncCompile
    monkeypatch.setattr(compiler, "wait", lambda _, scope: waited.append(scope))
    before = compiler.wait
    with pytest.raises(OSError, match="no compiler"), backend.compiling_meanwhile():
        compiler.wait(None, "ours")
        assert waited == []
        other = Thread(target=compiler.wait, args=(None, "of another thread"))
        other.start()
        other.join()
        assert waited == ["of another thread"]
        raise OSError("no compiler")
    assert waited == ["of another thread", "ours"]
    assert compiler.wait is before


def test_a_private_name_of_torch_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._functorch.aot_autograd.aot_export_joint_simple")
    falls_back(head(), "cannot import name 'aot_export_joint_simple'")


def test_round_off_in_a_gradient_of_zero_is_no_difference() -> None:
    """A bias before BatchNorm moves by round-off alone, which Adam makes large."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1)
    d = nn.Sequential(*layers).to(DEVICE)
    optimizer = torch.optim.Adam(d.parameters(), lr=1e-3, betas=(0.5, 0.999))
    fake, real = torch.randn(2, 256, 4, device=DEVICE)
    train(d, optimizer, [(fake, real)])
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)
    game, start = loss._start(None)
    step = inner_step(game)
    given = compiled._alike(game, start, (leaf(fake), real), game.optimizer.settings)

    def noisier(point: Any, pair: Any, settings: Any) -> Any:
        following, before = step(point, pair, settings), point.parameters["0.bias"]
        moved = following.parameters["0.bias"] - before
        bias = before + moved.detach() + 100 * (moved - moved.detach())
        return following._replace(parameters={**following.parameters, "0.bias": bias})

    def wrong(point: Any, pair: Any, settings: Any) -> Any:
        return step(point, map_tensors(lambda x: x + 0.01 * (x - x.detach()), pair), settings)

    compare(noisier, step, given, random_state(fake.device), fake.device)
    with pytest.raises(RuntimeError, match="the compiled step's result is off by"):
        compare(wrong, step, given, random_state(fake.device), fake.device)


@pytest.mark.parametrize("wrong", ["value", "derivative"])
def test_a_backend_that_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(graph: Any, inputs: Any, *, is_backward: bool) -> Any:
        code = as_it_is(graph, inputs, is_backward=is_backward)

        def run(given: Any) -> Any:
            factor = 1.01 if is_backward == (wrong == "derivative") else 1.0
            return [
                factor * t if isinstance(t, Tensor) and t.is_floating_point() else t
                for t in code(given)
            ]

        return run

    monkeypatch.setattr(backend, "generated", off)
    d = head()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.5, momentum=0.9)
    train(d, optimizer, batches(1))
    falls_back(d, "result is off by", optimizer)


def test_a_backend_that_draws_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(graph: Any, inputs: Any, *, is_backward: bool) -> Any:
        code = as_it_is(graph, inputs, is_backward=is_backward)
        return lambda given: (torch.rand(1), code(given))[1]

    monkeypatch.setattr(backend, "generated", drawing)
    falls_back(head(), "draws other random numbers")


def test_what_a_user_raises_passes_through() -> None:
    class Moody(Squared):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            if len(fake) == 3:
                raise LookupError("three is too few")
            return super().discriminator_loss(discriminator, fake, real)

    d = head()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.1), Moody(), unroll_steps=2, compile=True
    )
    ((fake, real),) = batches(1)
    loss(leaf(fake), real)
    with pytest.raises(LookupError, match="too few"):
        loss(leaf(fake[:3]), real[:3])
    loss(leaf(fake), real)  # pytest makes the warning that it runs uncompiled an error


def test_first_derivatives_only() -> None:
    d = head()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=2, compile=True
    )
    ((fake, real),) = batches(1)
    x = leaf(fake)
    value = loss(x, real)
    with pytest.raises(RuntimeError, match="compile: f_K has first derivatives only"):
        torch.autograd.grad(value, x, create_graph=True)


def test_complex_samples() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layers(torch.view_as_real(x).flatten(1))
            return output

    d = Parts().to(DEVICE, torch.float64)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    fake, real = torch.complex(*randn(2, 2, 6, 4))
    train(d, optimizer, [(fake, real)])

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        x = leaf(fake)
        value = loss(x, real)
        return [value, torch.view_as_real(*torch.autograd.grad(value, x))]

    eager, fast = both(d, optimizer, run, unroll_steps=3)
    assert_close(fast, eager, 1e-12)
    assert len(compilations) == 1


def test_copies_and_pickles_start_without_code() -> None:
    d = head()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=2, compile=True
    )
    ((fake, real),) = batches(1)
    value = loss(leaf(fake), real)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(leaf(fake), real), value)
    assert "compile=True" in repr(loss)


def test_check_gradients() -> None:
    d = head()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2, compile=True
    )
    ((fake, real),) = batches(1)
    assert unroll.check_gradients(loss, leaf(fake), real).ok


# Generated code.


def planar() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def image() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip


@generated
@pytest.mark.parametrize(
    ("make", "shape", "optimizer"),
    [
        (
            planar,
            (64, 2),
            lambda d: [
                torch.optim.Adam(d[0].parameters(), lr=1e-2, betas=(0.5, 0.999)),
                torch.optim.RMSprop(d[2].parameters(), lr=1e-3),
            ],
        ),
        (image, (8, 1, 4, 4), lambda d: torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)),
    ],
    ids=["planar, Adam and RMSprop", "images with BatchNorm and dropout, SGD"],
)
def test_generated_code(
    make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: Callable[..., Any]
) -> None:
    d = make().to(DEVICE)
    trained_by = optimizer(d)
    draws = torch.randn(12, *shape, device=DEVICE)
    train(d, trained_by, [(draws[i], draws[i + 1]) for i in range(0, 10, 2)])

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        found = []
        for k in (2, 5):
            loss.unroll_steps = k
            x = leaf(draws[10])
            value = loss(x, draws[11])
            found += [value, *torch.autograd.grad(value, x)]
        return found

    eager, fast = both(d, trained_by, run, unroll_steps=2)
    assert_close(fast, eager, 1e-5)
    assert len(compilations) == 1


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("inner", [1, 3, 4, 9])
@pytest.mark.parametrize("columns", [1, 2, 4, 6])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_that_are_written_out(
    rows: int, inner: int, columns: int, batch: tuple[int, ...]
) -> None:
    a, b, bias = randn(*batch, rows, inner), randn(*batch, inner, columns), randn(columns)
    written = decompositions.product(a, b)
    with_bias = decompositions.product_and_bias(bias, a, b)
    if min(rows, inner, columns) > 4:
        assert written is with_bias is NotImplemented
        return
    if DEVICE.type == "cpu":
        torch.testing.assert_close(written, a @ b)
        torch.testing.assert_close(with_bias, a @ b + bias)
    assert decompositions.product(a.half(), b.half()) is NotImplemented
    assert decompositions.product_and_bias(bias, a, b, alpha=2) is NotImplemented


@pytest.mark.parametrize("transposed", [False, True])
def test_the_double_backward_of_a_convolution(transposed: bool) -> None:
    x, weight = randn(2, 4, 7, 7), randn(4, 3, 3, 3) if transposed else randn(6, 2, 3, 3)
    how = ((2, 2), (1, 1), (1, 1), transposed, (0, 0), 2)
    gradient = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *how))
    tangents = (torch.randn_like(x), torch.randn_like(weight), randn(6))
    for given in (tangents, (tangents[0], None, None), (None, tangents[1], None)):
        everything = *given, gradient, weight, x, *how, (True, True, True)
        found = decompositions.convolution_twice(*everything)
        wanted = torch.ops.aten._convolution_double_backward(*everything)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_tanh_over_all_of_float32() -> None:
    every = torch.arange(0, 0x7F800001, 4099, dtype=torch.int64).to(torch.int32)
    x = every.view(torch.float32)  # from 0 to infinity
    wanted = x.double().tanh()
    found = decompositions.tanh(x)
    unit = torch.nextafter(wanted.float(), torch.tensor(2.0)).double() - wanted.float().double()
    assert ((found.double() - wanted).abs() / unit).max() <= 3.0
    assert found.max() == 1
    assert torch.equal(decompositions.tanh(-x), -found)
    assert decompositions.tanh(torch.tensor([torch.nan])).isnan()
    assert decompositions.tanh(x.double()) is NotImplemented


def test_the_first_call_has_the_bits_of_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(graph: Any, _: Any, *, is_backward: bool) -> Any:  # noqa: ARG001
        """Run a graph so that it rounds otherwise than the eager step."""

        def run(inputs: Any) -> list[Any]:
            found: list[Any] = list(graph(*inputs))
            floats = [torch.is_tensor(t) and t.is_floating_point() for t in found]
            return [t * (1 + 1e-6) if f else t for t, f in zip(found, floats, strict=True)]

        return run

    monkeypatch.setattr(backend, "generated", rounding)
    d, ((fake, real),) = head(torch.float32), batches(1, torch.float32)
    optimizer = torch.optim.Adam(d.parameters(), 0.01)
    train(d, optimizer, batches(2, torch.float32))
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, compile=True)
    first, second = (loss(leaf(fake), real) for _ in range(2))
    assert torch.equal(first, second)
    assert len(compilations) == 1


def difference(fast: Any, eager: Any, fake: Tensor, real: Tensor) -> float:
    found, wanted = (torch.autograd.grad(loss(fake, real), fake)[0] for loss in (fast, eager))
    return float((found - wanted).norm() / wanted.norm())


def test_a_compiled_step_knows_of_hooks_that_come_later() -> None:
    d, real, fake = tanh_net(), randn(5, 3), fakes()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    eager = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    fast = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    for _ in range(2):
        assert difference(fast, eager, fake, real) < 1e-10
    handles = [
        d[0].register_forward_hook(lambda _, __, out: 2 * out),
        d.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
    ]
    assert difference(fast, eager, fake, real) < 1e-10
    for handle in handles:
        handle.remove()
    assert difference(fast, eager, fake, real) < 1e-10
    everywhere = nn.modules.module.register_module_forward_hook(lambda _, __, out: 2 * out)
    try:
        with pytest.warns(UserWarning, match="runs uncompiled.*hooks of all modules"):
            assert difference(fast, eager, fake, real) < 1e-10
    finally:
        everywhere.remove()


def test_a_compiled_step_serves_a_d_with_parameters_that_get_no_gradient() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = tanh_net(), nn.Linear(3, 1)
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x)
            return output

    d, real, fake = Headed(), randn(5, 3), fakes()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    eager = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    fast = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    for _ in range(3):  # pytest makes the warning that it runs uncompiled an error
        assert difference(fast, eager, fake, real) < 1e-10


def test_a_compiled_step_leaves_buffers_that_come_and_go_to_the_eager_one() -> None:
    d, real, fake = Lazy(), randn(5, 3), fakes()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    eager = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    fast = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    with pytest.warns(UserWarning, match="runs uncompiled.*makes or drops a buffer"):
        assert difference(fast, eager, fake, real) == 0


def test_the_loss_runs_inside_a_compiled_training_step() -> None:
    d, real, fake = tanh_net(), randn(5, 3), fakes()
    loss = UnrolledGeneratorLoss(d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        value: Tensor = loss(x * 1.0, real) * 2
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks at the .grad of tensors that have none
        found = step(fake)
    torch.testing.assert_close(found, 2 * loss(fake, real))


class Averaging(nn.Module):
    """A D with a moving average in an attribute, which is state that no step carries."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mean = nn.Linear(4, 1), torch.zeros((), device=DEVICE)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean()
        return y * (1 + self.mean)


class InPlace(Averaging):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(0.1)
        y: Tensor = self.layer(x) * (1 + self.mean.clone())
        return y


class Numbered(Averaging):
    """A D with a lazy regulariser."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x)
        return 2 * y if self.calls % 3 == 0 else y


@pytest.mark.parametrize("make", [Averaging, InPlace, Numbered])
def test_state_in_attributes_is_left_to_the_eager_step(make: Callable[[], nn.Module]) -> None:
    falls_back(make(), "keeps state in attributes")


def test_state_of_an_objective_is_left_to_the_eager_step() -> None:
    class LeCam(Squared):
        def __init__(self) -> None:
            self.mean = torch.zeros((), device=DEVICE, dtype=torch.float64)

        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * discriminator(fake).detach().mean()
            distance: Tensor = (discriminator(real) - self.mean).square().mean()
            return super().discriminator_loss(discriminator, fake, real) + distance

    d, ((fake, real),), own = head(), batches(1), LeCam()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    fast, eager = (
        UnrolledGeneratorLoss(d, optimizer, own, unroll_steps=3, compile=compiled)
        for compiled in (True, False)
    )
    with pytest.warns(UserWarning, match="keeps state in attributes"):
        values = [fast(leaf(fake), real) for _ in range(2)]
    assert values == [eager(leaf(fake), real)] * 2


def test_what_d_notes_at_every_call_is_no_state() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tanh_net()
            self.features: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.features = [self.net[0](x)]
            self.size = x.shape
            output: Tensor = self.net(x)
            return output

    d, real, fake = Noting(), randn(5, 3), fakes()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    eager = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    fast = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    for _ in range(2):  # pytest makes the warning that it runs uncompiled an error
        assert difference(fast, eager, fake, real) < 1e-10


def test_another_form_of_batch_may_reach_other_parameters() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.labels = nn.Linear(4, 1), nn.Embedding(3, 1)
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            output: Tensor = self.layer(x)
            return output if y is None else output + self.labels(y)

    d, ((fake, real),) = Conditional(), batches(1)
    y = torch.arange(len(fake), device=DEVICE) % 3
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    eager = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    fast = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, compile=True)
    for labelled in (False, True, True):
        found = []
        for loss in (fast, eager):
            x = leaf(fake)
            batch = ((x, y), (real, y)) if labelled else (x, real)
            found.append(loss(*batch))
        torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_max_pooling_is_compiled() -> None:
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 1))
    d = nn.Sequential(*layers).to(DEVICE, torch.float64)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    fake, real = leaf(randn(4, 1, 4, 4)), randn(4, 1, 4, 4)
    found, modes = [], list[dict[str, Any]](({}, {"compile": True}))
    for options in modes:
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, **options)
        (gradient,) = torch.autograd.grad(loss(fake, real), fake)
        found.append(gradient)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert compilations
