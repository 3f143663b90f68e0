"""Every optimizer of ``torch.optim``, as training loops set it up, or its refusal by name."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests import oracles
from tests.games import Game
from tests.players import LR, TORCH, batches, deep, train
from tests.settings import OLDEST, not_on_the_oldest
from tests.test_live import TOLERANCE, assert_close, looked_ahead, pair_of
from unroll._optimizers.rules import RULES

Settings = dict[str, Any]

# class -> hyper-parameters of all groups, of the second and of the third
GROUPS: dict[type[torch.optim.Optimizer], tuple[Settings, Settings, Settings]] = {
    torch.optim.Adam: (
        {"lr": LR},
        {"betas": (0.0, 0.5), "amsgrad": True},
        {"lr": LR / 2, "weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ),
    torch.optim.AdamW: (
        {"lr": LR},
        {"betas": (0.5, 0.9), "weight_decay": 0.3},
        {"lr": LR / 2, "maximize": True},
    ),
    torch.optim.NAdam: (
        {"lr": LR},
        {"betas": (0.0, 0.5), "momentum_decay": 0.1},
        {"lr": LR / 2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    torch.optim.RAdam: (
        {"lr": LR},
        {"betas": (0.0, 0.9), "eps": 1e-3},
        {"lr": LR / 2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    torch.optim.Adamax: (
        {"lr": LR},
        {"betas": (0.0, 0.5), "eps": 1e-3},
        {"lr": LR / 2, "weight_decay": 0.1, "maximize": True},
    ),
    torch.optim.SGD: (
        {"lr": LR},
        {"momentum": 0.9, "nesterov": True},
        {"lr": LR / 2, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
    ),
    torch.optim.RMSprop: (
        {"lr": LR / 10},
        {"alpha": 0.5, "centered": True, "eps": 1e-3},
        {"lr": LR / 20, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    ),
    torch.optim.Adagrad: (
        {"lr": LR, "initial_accumulator_value": 0.01},
        {"lr_decay": 0.3, "initial_accumulator_value": 7.0},  # which torch does not read
        {"lr": LR / 2, "weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ),
    torch.optim.Adadelta: (
        {"lr": 1.0},
        {"rho": 0.5, "eps": 1e-4},
        {"lr": 2.0, "weight_decay": 0.1, "maximize": True},
    ),
    torch.optim.ASGD: (
        {"lr": LR},
        {"lambd": 0.1, "t0": 2, "alpha": 0.5},
        {"lr": LR / 2, "weight_decay": 0.1, "maximize": True},
    ),
    torch.optim.Adafactor: (
        {"lr": LR},
        {"beta2_decay": -0.5, "d": 2.0},
        {"lr": LR / 2, "weight_decay": 0.1, "maximize": True, "eps": (1e-3, 1e-2)},
    ),
    torch.optim.Rprop: (
        {"lr": LR / 10},
        {"etas": (0.3, 1.5), "step_sizes": (1e-3, 2e-3)},
        {"lr": LR / 20, "maximize": True},
    ),
}
FAMILIES = [pytest.param(cls, id=cls.__name__) for cls in GROUPS]


def grouped(
    cls: Any, parts: list[list[nn.Parameter]], *, scale: float = 1.0
) -> torch.optim.Optimizer:
    """Return an optimizer of three groups, with ``scale`` times the learning rates."""
    settings = [dict(group) for group in GROUPS[cls]]
    for group in settings:
        if "lr" in group:
            group["lr"] *= scale
    first, *others = settings
    groups = [{"params": part} for part in parts]
    for group, own in zip(groups[1:], others, strict=True):
        group |= own
    optimizer: torch.optim.Optimizer = cls(groups, **first)
    return optimizer


def assert_real_steps(ahead: Any, d: nn.Module, optimizer: Any, pair: Any, k: int) -> None:
    """Take ``k`` real steps and compare."""
    dtype = next(d.parameters()).dtype
    train(d, optimizer, [pair] * k)
    wanted = {n: p.detach() for n, p in d.named_parameters()}
    assert_close(ahead.parameters, wanted, TOLERANCE[dtype])


def test_every_rule_is_tested() -> None:
    known = RULES.keys() | {torch.optim.Adafactor}  # Muon, of matrices alone: test_several.py
    assert GROUPS.keys() == known
    used = {type(build(deep())) for build in TORCH.values()}
    assert used == known


PUBLIC = [
    cls
    for cls in vars(torch.optim).values()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    if cls is not torch.optim.Optimizer
]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_every_optimizer_of_torch_is_supported_or_refused(cls: Any) -> None:
    d = nn.Linear(4, 1, bias=False)
    optimizer = cls(list(d.parameters()))
    if cls.__name__ not in {"LBFGS", "SparseAdam"}:
        looked_ahead(d, optimizer, 1)
        return
    with pytest.raises(TypeError, match=rf"optimizer: .*{cls.__name__} is known\. Use one of"):
        looked_ahead(d, optimizer, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cls", FAMILIES)
def test_param_groups_keep_their_own_settings(cls: Any, dtype: torch.dtype) -> None:
    (pair,) = batches(1, dtype)
    torch.manual_seed(0)
    d = deep(dtype)
    p = list(d.parameters())
    optimizer = grouped(cls, [p[20:], p[3:9], p[9:20] + p[:3]])
    loss = looked_ahead(d, optimizer, 3)
    for _ in range(3):
        assert_real_steps(loss.unroll(*pair), d, optimizer, pair, 3)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("cls", FAMILIES)
def test_central_differences_of_param_groups(cls: Any, warm: int) -> None:
    game = Game(6)
    p = list(game.discriminator.parameters())
    optimizer = grouped(cls, [p[3:], [p[0], p[2]], [p[1]]], scale=5.0)
    game.warmed(optimizer, warm)
    loss = unroll.UnrolledGeneratorLoss(game.discriminator, optimizer, unroll_steps=3)

    def surrogate(theta: Tensor) -> Tensor:
        value: Tensor = loss(game.fake(theta), game.real[0])
        return value

    theta = game.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(theta), theta)
    assert oracles.relative_error(surrogate, game.theta, gradient) <= 1e-6


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.02, total_steps=8, cycle_momentum=bool({"betas", "momentum"} & {*o.defaults})
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", FAMILIES)
def test_schedulers_are_read_at_every_call(cls: Any, name: str) -> None:
    """OneCycleLR changes momentum and betas too."""
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = deep()
    first, second, _ = GROUPS[cls]
    optimizer = cls(d.parameters(), **first | second)
    scheduler = SCHEDULERS[name](optimizer)
    loss = looked_ahead(d, optimizer, 2)
    seen = set()
    for _ in range(4):
        ahead = loss.unroll(*pair)
        assert_real_steps(ahead, d, optimizer, pair, 2)
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.add((group["lr"], group.get("momentum"), group.get("betas")))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TORCH)
def test_after_load_state_dict(name: str, saved: torch.dtype, loaded: torch.dtype) -> None:
    """Loading casts moments to the parameters' type, NAdam's product and ASGD's rates with them."""
    (pair,) = batches(1, loaded)
    d, optimizer = pair_of(name, saved, 5)
    state = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(1)
    resumed = deep(loaded)
    resumed_optimizer = TORCH[name](resumed)
    loss = looked_ahead(resumed, resumed_optimizer, 3)
    loss.unroll(*pair)  # before the load: nothing of it may stay
    resumed.load_state_dict(d.state_dict())
    resumed_optimizer.load_state_dict(state)
    assert_real_steps(loss.unroll(*pair), resumed, resumed_optimizer, pair, 3)


