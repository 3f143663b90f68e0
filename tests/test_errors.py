"""Every refusal names the argument, the rule, what came and the fix, and changes nothing."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import unroll
from tests.players import batches
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.zoo_layers import Tied
from unroll import R1, Criterion, GradientPenalty, Minimax, RelativisticPairing


def linear() -> nn.Module:
    """Return the D of most rows."""
    return nn.Linear(4, 1).to(DEVICE, torch.float64)


def sgd(d: nn.Module) -> Any:
    """Return the optimizer of most rows."""
    return torch.optim.SGD(d.parameters(), lr=0.1)


@dataclass(frozen=True)
class Row:
    """A misuse: what is made, how it is called, and what the message says."""

    kind: type[Exception]
    message: str  # matched with DOTALL, as written
    d: Callable[[], nn.Module] = linear
    optimizer: Callable[[nn.Module], Any] = sgd
    options: Callable[[], dict[str, Any]] = dict
    call: Callable[[unroll.UnrolledGeneratorLoss, Tensor, Tensor], object] | None = None


def forward(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    """Call the loss as usual."""
    return loss(fake, real)


def pairs(count: int) -> Callable[..., object]:
    """Return a call with so many minibatches."""
    return lambda loss, fake, real: loss(fake, real, minibatches=[(fake, real)] * count)


def game(
    discriminator_loss: Callable[[Any, Any, Any], Any],
    generator_loss: Callable[[Any, Any, Any], Any] | None = None,
) -> Callable[[], dict[str, Any]]:
    """Return options with an objective made of functions."""

    class Own:
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Any:
            return discriminator_loss(d, fake, real)

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Any:
            return (generator_loss or discriminator_loss)(d, fake, real)

    return lambda: {"objective": Own()}


def giving(argument: str, value: Any) -> Callable[[], dict[str, Any]]:
    """Return options with one argument."""
    return lambda: {argument: value}


class Mutating(nn.Module):
    """A D that clips its own weight in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.01, 0.01)  # type: ignore[operator]
        with torch.no_grad():
            self.layer.weight.mul_(0.5)  # type: ignore[operator]
        output: Tensor = self.layer(x)
        return output


class MutatingData(Mutating):
    """The same through ``.data``, which leaves no trace in autograd."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.01, 0.01)  # type: ignore[operator]
        output: Tensor = self.layer(x)
        return output


class MaxNorm(nn.Module):
    """An embedding that renormalises its weight in its forward pass."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, **options)
        self.head = nn.Linear(4, 1)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x + self.embed(torch.arange(len(x), device=x.device)))
        return output


