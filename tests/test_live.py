"""K look-ahead steps are K real steps of the optimizer that trains D, from where it stands."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from tests.players import (
    LR,
    OPTIMIZERS,
    TORCH,
    TORCHOPT,
    assert_live,
    batches,
    deep,
    scheduled,
    small,
    tanh_net,
    train,
)
from tests.settings import DEVICE, not_on_the_oldest
from unroll import Minimax, UnrolledGeneratorLoss

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def looked_ahead(d: nn.Module, optimizer: Any, k: int, **options: Any) -> UnrolledGeneratorLoss:
    """Return the loss under test."""
    return UnrolledGeneratorLoss(d, optimizer, unroll_steps=k, **options)


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare by name, relative to the norm of each tensor."""
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        error = (got[name] - tensor).double().norm() / tensor.double().norm().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: off by {error:.1e}"


def pair_of(name: str, dtype: torch.dtype, warm: int, *, d: Any = deep) -> tuple[nn.Module, Any]:
    """Return D and an optimizer that has taken ``warm`` steps; the same ones at every call."""
    torch.manual_seed(0)
    module = d(dtype)
    optimizer = OPTIMIZERS[name](module)
    train(module, optimizer, batches(warm, dtype, seed=1))
    return module, optimizer


@pytest.mark.parametrize("warm", [0, 1, 8])  # RAdam divides by the root from the sixth step on
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_k_steps_are_real_steps(name: str, dtype: torch.dtype, warm: int) -> None:
    ((fake, real),) = batches(1, dtype)
    d, optimizer = pair_of(name, dtype, warm)
    results = {k: looked_ahead(d, optimizer, k).unroll(fake, real) for k in (1, 3)}
    start = {n: p.detach().clone() for n, p in d.named_parameters()}
    for k in (1, 2, 3):
        train(d, optimizer, [(fake, real)])
        if k in results:
            wanted = {n: p.detach() for n, p in d.named_parameters()}
            assert_close(results[k].parameters, wanted, TOLERANCE[dtype])
    moved = max((p - start[n]).norm() / p.norm() for n, p in d.named_parameters())
    assert moved > 100 * TOLERANCE[dtype], "the comparison says nothing: D stands still"


@pytest.mark.parametrize("name", ["Adam", "SGD momentum", "torchopt.Adam"])
def test_a_deep_copy_takes_the_same_steps(name: str) -> None:
    """The copy's D and optimizer are copied together, so that they stay connected."""
    ((fake, real),) = batches(1)
    d, optimizer = pair_of(name, torch.float64, 3)
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    copied_d, copied_optimizer = copy.deepcopy((d, optimizer))
    train(copied_d, copied_optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: p.detach() for n, p in copied_d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_the_graph_too(name: str) -> None:
    """What a differentiable look-ahead computes is what a detached one computes."""
    ((fake, real),) = batches(1)
    d, optimizer = pair_of(name, torch.float64, 2)
    fake.requires_grad_()
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    assert all(p.requires_grad for p in ahead.parameters.values())
    train(d, optimizer, [(fake.detach(), real)] * 3)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("warm", [0, 2])
def test_torch_state_and_buffers_follow(name: str, warm: int) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = pair_of(name, torch.float64, warm, d=small)
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.buffers, dict(d.named_buffers()), 1e-12)
    assert int(ahead.buffers["1.num_batches_tracked"]) == 2 * (warm + 3)
    for parameter_name, parameter in d.named_parameters():
        state = ahead.optimizer_state.get(parameter_name, {})
        wanted = optimizer.state[parameter]
        assert {k for k, v in state.items() if v is not None} == {
            k for k, v in wanted.items() if v is not None
        }
        for key, value in wanted.items():
            if isinstance(state[key], float):  # what torch keeps as a tensor of one number
                assert state[key] == float(value), key
            elif value is not None:
                torch.testing.assert_close(state[key], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", TORCHOPT)
def test_torchopt_state_and_buffers_follow(name: str) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = pair_of(name, torch.float64, 2, d=small)
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.buffers, dict(d.named_buffers()), 1e-12)
    single = isinstance(optimizer, torchopt.FuncOptimizer)
    got_leaves, got_structure = torchopt.pytree.tree_flatten(ahead.optimizer_state)
    wanted: Any = optimizer.optim_state if single else tuple(optimizer.state_groups)
    leaves, structure = torchopt.pytree.tree_flatten(wanted)
    assert got_structure == structure
    for got, leaf in zip(got_leaves, leaves, strict=True):
        torch.testing.assert_close(got, leaf, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_param_groups_keep_their_own_settings(dtype: torch.dtype) -> None:
    ((fake, real),) = batches(1, dtype)
    d = deep(dtype)
    p = list(d.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": p[20:], "lr": 0.1, "weight_decay": 0.3},
            {"params": p[3:9], "betas": (0.0, 0.5), "amsgrad": True},
            {"params": p[9:20] + p[:3], "maximize": True, "eps": 1e-3},
        ],
        lr=0.01,
    )
    loss = looked_ahead(d, optimizer, 3)
    for _ in range(3):
        ahead = loss.unroll(fake, real)
        train(d, optimizer, [(fake, real)] * 3)
        wanted = {n: q.detach() for n, q in d.named_parameters()}
        assert_close(ahead.parameters, wanted, TOLERANCE[dtype])


