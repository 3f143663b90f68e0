"""More misuse, and a check that every refusal and warning of the library is provoked somewhere."""

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unroll
from tests.players import batches, with_options
from tests.settings import DEVICE
from tests.snapshot import changes, snapshot
from tests.test_errors import ROWS, Rounding, Row, forward, game, giving, linear, sgd
from unroll import R2, Minimax
from unroll._inspection import DETACHED_FAKES

SOURCES = Path(unroll.__file__).parent
# Refusals that need several processes or layers of their own: words, and the file that has both.
ELSEWHERE = {
    "sharded by FSDP": "test_ranks.py",
    "all ranks must take the same": "test_ranks.py",
    "SyncBatchNorm": "test_ranks.py",
    "scale_grad_by_freq": "zoo_refused.py",
    "masked cannot": "test_transformations.py",
    "quantised": "test_zoo.py",
    "runs uncompiled": "test_compile.py",
    "result is off by": "test_compile.py",
    "draws other random numbers": "test_compile.py",
    "first derivatives only": "test_compile.py",
    "though not in its own type": "test_self_check.py",
    "must hold an optimizer": "test_check_step.py",
    "must be your update": "test_check_step.py",
    "must hold objects": "test_check_step.py",
    "must be a subclass": "test_rules.py",
    "must be a function": "test_rules.py",
    "new_parameters, ": "test_rules.py",
    " parameters that it was given": "test_rules.py",
    "the group as dicts": "test_rules.py",
    "keep the shape and type": "test_rules.py",
    "left without a graph": "test_rules.py",
    "a list must hold": "test_several.py",
    "different parameters": "test_several.py",
    "share memory": "test_moving.py",
    "shares memory": "test_moving.py",
    "PyTorch's derivative of": "test_autograd_fixes.py",
    "must hold a floating-point tensor": "test_checks.py",
    "register_multi_grad_hook": "test_moving.py",
    "compiled generator": "test_checks.py",
    "the update uses D's parameter": "test_projections.py",
    "Keep locks": "test_self_check.py",
    "keeps state in": "test_transformations.py",
    "the optimizer trains tensors": "test_unregistered.py",
    "change its input in place": "test_in_place.py",
    "cannot be assigned": "test_loss.py",
}
CAUGHT = {  # raised to be caught by the library itself
    *("a derivative is not implemented", "no labels"),
    *("nothing here has a derivative", "torch.compile is switched off"),
}


class Doubled(nn.Module):
    """A D whose layer has a wrapped norm in its middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 4), middle, nn.Linear(4, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.middle(self.first(x)).tanh())
        return output


class Checkpointing(Doubled):
    """A D that saves memory by running its middle again."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.middle, self.first(x), use_reentrant=False)
        output: Tensor = self.head(hidden.tanh())
        return output