class TwoOutputs(nn.Module):
    """A D with a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(x)


class Custom(torch.optim.Adam):
    """An optimizer with a step of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do something else."""


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.script(linear())


def _inference(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    with torch.inference_mode():
        return loss(fake, real)


def _unroll_in_inference(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
    with torch.inference_mode():
        return loss.unroll(fake, real)


def _state(state: Callable[[nn.Module], Any]) -> Callable[..., object]:
    return lambda loss, fake, real: loss(fake, real, optimizer_state=state(loss.discriminator))


def _changed_k(k: Any) -> Callable[..., object]:
    def call(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> object:
        loss.unroll_steps = k
        return loss(fake, real)

    return call


def _lone(*parts: Any) -> Callable[..., object]:
    """Return a call with minibatches whose items are given."""
    return lambda loss, fake, real: loss(fake, real, minibatches=parts)


def _inferred(fake: Tensor) -> Tensor:
    with torch.inference_mode():
        return fake * 2


TOO_FEW = r"minibatches: .*each of the 2 look-ahead steps; only {0} came.*unroll_steps={0}"
NOT_A_PAIR = r"minibatches: must yield \(fake, real\) pairs; item 0 is a {}.*Yield"
NO_PATH = r"fake: must carry the generator's graph.*requires a gradient.*stop_gradient=True"
ROWS: dict[str, Row] = {
    "K negative": Row(
        ValueError,
        r"unroll_steps: must be at least 0; got -1\. Use 0",
        options=lambda: {"unroll_steps": -1},
    ),
    "K a float": Row(
        TypeError,
        r"unroll_steps: must be an int.*got 2\.0 \(float\)\. Use int\(",
        options=lambda: {"unroll_steps": 2.0},
    ),
    "K a bool": Row(
        TypeError, r"unroll_steps: must be an int.*got True", options=lambda: {"unroll_steps": True}
    ),
    "K a string": Row(
        TypeError, r"unroll_steps: must be an int.*got '5'", options=lambda: {"unroll_steps": "5"}
    ),
    "K set to a negative later": Row(
        ValueError, r"unroll_steps: must be at least 0; got -3", call=_changed_k(-3)
    ),
    "K set to None later": Row(
        TypeError, r"unroll_steps: must be an int.*got None", call=_changed_k(None)
    ),
    "D a function": Row(
        TypeError,
        r"discriminator: must be an nn\.Module; got function\. Pass the module",
        d=lambda: (lambda x: x),  # type: ignore[arg-type, return-value]
        optimizer=lambda _: torchopt.sgd(0.1),
    ),
    "D a class": Row(
        TypeError,
        r"discriminator: must be an nn\.Module; got type",
        d=lambda: nn.Linear,  # type: ignore[arg-type, return-value]
        optimizer=lambda _: torchopt.sgd(0.1),
    ),
    "D without parameters": Row(
        ValueError,
        r"discriminator: must have parameters.*Flatten has none.*Pass the module",
        d=nn.Flatten,
        optimizer=lambda _: torchopt.sgd(0.1),
    ),
    "D lazy": Row(
        ValueError,
        r"discriminator: parameter 'weight' is not initialised.*Run one batch",
        d=lambda: nn.LazyLinear(1),
    ),
    "D scripted": Row(
        TypeError, r"discriminator: a torch\.jit module.*Pass the nn\.Module", d=_scripted
    ),
    "D partly scripted": Row(
        TypeError,
        r"discriminator: a torch\.jit module \(0\).*Pass the nn\.Module",
        d=lambda: nn.Sequential(_scripted(), nn.Tanh()),
    ),
    "optimizer a number": Row(
        TypeError, r"optimizer: must be a torch\.optim.*got float\. Pass", optimizer=lambda _: 0.1
    ),
    "optimizer a class": Row(
        TypeError,
        r"optimizer: must be a torch\.optim.*got type\. Pass",
        optimizer=lambda _: torch.optim.SGD,
    ),
    "optimizer None": Row(
        TypeError, r"optimizer: must be a torch\.optim.*got NoneType", optimizer=lambda _: None
    ),
    "optimizer of another module": Row(
        ValueError,
        r"optimizer: must hold parameters of the discriminator; it holds none.*Pass",
        optimizer=lambda _: sgd(linear()),
    ),
    "torchopt optimizer of another module": Row(
        ValueError,
        r"optimizer: must hold parameters of the discriminator; it holds none.*Pass",
        optimizer=lambda _: torchopt.SGD(linear().parameters(), lr=0.1),
    ),
    "meta-optimizer of another module": Row(
        ValueError,
        r"optimizer: must hold parameters of the discriminator; it holds none.*Pass",
        optimizer=lambda _: torchopt.MetaSGD(linear(), lr=0.1),
    ),
    "meta-optimizer that unties parameters": Row(
        ValueError,
        r"optimizer: .*two parameters of 'first\.weight', which layers.*share.*Use torchopt\.Opt",
        d=lambda: Tied().to(DEVICE, torch.float64),
        optimizer=lambda d: torchopt.MetaSGD(d, lr=0.1),
    ),
    "LBFGS": Row(
        TypeError,
        r"optimizer: .*torch\.optim\.lbfgs\.LBFGS.*Use one of.*torch\.optim\.Adam",
        optimizer=lambda d: torch.optim.LBFGS(d.parameters()),
    ),
    "SparseAdam": Row(
        TypeError,
        r"optimizer: .*SparseAdam.*Use one of",
        optimizer=lambda d: torch.optim.SparseAdam(list(d.parameters())),
    ),
    "an optimizer with a step of its own": Row(
        TypeError,
        r"optimizer: .*test_errors\.Custom.*Use one of",
        optimizer=lambda d: Custom(d.parameters()),
    ),
    "clip_grad_norm": Row(
        ValueError,
        r"optimizer: torchopt\.clip_grad_norm detaches the norm.*leave the clipping out",
        optimizer=lambda _: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(0.1)),
    ),
    "clip_grad_norm in an Optimizer": Row(
        ValueError,
        r"optimizer: torchopt\.clip_grad_norm detaches the norm",
        optimizer=lambda d: torchopt.Optimizer(
            d.parameters(), torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(0.1))
        ),
    ),
    "use_accelerated_op": Row(
        ValueError,
        r"optimizer: .*use_accelerated_op=True.*use_accelerated_op=False",
        optimizer=lambda _: torchopt.adam(0.1, use_accelerated_op=True),
    ),
    "scale_by_accelerated_adam": Row(
        ValueError,
        r"optimizer: .*inexact derivative.*use_accelerated_op=False",
        optimizer=lambda _: torchopt.transform.scale_by_accelerated_adam(),
    ),
    "register_hook": Row(
        ValueError,
        r"optimizer: torchopt\.register_hook changes gradients.*Leave it out",
        optimizer=lambda _: torchopt.chain(
            torchopt.register_hook(torchopt.hook.zero_nan_hook), torchopt.adam(0.1)
        ),
    ),
    "adamw with a mask": Row(
        ValueError,
        r"optimizer: torchopt's flat masks .*fail in torchopt's own step.*Build it as",
        optimizer=lambda _: torchopt.adamw(0.1, mask=lambda p: [True for _ in p]),
    ),
    "objective a class": Row(
        TypeError,
        r"objective: must be an object with the methods.*Minimax.*Pass",
        options=lambda: {"objective": Minimax},
    ),
    "objective a torch loss": Row(
        TypeError,
        r"objective: must be an object with the methods.*BCELoss\(\).*unroll\.Criterion",
        options=lambda: {"objective": nn.BCELoss()},
    ),
    "objective a penalty and a number": Row(
        TypeError,
        r"objective: must be an object with the methods.*got 5\. Pass",
        options=lambda: {"objective": R1(1.0) + 5},  # type: ignore[arg-type]
    ),
    "objective with one method": Row(
        TypeError,
        r"objective: must be an object with the methods",
        options=lambda: {"objective": type("Half", (), {"generator_loss": print})()},
    ),
    "fake detached": Row(
        ValueError, NO_PATH, call=lambda loss, fake, real: loss(fake.detach(), real)
    ),
    "fake detached, K = 0": Row(
        ValueError,
        NO_PATH,
        options=lambda: {"unroll_steps": 0},
        call=lambda loss, fake, real: loss(fake.detach(), real),
    ),
    "fake a mapping without a graph": Row(
        ValueError,
        NO_PATH,
        call=lambda loss, fake, real: loss({"input": fake.detach()}, {"input": real}),
    ),
    "fake and real swapped": Row(
        ValueError,
        r"fake: must carry.*one in real does\. Are they swapped\? Call loss\(fake, real\)",
        call=lambda loss, fake, real: loss(real, fake),
    ),
    "fake of tokens": Row(
        ValueError,
        r"fake: must carry.*are of torch\.int64, which has no gradient\. Pass what.*probabilities",
        call=lambda loss, fake, real: loss(fake.long(), real),
    ),
    "fake from inference mode": Row(
        ValueError,
        r"fake: must carry.*made in torch\.inference_mode\(\)\. Run the generator outside",
        call=lambda loss, fake, real: loss(_inferred(fake), real),
    ),
    "under torch.func": Row(
        TypeError,
        r"fake: must be ordinary.*torch\.func transform.*Call the loss outside of torch\.func",
        call=lambda loss, fake, real: torch.func.grad(loss)(fake.detach(), real),
    ),
    "fake a list": Row(
        TypeError,
        r"fake: must be a tensor for D\(x\).*got a list\. Pass tuple\(batch\).*\(batch,\) where",
        call=lambda loss, fake, real: loss([fake], [real]),
    ),
    "real a list": Row(
        TypeError,
        r"real: must be a tensor for D\(x\).*got a list",
        call=lambda loss, fake, real: loss(fake, [real, real]),
    ),
    "a bare PackedSequence": Row(
        TypeError,
        r"fake: must be a tensor for D\(x\).*got a PackedSequence.*\(packed,\)",
        call=lambda loss, fake, real: loss(nn.utils.rnn.pack_sequence([fake]), real),
    ),
    "a dataclass": Row(
        TypeError,
        r"minibatches, item 0, real: must be a tensor.*got Row\. Pass D.s arguments, such as",
        call=lambda loss, fake, real: loss(
            fake, real, minibatches=[(fake, Row(ValueError, "")), (fake, real)]
        ),
    ),
    "fake_k detached": Row(
        ValueError,
        r"minibatches, item 1, fake: must carry the generator's graph",
        call=lambda loss, fake, real: loss(
            fake, real, minibatches=[(fake, real), (fake.detach(), real)]
        ),
    ),
    "no minibatches": Row(ValueError, TOO_FEW.format(0), call=pairs(0)),
    "too few minibatches": Row(ValueError, TOO_FEW.format(1), call=pairs(1)),
    "too few minibatches of a generator": Row(
        ValueError,
        TOO_FEW.format(1),
        call=lambda loss, fake, real: loss(fake, real, minibatches=((fake, real) for _ in "1")),
    ),
    "minibatches of tensors": Row(TypeError, NOT_A_PAIR.format("Tensor"), call=_lone(randn(2, 4))),
    "minibatches of mappings": Row(TypeError, NOT_A_PAIR.format("dict"), call=_lone({"a": 1})),
    "minibatches of triples": Row(TypeError, NOT_A_PAIR.format("tuple"), call=_lone((1, 2, 3))),
    "minibatches not iterable": Row(
        TypeError,
        r"minibatches: ",
        call=lambda loss, fake, real: loss(fake, real, minibatches=2),
    ),
    "unequal batches in pairs": Row(
        ValueError,
        r"fake, real: RelativisticPairing pairs.*\(3, 1\) for real and \(5, 1\) for fake.*equal",
        options=lambda: {"objective": RelativisticPairing()},
        call=lambda loss, fake, real: loss(fake, real[:3]),
    ),
    "unequal batches under WGAN-GP": Row(
        ValueError,
        r"fake, real: GradientPenalty pairs.*\(3, 4\) for real and \(5, 4\) for fake.*equal",
        options=lambda: {"objective": Minimax() + GradientPenalty()},
        call=lambda loss, fake, real: loss(fake, real[:3]),
    ),
    "loss with a shape": Row(
        ValueError,
        r"objective: discriminator_loss must return a 0-d tensor; got shape \(5, 1\).*\.mean\(\)",
        options=game(lambda d, fake, _: d(fake)),
    ),
    "loss of one element": Row(
        ValueError,
        r"objective: discriminator_loss must return a 0-d tensor; got shape \(1,\)",
        options=game(lambda d, fake, _: d(fake).mean(0)),
    ),
    "loss a float": Row(
        TypeError,
        r"objective: discriminator_loss must return a 0-d tensor; got float",
        options=game(lambda d, fake, _: d(fake).mean().item()),
    ),
    "loss None": Row(
        TypeError,
        r"objective: discriminator_loss must return a 0-d tensor; got NoneType",
        options=game(lambda *_: None),
    ),
    "generator loss with a shape": Row(
        ValueError,
        r"objective: generator_loss must return a 0-d tensor; got shape \(5, 1\)",
        options=game(lambda d, fake, _: d(fake).mean(), lambda d, fake, _: d(fake)),
    ),
    "criterion without a reduction": Row(
        ValueError,
        r"objective: discriminator_loss must return a 0-d tensor; got shape \(5, 1\)",
        options=lambda: {"objective": Criterion(nn.BCEWithLogitsLoss(reduction="none"))},
    ),
    "loss without D": Row(
        ValueError,
        r"objective: discriminator_loss must depend on the parameters.*Call the `discriminator`",
        options=game(lambda _d, fake, _r: fake.mean()),
    ),
    "loss of a detached output": Row(
        ValueError,
        r"objective: discriminator_loss must depend on the parameters.*do not detach",
        options=game(lambda d, fake, _: d(fake).detach().mean()),
    ),
    "many outputs": Row(
        TypeError,
        r"objective: needs a discriminator that returns one tensor.*tuple.*objective of your own",
        d=TwoOutputs,
    ),
    "penalty without a floating tensor": Row(
        TypeError,
        r"real: a gradient penalty needs a floating-point tensor.*got .*Leave the penalty out",
        options=lambda: {"objective": Minimax() + R1(1.0)},
        d=lambda: Rounding(),
        call=lambda loss, fake, real: loss(fake, real.round().long()),
    ),
    "D changes its parameters": Row(
        RuntimeError,
        r"discriminator: .*must not change its parameters in place; it changed 'layer\.weight'"
        r".*project=",
        d=Mutating,
    ),
    "D changes its parameters through .data": Row(
        RuntimeError,
        r"discriminator: .*must not change its parameters in place; it changed 'layer\.weight'",
        d=MutatingData,
    ),
    "embedding with max_norm": Row(
        RuntimeError,
        r"discriminator: .*must not change its parameters in place; it changed 'embed\.weight'",
        d=lambda: MaxNorm(max_norm=0.1),
    ),
    "sparse gradients": Row(
        Exception, r"discriminator: .*sparse", d=lambda: MaxNorm(sparse=True)
    ),
    "inference mode": Row(RuntimeError, r"inference_mode.*Use torch\.no_grad", call=_inference),
    "unroll in inference mode": Row(
        RuntimeError, r"inference_mode.*Use torch\.no_grad", call=_unroll_in_inference
    ),
    "optimizer_state with a live optimizer": Row(
        ValueError,
        r"optimizer_state: goes only with a bare torchopt.*SGD brings its own.*Leave",
        call=_state(lambda _: {}),
    ),
    "optimizer_state of another transformation": Row(
        ValueError,
        r"optimizer_state: must be what the transformation's init returned.*Initialise it with",
        optimizer=lambda _: torchopt.adam(0.1),
        call=_state(lambda d: torchopt.rmsprop(0.1).init(tuple(d.parameters()))),
    ),
    "optimizer_state of other shapes": Row(
        ValueError,
        r"optimizer_state: .*its structure or its shapes differ",
        optimizer=lambda _: torchopt.adam(0.1),
        call=_state(lambda _: torchopt.adam(0.1).init(tuple(nn.Linear(3, 1).parameters()))),
    ),
    **{
        f"{argument} {what}": Row(kind, f"^{argument}: {message}", options=giving(argument, given))
        for argument in ("project", "transform_gradients")
        for what, (kind, message, given) in {
            "returns nothing": (
                ValueError,
                r"must return a mapping.*\['weight', 'bias'\]; got NoneType.*Return all",
                lambda _: None,
            ),
            "drops a name": (
                ValueError,
                r"must return a mapping.*got \['weight'\]",
                lambda p: {"weight": p["weight"]},
            ),
            "changes a shape": (
                ValueError,
                r"must keep the shapes.*'weight' came with \(1, 4\) and left with \(4,\)",
                lambda p: {n: q.flatten() for n, q in p.items()},
            ),
            "returns numbers": (
                TypeError,
                r"must return tensors; 'weight' is a float.*Keep them",
                lambda p: dict.fromkeys(p, 0.0),
            ),
            "not callable": (TypeError, r"must be a function.*got float\. Pass", 0.01),
        }.items()
    },
}  # fmt: skip


class Rounding(nn.Module):
    """A D that takes integers too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x.double())
        return output