def test_param_groups_of_sgd_with_and_without_momentum() -> None:
    ((fake, real),) = batches(1)
    d = deep()
    p = list(d.parameters())
    groups: list[dict[str, Any]] = [
        {"params": p[:7]},
        {"params": p[7:], "momentum": 0.9, "lr": 0.2, "nesterov": True},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    train(d, optimizer, batches(2, seed=4))
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: q.detach() for n, q in d.named_parameters()}, 1e-12)


def test_param_groups_of_torchopt() -> None:
    ((fake, real),) = batches(1)
    d = deep()
    p = list(d.parameters())
    optimizer = torchopt.SGD(p[9:], lr=0.1, momentum=0.9)
    optimizer.add_param_group(p[:9])
    train(d, optimizer, batches(2, seed=4))
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    assert isinstance(ahead.optimizer_state, tuple)
    assert len(ahead.optimizer_state) == 2
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: q.detach() for n, q in d.named_parameters()}, 1e-12)


def test_an_lr_scheduler_is_read_at_every_call() -> None:
    ((fake, real),) = batches(1)
    d = deep()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    loss = looked_ahead(d, optimizer, 2)
    for _ in range(4):
        ahead = loss.unroll(fake, real)
        train(d, optimizer, [(fake, real)] * 2)
        assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_a_tensor_lr_that_changes_in_place() -> None:
    ((fake, real),) = batches(1)
    d = deep()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD(d.parameters(), lr=lr, momentum=0.5)
    loss = looked_ahead(d, optimizer, 2)
    for factor in (1.0, 0.5, 3.0):
        lr.mul_(factor)
        ahead = loss.unroll(fake, real)
        train(d, optimizer, [(fake, real)] * 2)
        assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("shape", [(), pytest.param((1,), marks=not_on_the_oldest)])
def test_tensor_betas(shape: tuple[int, ...]) -> None:
    ((fake, real),) = batches(1)
    d = deep()
    betas = (torch.full(shape, 0.5), torch.full(shape, 0.9))
    optimizer = torch.optim.Adam(d.parameters(), lr=torch.tensor(LR), betas=betas, foreach=False)
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


def test_one_loss_follows_a_training_run() -> None:
    """The loss is made once and D trains on: each look-ahead starts where D is then."""
    d, optimizer = pair_of("Adam amsgrad", torch.float64, 0, d=small)
    loss = looked_ahead(d, optimizer, 2)
    for fake, real in batches(6, seed=3):
        ahead = loss.unroll(fake, real)
        train(d, optimizer, [(fake, real)] * 2)
        assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize(
    "transformation",
    [
        lambda: torchopt.adam(LR, weight_decay=0.1),
        lambda: torchopt.sgd(LR, momentum=0.9, dampening=0.5),
        lambda: torchopt.rmsprop(LR, centered=True),
        lambda: torchopt.chain(torchopt.sgd(1.0, momentum=0.9), torchopt.adam(LR, maximize=True)),
        scheduled,
    ],
    ids=["adam", "sgd", "rmsprop", "chain", "schedule"],
)
@pytest.mark.parametrize("warm", [0, 1, 8])
def test_a_bare_transformation_with_its_state(transformation: Any, warm: int) -> None:
    """A hand-written torchopt loop, whose state the call gets as ``optimizer_state``."""
    ((fake, real),) = batches(1)
    d, impl = deep(), transformation()
    parameters = tuple(d.parameters())
    state = impl.init(parameters)

    def real_step(fake: Tensor, real: Tensor, state: Any) -> Any:
        loss = Minimax().discriminator_loss(d, fake, real)
        gradients = torch.autograd.grad(loss, parameters)
        updates, state = impl.update(gradients, state, params=parameters, inplace=False)
        torchopt.apply_updates(parameters, updates, inplace=True)
        return state

    for pair in batches(warm, seed=1):
        state = real_step(*pair, state)
    ahead = looked_ahead(d, impl, 3).unroll(fake, real, optimizer_state=state)
    for _ in range(3):
        state = real_step(fake, real, state)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)
    for got, leaf in zip(
        torchopt.pytree.tree_leaves(ahead.optimizer_state),
        torchopt.pytree.tree_leaves(state),
        strict=True,
    ):
        torch.testing.assert_close(got, leaf, rtol=1e-12, atol=1e-15)