@pytest.mark.filterwarnings("ignore:optimizer. holds no")
@pytest.mark.parametrize("cls", FAMILIES)
def test_a_param_group_added_after_the_loss_was_made(cls: Any) -> None:
    if OLDEST and cls is torch.optim.Adagrad:
        pytest.skip("torch 2.7 makes no state for the new group")
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = deep()
    p = list(d.parameters())
    first, second, third = GROUPS[cls]
    optimizer = cls(p[9:], **first)
    loss = looked_ahead(d, optimizer, 3)
    assert_real_steps(loss.unroll(*pair), d, optimizer, pair, 3)
    for part, settings in ((p[:4], second), (p[4:9], third)):
        optimizer.add_param_group({"params": part, **settings})
        assert_real_steps(loss.unroll(*pair), d, optimizer, pair, 3)


@pytest.mark.parametrize("name", [name for name in TORCH if name.startswith(("RAdam", "ASGD"))])
@pytest.mark.parametrize("warm", range(2, 7))
def test_where_the_rule_changes_with_the_step_count(name: str, warm: int) -> None:
    """RAdam divides by the root from its sixth step on, ASGD averages from t0 on."""
    (pair,) = batches(1)
    d, optimizer = pair_of(name, torch.float64, warm)
    assert_real_steps(looked_ahead(d, optimizer, 3).unroll(*pair), d, optimizer, pair, 3)