@pytest.mark.parametrize("name", ROWS)
def test_refusals(name: str) -> None:
    row = ROWS[name]
    d = row.d()
    optimizer = row.optimizer(d)
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    before = snapshot(d, optimizer)
    pattern = re.compile(row.message, re.DOTALL)
    with pytest.raises(row.kind, match=pattern) as raised:
        loss = unroll.UnrolledGeneratorLoss(d, optimizer, **{"unroll_steps": 2} | row.options())
        (row.call or forward)(loss, fake, real)
    assert type(raised.value).__module__ == "builtins"
    assert not changes(before, d, optimizer)
    assert fake.grad is None


CONSTRUCTION = [
    name
    for name, row in ROWS.items()
    if row.call is None and name.split()[0] in {"K", "D", "optimizer", "LBFGS", "SparseAdam"}
    if not name.startswith("D changes its parameters")
]


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_what_can_be_refused_early_is(name: str) -> None:
    row = ROWS[name]
    d = row.d()
    with pytest.raises(row.kind, match=re.compile(row.message, re.DOTALL)):
        unroll.UnrolledGeneratorLoss(d, row.optimizer(d), **{"unroll_steps": 2} | row.options())


def test_a_missing_k_is_pythons_own_error() -> None:
    d = linear()
    with pytest.raises(TypeError, match="unroll_steps"):
        unroll.UnrolledGeneratorLoss(d, sgd(d))  # type: ignore[call-arg]