def test_a_bare_transformation_starts_afresh_at_every_call() -> None:
    ((fake, real),) = batches(1)
    d, impl = deep(), torchopt.sgd(LR, momentum=0.9, dampening=0.5)
    loss = looked_ahead(d, impl, 3)
    first, second = (loss.unroll(fake, real) for _ in range(2))
    assert_close(second.parameters, first.parameters, 0.0)
    optimizer = torch.optim.SGD(d.parameters(), lr=LR, momentum=0.9, dampening=0.5)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(first.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


class TwoHeads(nn.Module):
    """A D that uses one of two heads, and has a layer that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.unused = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor, head: int) -> Tensor:
        output: Tensor = self.heads[head](torch.tanh(self.body(x)))
        return output


@pytest.mark.parametrize("heads", [(0, 0, 0), (0, 1, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", sorted(TORCH.keys() - {"SGD fused"}))  # torch's own fails here
def test_parameters_without_a_gradient_are_skipped(name: str, heads: tuple[int, ...]) -> None:
    """Weight decay, moments and step counts of the unused ones stand still, as in a real step."""
    d = TwoHeads()
    optimizer = TORCH[name](d)
    pairs = [
        ({"x": fake, "head": head}, {"x": real, "head": head})
        for head, (fake, real) in zip(heads, batches(3), strict=True)
    ]
    train(d, optimizer, pairs[:1])
    ahead = looked_ahead(d, optimizer, 3).unroll(*pairs[0], minibatches=pairs)
    train(d, optimizer, pairs)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)
    steps = {n: optimizer.state[p].get("step") for n, p in d.named_parameters()}
    for parameter_name, count in steps.items():
        got = ahead.optimizer_state.get(parameter_name, {}).get("step")
        assert got == (None if count is None else float(count)), parameter_name


@pytest.mark.parametrize("name", ["torchopt.Adam", "torchopt.SGD", "torchopt.RMSprop"])
def test_torchopt_skips_unused_parameters(name: str) -> None:
    torch.manual_seed(0)
    d = TwoHeads()
    optimizer = OPTIMIZERS[name](d)
    pairs = [({"x": fake, "head": 1}, {"x": real, "head": 1}) for fake, real in batches(3)]
    unused = d.unused.weight.detach().clone()
    ahead = looked_ahead(d, optimizer, 3).unroll(*pairs[0], minibatches=pairs)
    assert torch.equal(ahead.parameters["unused.weight"], unused)
    if name != "torchopt.Adam":  # torchopt's own weight decay stumbles over a missing gradient
        train(d, optimizer, pairs)
        assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.filterwarnings("ignore:optimizer. holds no")
def test_the_optimizer_trains_a_part_of_d_and_more() -> None:
    """Parameters that it does not hold stand still; those that are not D's do not matter."""
    ((fake, real),) = batches(1)
    d = deep()
    elsewhere = nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.float64))
    optimizer = torch.optim.Adam([elsewhere, *list(d.parameters())[5:]], lr=LR)
    train(d, optimizer, batches(2, seed=2))
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    wanted = {n: p.detach() for n, p in d.named_parameters()}
    assert_close(ahead.parameters, wanted, 1e-12)
    assert torch.equal(ahead.parameters["0.weight"], wanted["0.weight"])


def test_a_frozen_backbone_stays_frozen() -> None:
    ((fake, real),) = batches(1)
    d = deep()
    for name in "0124":
        d.get_submodule(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(d.parameters(), lr=LR, weight_decay=0.5)
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    wanted = {n: p.detach() for n, p in d.named_parameters()}
    assert_close(ahead.parameters, wanted, 1e-12)
    assert torch.equal(ahead.parameters["2.weight"], d.get_parameter("2.weight"))


def test_a_d_that_is_frozen_for_the_generators_step_still_looks_ahead() -> None:
    ((fake, real),) = batches(1)
    d, optimizer = pair_of("Adam", torch.float64, 2)
    made_before = looked_ahead(d, optimizer, 3)
    d.requires_grad_(False)
    made_after = looked_ahead(d, optimizer, 3)
    results = [loss.unroll(fake, real) for loss in (made_before, made_after)]
    d.requires_grad_(True)
    train(d, optimizer, [(fake, real)] * 3)
    for ahead in results:
        assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", ["Adam", "SGD dampening", "torchopt.RMSprop"])
def test_resampled_minibatches_are_the_real_steps_batches(name: str) -> None:
    pairs = batches(4)
    d, optimizer = pair_of(name, torch.float64, 2, d=small)
    ahead = looked_ahead(d, optimizer, 3).unroll(*pairs[3], minibatches=pairs[:3])
    train(d, optimizer, pairs[:3])
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)
    assert_close(ahead.buffers, dict(d.named_buffers()), 1e-12)