def _closed_over(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    """Call with an objective that decays a weight that it keeps, not that of the D it is given."""
    d, weight = loss.discriminator, loss.discriminator.get_parameter("weight")
    objective = game(
        lambda given, fake, real: (
            Minimax().discriminator_loss(given, fake, real) + weight.square().sum()
        )
    )()["objective"]
    return unroll.UnrolledGeneratorLoss(d, loss.optimizer, objective, unroll_steps=2)(fake, real)


def _twice(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    (gradient,) = torch.autograd.grad(loss(fake, real), fake, create_graph=True)
    return gradient


def _counting() -> Callable[..., Tensor]:
    """Return a loss whose weight grows from call to call."""
    weight = iter(range(1, 100))
    return lambda d, fake, real: next(weight) * Minimax().discriminator_loss(d, fake, real)


def _foreign(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    scale = torch.ones(1, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def scaled(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: p * scale for n, p in theta.items()}

    return with_options(loss, project=scaled)(fake, real)


def _terms(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    return unroll.gradient_terms(loss, fake, real, [fake])


def _terms_under_no_grad(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    with torch.no_grad():
        return unroll.gradient_terms(loss, fake, real, [fake])


def _outside_autograd(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    for p in theta.values():
        p.data.clamp_(-0.01, 0.01)
    return theta


def _hooked() -> nn.Module:
    d = linear()
    d.get_parameter("weight").register_hook(lambda g: g.detach().clamp(-0.1, 0.1))
    return d


class Listing(nn.Module):
    """A D that keeps its buffer in a list, too, and changes it there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(1))
        self.to(DEVICE, torch.float64)
        self.counts = [self.get_buffer("count")]

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0].add_(1)
        output: Tensor = self.layer(x)
        return output


def _refilled(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    buffer = real.clone()
    return loss(fake, real, minibatches=((fake, buffer.add_(1)) for _ in range(2)))


class OwnStep(torchopt.Optimizer):
    """Clips before its step, which the look-ahead would not see."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def _repeated(d: nn.Module, build: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return build([*d.parameters(), next(d.parameters())], 0.1)


MORE: dict[str, Row] = {
    "an own step of a torchopt optimizer": Row(
        TypeError,
        r"optimizer: OwnStep overrides the step of torchopt's Optimizer.*Put what it does",
        optimizer=lambda d: OwnStep(list(d.parameters()), torchopt.sgd(0.1)),
    ),
    **{
        f"a parameter twice, {build}": Row(
            ValueError,
            r"optimizer: must hold every parameter once; it has 'weight' several times.*Pass the",
            optimizer=lambda d, build=build: _repeated(d, build),  # type: ignore[misc]
        )
        for build in (torch.optim.SGD, torchopt.SGD)
    },
    "a gradient hook that detaches": Row(
        ValueError,
        r"discriminator, a gradient hook: must be differentiable; it changed 'weight' outside auto",
        d=_hooked,
    ),
    "a buffer in a list": Row(
        RuntimeError,
        r"discriminator: the buffer 'count' is changed in a list.*a copy\. Change the buffer",
        d=Listing,
    ),
    "a buffer that minibatches fill again": Row(
        ValueError,
        r"minibatches: must yield tensors of their own.*item 0 was changed.*Yield clones",
        call=_refilled,
    ),
    "D complex": Row(
        TypeError,
        r"discriminator: parameter 'weight' is complex.*does not support\. Store its real and",
        d=lambda: nn.Linear(4, 1, dtype=torch.complex128),
    ),
    "D on meta": Row(
        ValueError,
        r"discriminator: parameter 'weight' is on the meta device.*to_empty",
        d=lambda: nn.Linear(4, 1, device="meta"),
    ),
    "a layer without the derivative": Row(
        RuntimeError,
        r"discriminator: .*needs a derivative.*middle \(Hardsigmoid\).*fused.*stop_gradient",
        d=lambda: Doubled(nn.Hardsigmoid()),
    ),
    "activation checkpointing in D": Row(
        RuntimeError,
        r"discriminator: activation checkpointing.*wrong gradient.*Switch torch\.utils\.checkpoint",
        d=lambda: Checkpointing(nn.Linear(4, 4)),
    ),
    "objective with D's own parameters": Row(
        RuntimeError,
        r"discriminator, objective: the loss uses D's parameter 'weight' other than.*Call the",
        call=_closed_over,
    ),
    **{
        f"{argument} {what}": Row(
            ValueError,
            rf"^{argument}: must be differentiable; it changed .weight. outside.*Use p\.clamp",
            options=giving(argument, function),
        )
        for argument in ("project", "transform_gradients")
        for what, function in {
            "outside autograd": _outside_autograd,
            "detaches": lambda theta: {n: p.detach() for n, p in theta.items()},
        }.items()
    },
    "penalty on fakes without a floating tensor": Row(
        TypeError,
        r"fake: a gradient penalty needs a floating-point tensor.*got .*Leave the penalty out",
        d=Rounding,
        options=lambda: {"objective": R2(1.0) + Minimax(), "stop_gradient": True},
        call=lambda loss, fake, real: loss(fake.detach().round().long(), real),
    ),
    "checkpoint differentiated twice": Row(
        RuntimeError,
        r"checkpoint: f_K has first derivatives only.*create_graph=True.*Set checkpoint=False",
        options=lambda: {"checkpoint": True},
        call=_twice,
    ),
    "checkpoint with a tensor of one's own": Row(
        RuntimeError,
        r"checkpoint: .*no part of the batch \(shape \(1,\).*set checkpoint=False",
        options=lambda: {"checkpoint": True},
        call=_foreign,
    ),
    "checkpoint of a step that does not repeat itself": Row(
        RuntimeError,
        r"checkpoint: a look-ahead step must give the same result.*buffers differ.*Register",
        options=lambda: {"checkpoint": True, **game(_counting())()},
    ),
    "sync a string": Row(
        TypeError,
        r"sync: must be True, False or None; got 'yes'\. None averages",
        options=lambda: {"sync": "yes"},
    ),
    "sync without processes": Row(
        ValueError,
        r"sync: must not be True without a process group.*init_process_group",
        options=lambda: {"sync": True},
    ),
    "gradient_terms of a first term": Row(
        ValueError,
        r"loss: must have stop_gradient=False.*Make the loss with stop_gradient=False",
        options=lambda: {"stop_gradient": True},
        call=_terms,
    ),
    "gradient_terms without gradients": Row(
        RuntimeError,
        r"gradient_terms: must run with gradients on; it was called under torch\.no_grad\(\)",
        call=_terms_under_no_grad,
    ),
    "gradient_terms of detached fakes": Row(
        ValueError,
        r"fake: must carry the generator's graph",
        call=lambda loss, fake, real: _terms(loss, fake.detach(), real),
    ),
}


def provoked(row: Row) -> tuple[Exception, list[str]]:
    """Return what a row raises, and what changed by it."""
    d = row.d()
    optimizer = row.optimizer(d)
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    before = snapshot(d, optimizer, fake, real)
    with pytest.raises(row.kind, match=re.compile(row.message, re.DOTALL)) as raised:
        loss = unroll.UnrolledGeneratorLoss(d, optimizer, **{"unroll_steps": 2} | row.options())
        (row.call or forward)(loss, fake, real)
    return raised.value, changes(before, d, optimizer, fake, real)


@pytest.mark.parametrize("name", MORE)
def test_refusals(name: str) -> None:
    error, changed = provoked(MORE[name])
    assert type(error).__module__ == "builtins"
    assert not changed


def usable_again(name: str) -> bool:
    """Whether a refused call leaves a loss behind that can be called as it should be."""
    return name.split()[0] in {"fake", "fake_k", "no", "too", "minibatches", "K", "inference"}


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.call and usable_again(n)])
def test_the_next_call_is_as_if_none_had_been_refused(name: str) -> None:
    """The value and the gradient of a loss that has refused a call, to the last bit."""
    row = ROWS[name]
    d = row.d()
    optimizer = row.optimizer(d)
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    results = []
    for refuse in (False, True):
        loss = unroll.UnrolledGeneratorLoss(d, optimizer, **{"unroll_steps": 2} | row.options())
        k = loss.unroll_steps
        if refuse:
            assert row.call is not None
            with pytest.raises(row.kind):
                row.call(loss, fake, real)
            loss.unroll_steps = k
        value = loss(fake, real)
        results.append((value, *torch.autograd.grad(value, fake)))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


# --- warnings, and every refusal there is ---------------------------------------------------------


def _sigmoid() -> None:
    d = nn.Sequential(linear(), nn.Sigmoid())
    ((fake, real),) = batches(1)
    unroll.UnrolledGeneratorLoss(d, sgd(d), unroll_steps=1)(fake.requires_grad_(), real)


def _step_hook() -> None:
    d = linear()
    optimizer = sgd(d)
    optimizer.register_step_post_hook(lambda *_: None)
    unroll.UnrolledGeneratorLoss(d, optimizer, unroll_steps=1)


def _detaching() -> None:
    d = linear()
    ((fake, real),) = batches(1)
    options = game(lambda d, fake, real: Minimax().discriminator_loss(d, fake.detach(), real))()
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), **options, unroll_steps=1)
    loss(fake.requires_grad_(), real)


def _accumulation_hook() -> None:
    d, ((fake, real),) = linear(), batches(1)
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), unroll_steps=1)
    for p in d.parameters():
        p.register_post_accumulate_grad_hook(lambda _: None)
    loss.unroll(fake, real)


WARNINGS: dict[str, Callable[[], None]] = {
    r"^discriminator: returns what comes out of a sigmoid.*Remove": _sigmoid,
    r"^optimizer: has step hooks.*do it in project=": _step_hook,
    r"^discriminator: parameters have post-accumulate-grad hooks.*register_hook": (
        _accumulation_hook
    ),
    re.escape(DETACHED_FAKES): _detaching,
}


@pytest.mark.parametrize("message", WARNINGS)
def test_warnings(message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        WARNINGS[message]()
    assert len(caught) == 1


def _written() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield where the library refuses or warns, with a pattern of what it says there."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Raise, ast.Call)):
                continue
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            warns = getattr(call.func, "attr", getattr(call.func, "id", "")) == "warn"
            text = call.args[0]
            if not (warns or isinstance(node, ast.Raise)) or isinstance(text, (ast.Name, ast.Call)):
                continue  # a constant or a function of its own: they are called by name elsewhere
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            pattern = "".join(
                re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
                for part in parts
            )
            yield f"{path.relative_to(SOURCES)}:{node.lineno}", re.compile(pattern, re.DOTALL)


def test_every_refusal_has_a_row() -> None:
    said = []
    for row in [*ROWS.values(), *MORE.values()]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said.append(str(provoked(row)[0]))
    for warning in WARNINGS.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warning()
        said.extend(str(w.message) for w in caught)
    tests = Path(__file__).parent
    for words, file in ELSEWHERE.items():
        assert words in (tests / file).read_text(), f"{file} no longer provokes {words!r}"
    places = list(_written())
    assert len(places) >= 40
    silent = [
        f"{place}: {pattern.pattern[:80]}"
        for place, pattern in places
        if not any(pattern.fullmatch(text) for text in said)
        and not any(words in pattern.pattern.replace("\\", "") for words in {*ELSEWHERE, *CAUGHT})
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("name", [*ROWS, *MORE])
def test_messages_name_the_argument_and_end_in_advice(name: str) -> None:
    """``argument[, argument]: what must hold; what came. What to do.``"""
    text = str(provoked((ROWS | MORE)[name])[0])
    assert re.match(r"[a-z_D][\w, ]*: \S", text) or text.startswith("UnrolledGeneratorLoss: ")
    assert text.endswith(".")


# --- errors of the user's own ---------------------------------------------------------------------


class MineError(Exception):
    """An error whose constructor cannot be called again by whoever would wrap it."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{detail} {code}")


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("place", ["forward", "objective", "project", "optimizer"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_errors_of_ones_own_keep_their_traceback(place: str, at: int, checkpointed: bool) -> None:
    """At any step: the very object, and its traceback ends in the line that raised it."""
    calls = SimpleNamespace(forward=0, objective=0, project=0, optimizer=0)
    error = MineError(7, detail="broken")

    def here(name: str) -> None:
        count = getattr(calls, name) + 1
        setattr(calls, name, count)
        if name == place and count == at:
            raise error

    class D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: Tensor) -> Tensor:
            here("forward")
            output: Tensor = self.layer(x)
            return output

    class Own:
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            here("objective")
            return Minimax().discriminator_loss(d, fake, real)

        generator_loss = Minimax().generator_loss

    def project(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        here("project")
        return theta

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        here("optimizer")
        return inner.update(updates, state, params=params, inplace=inplace)

    inner = torchopt.sgd(0.1)
    bare = torchopt.base.GradientTransformation(inner.init, update)
    d = D()
    ((fake, real),) = batches(1)
    options: dict[str, Any] = {"unroll_steps": 3, "project": project, "checkpoint": checkpointed}
    loss = unroll.UnrolledGeneratorLoss(d, bare, Own(), **options)
    before = snapshot(d)
    with pytest.raises(MineError, match="broken 7") as raised:
        loss(fake.requires_grad_(), real)
    assert raised.value is error
    assert raised.value.__cause__ is None
    assert [frame.name for frame in raised.traceback][-2:] == [
        {"optimizer": "update", "objective": "discriminator_loss"}.get(place, place),
        "here",
    ]
    assert not changes(before, d)
    loss(fake, real)