PLACES = ["discriminator", "objective", "minibatches", "project"]
OWN_ERRORS = [
    (kind, place)
    for kind in (KeyError, ValueError, RuntimeError, StopIteration, KeyboardInterrupt)
    for place in PLACES
    if (kind, place) != (StopIteration, "minibatches")  # there it means the end of the pairs
]


@pytest.mark.parametrize(("kind", "place"), OWN_ERRORS)
def test_the_users_own_errors_pass_through(kind: type[BaseException], place: str) -> None:
    """The same object, not wrapped, whatever its type."""
    error = kind("mine")
    ((fake, real),) = batches(1)
    fake.requires_grad_()

    def fail(where: str) -> None:
        if where == place:
            raise error

    class D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: Tensor) -> Tensor:
            fail("discriminator")
            output: Tensor = self.layer(x)
            return output

    class Game:
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            fail("objective")
            return Minimax().discriminator_loss(d, fake, real)

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            return Minimax().generator_loss(d, fake, real)

    class Minibatches:
        def __iter__(self) -> "Minibatches":
            return self

        def __next__(self) -> tuple[Tensor, Tensor]:
            fail("minibatches")
            return fake, real

    def project(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        fail("project")
        return parameters

    d = D()
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), Game(), unroll_steps=2, project=project)
    with pytest.raises(kind, match="mine") as raised:
        loss(fake, real, minibatches=Minibatches())
    assert raised.value is error