class LightningOptimizer:
    """A wrapper like Lightning's, which keeps the real optimizer in ``.optimizer``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # As Lightning does: it poses as the optimizer's class, without its param_groups and state.
        name = f"Lightning{type(optimizer).__name__}"
        self.__class__ = type(name, (self.__class__, type(optimizer)), {})
        self.optimizer = optimizer


class _FabricOptimizer:
    """A wrapper like Fabric's, with the real optimizer behind a property."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        name = f"Fabric{type(optimizer).__name__}"
        self.__class__ = type(name, (self.__class__, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer


class AcceleratedOptimizer(torch.optim.Optimizer):
    """A wrapper like Accelerate's, which is an optimizer itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:  # pyright: ignore
        self.optimizer = optimizer


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RMSprop centered", "ASGD averaging", "Rprop"])
@pytest.mark.parametrize("wrapper", [LightningOptimizer, _FabricOptimizer, AcceleratedOptimizer])
def test_behind_a_wrapper(wrapper: Any, name: str) -> None:
    ((fake, real),) = batches(1)
    d, optimizer = pair_of(name, torch.float64, 2)
    ahead = looked_ahead(d, wrapper(optimizer), 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


def test_a_subclass_with_the_same_step() -> None:
    class Mine(torch.optim.Adam):
        pass

    ((fake, real),) = batches(1)
    d = deep()
    optimizer = Mine(d.parameters(), lr=LR)
    ahead = looked_ahead(d, optimizer, 2).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 2)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


@pytest.mark.parametrize("name", TORCH)
def test_stepped_by_a_grad_scaler(name: str) -> None:
    """D's real gradients come scaled and are unscaled; inner losses are not scaled at all."""
    ((fake, real),) = batches(1)
    d = deep()
    optimizer = TORCH[name](d)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0)

    def scaled_step(pair: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(Minimax().discriminator_loss(d, *pair)))
        scaler.step(optimizer)
        scaler.update()

    for pair in batches(3, seed=5):
        scaled_step(pair)
    ahead = looked_ahead(d, optimizer, 2).unroll(fake, real)
    for _ in range(2):
        scaled_step((fake, real))
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-12)


def test_mixed_dtypes_in_one_optimizer() -> None:
    """A float32 head on a float64 body: each keeps its own arithmetic."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4, dtype=torch.float64, device=DEVICE)
            self.head = nn.Linear(4, 1, dtype=torch.float32, device=DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(torch.tanh(self.body(x)).float())
            return output

    ((fake, real),) = batches(1)
    d = Mixed()
    optimizer = torch.optim.Adam(d.parameters(), lr=LR, weight_decay=0.1)
    train(d, optimizer, batches(2, seed=2))
    ahead = looked_ahead(d, optimizer, 3).unroll(fake, real)
    train(d, optimizer, [(fake, real)] * 3)
    assert_close(ahead.parameters, {n: p.detach() for n, p in d.named_parameters()}, 1e-6)


def test_a_state_with_none_or_strange_entries_is_that_of_the_real_step() -> None:
    d = tanh_net()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
    for p in d.parameters():
        optimizer.state[p] = {"momentum_buffer": None, "note": "of an old checkpoint"}
    assert_live(UnrolledGeneratorLoss(d, optimizer, unroll_steps=3))


class Lookahead(torch.optim.Optimizer):
    """A wrapper with a step of its own, which nobody must look through."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


def test_a_wrapper_with_a_step_of_its_own_is_refused() -> None:
    d = tanh_net()
    with pytest.raises(TypeError, match=r"no differentiable form of .*Lookahead is known"):
        UnrolledGeneratorLoss(d, Lookahead(torch.optim.SGD(d.parameters(), lr=0.3)), unroll_steps=1)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["SGD momentum", "SGD nesterov", "RMSprop", "Adagrad", "Rprop"])
def test_a_d_that_was_cast_keeps_an_optimizer_with_a_wider_state(
    name: str, wide: torch.dtype
) -> None:
    d, pairs = small(wide), batches(4, wide)
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, pairs[:1])
    narrow = {torch.float64: torch.float32, torch.float32: torch.bfloat16}[wide]
    d.to(narrow)
    pairs = [(fake.to(narrow), real.to(narrow)) for fake, real in pairs[1:]]
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    ahead = loss.unroll(*pairs[0], minibatches=pairs)
    train(d, optimizer, pairs)
    tolerance = 1e-5 if narrow == torch.float32 else 0.02
    assert_close(ahead.parameters, dict(d.named_parameters()), tolerance)