@not_on_the_oldest
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cls", FAMILIES)
def test_a_tensor_lr_of_another_shape_and_type(cls: Any, dtype: torch.dtype) -> None:
    """Torch takes any tensor of one element; parameters keep their own type."""
    (pair,) = batches(1, dtype)
    torch.manual_seed(0)
    d = deep(dtype)
    lr = torch.tensor([GROUPS[cls][0]["lr"]], dtype=torch.float64)
    optimizer = cls(d.parameters(), lr=lr)
    loss = looked_ahead(d, optimizer, 3)
    for _ in range(2):
        assert_real_steps(loss.unroll(*pair), d, optimizer, pair, 3)
        lr.mul_(0.5)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("name", [name for name in TORCH if name.startswith(("NAdam", "ASGD"))])
@pytest.mark.parametrize("warm", [0, 3])
def test_numbers_that_torch_keeps_in_the_default_precision(name: str, warm: int) -> None:
    (pair,) = batches(1)
    d, optimizer = pair_of(name, torch.float64, warm)
    assert_real_steps(looked_ahead(d, optimizer, 3).unroll(*pair), d, optimizer, pair, 3)


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_options_that_do_not_change_the_step(cls: Any, option: str) -> None:
    """Torch cannot take such real steps of leaf parameters, or on the CPU: compare with none."""
    if option not in inspect.signature(cls).parameters:
        assert (cls, option) in {
            (torch.optim.SGD, "capturable"),
            (torch.optim.Adagrad, "capturable"),
            (torch.optim.Adafactor, "capturable"),
            (torch.optim.Adafactor, "differentiable"),
        }
        return
    (pair,) = batches(1)
    torch.manual_seed(0)
    d = deep()
    plain, special = cls(d.parameters()), cls(d.parameters(), **{option: True})
    wanted = looked_ahead(d, plain, 3).unroll(*pair).parameters
    assert_close(looked_ahead(d, special, 3).unroll(*pair).parameters, wanted, 0.0)


def test_rprop_has_no_second_term() -> None:
    """Its steps depend on signs alone, so that theta_D^K is piecewise constant in the fakes."""
    gradients: list[Tensor] = []
    for stop_gradient in (False, True):
        game = Game(7)
        optimizer = torch.optim.Rprop(game.discriminator.parameters(), 0.05)
        game.warmed(optimizer, 3)
        loss = unroll.UnrolledGeneratorLoss(
            game.discriminator, optimizer, unroll_steps=3, stop_gradient=stop_gradient
        )
        theta = game.theta.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(game.fake(theta), game.real[0]), theta)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_a_subclass_that_was_there_before_the_class_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch wraps ``step`` of the class of the first instance, here of the subclass."""
    unwrapped = torch.optim.Adamax.step
    while getattr(unwrapped, "hooked", False):
        unwrapped = unwrapped.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.Adamax, "step", unwrapped)

    class Mine(torch.optim.Adamax):
        pass

    (pair,) = batches(1)
    d = deep()
    optimizer = Mine(d.parameters(), lr=LR)
    assert "step" in vars(Mine)
    assert_real_steps(looked_ahead(d, optimizer, 2).unroll(*pair), d, optimizer, pair, 2)


def test_a_subclass_whose_step_calls_itself_wrapped_is_refused() -> None:
    class Twice(torch.optim.Adamax):
        @functools.wraps(torch.optim.Adamax.step)
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step(closure)
            return super().step(closure)

    d = deep()
    with pytest.raises(TypeError, match=r"optimizer: .*Twice is known"):
        looked_ahead(d, Twice(d.parameters()), 1)