@pytest.mark.parametrize(
    "objective",
    [Minimax(), RelativisticPairing(), Minimax() + R1(1.0), R1(1.0) + unroll.Hinge()],
    ids=repr,
)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("functional", [False, True])
def test_a_sigmoid_under_logits_is_warned_of(objective: Any, functional: bool, steps: int) -> None:
    d = Probability() if functional else nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    d.to(DEVICE, torch.float64)
    ((fake, real),) = batches(1)
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), objective, unroll_steps=steps)
    message = r"discriminator: returns what comes out of a sigmoid.*Criterion"
    with pytest.warns(UserWarning, match=message) as caught:
        loss(fake.requires_grad_(), real)
    assert [warning.filename for warning in caught] == [__file__]
    loss(fake, real)


class Probability(nn.Module):
    """A D with a sigmoid of its own at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        p: Tensor = torch.sigmoid(self.layer(x)).view(-1)
        return p


class Gated(nn.Module):
    """A D whose last layer to be registered is a gate in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate = nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x * self.gate(x))
        return logits


@pytest.mark.parametrize("steps", [0, 1])
def test_a_sigmoid_elsewhere_is_as_it_should_be(steps: int) -> None:
    d = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    inner = nn.Sequential(nn.Sigmoid(), nn.Linear(4, 1))
    ((fake, real),) = batches(1)
    for module, objective in (
        (d, Criterion(nn.BCELoss())),
        (inner, Minimax()),
        (Gated(), Minimax()),
    ):
        module.to(DEVICE, torch.float64)
        loss = unroll.UnrolledGeneratorLoss(module, sgd(module), objective, unroll_steps=steps)
        loss(fake.requires_grad_(), real)


def test_an_objective_that_detaches_its_fakes_is_warned_of() -> None:
    """At the first call, and only where a second term was asked for."""
    detaching = game(
        lambda d, fake, real: Minimax().discriminator_loss(d, fake.detach(), real),
        lambda d, fake, real: Minimax().generator_loss(d, fake, real),
    )()["objective"]
    d = linear()
    ((fake, real),) = batches(1)
    fake.requires_grad_()
    loss = unroll.UnrolledGeneratorLoss(d, sgd(d), detaching, unroll_steps=2)
    with pytest.warns(UserWarning, match=r"objective: .*detached.*stop_gradient=True"):
        loss(fake, real)
    loss(fake, real)
    quiet = {"objective": detaching, "unroll_steps": 2, "stop_gradient": True}
    unroll.UnrolledGeneratorLoss(d, sgd(d), **quiet)(fake, real)
    with torch.no_grad():
        unroll.UnrolledGeneratorLoss(d, sgd(d), detaching, unroll_steps=2)(fake, real)


def test_unroll_with_detached_fakes_is_no_mistake() -> None:
    """DESIGN 2: it accepts them and returns constants; nothing is to be warned of."""
    d = linear()
    ((fake, real),) = batches(1)
    ahead = unroll.UnrolledGeneratorLoss(d, sgd(d), unroll_steps=2).unroll(fake, real)
    assert not any(p.requires_grad for p in ahead.parameters.values())


def test_the_table_is_complete() -> None:
    """It has at least thirty rows, and one for every public argument."""
    assert len(ROWS) >= 30
    named = " ".join(row.message.split(":")[0] for row in ROWS.values())
    for argument in ("unroll_steps", "discriminator", "optimizer", "objective", "fake",
                     "minibatches", "optimizer_state", "project",
                     "transform_gradients"):  # fmt: skip
        assert argument in named
