"""What users do in D, in objectives, transformations and hooks: right, or refused by name."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torchopt.base import GradientTransformation

import unroll
from tests.players import train
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from unroll import R1, Minimax

Loss = unroll.UnrolledGeneratorLoss


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE).double()


def adam(d: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(d.parameters(), lr=0.05)


def fakes() -> Tensor:
    return randn(5, 3).requires_grad_()


def gradient(loss: unroll.UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> Tensor:
    return torch.autograd.grad(loss(fake, real), fake)[0]


def assert_live(loss: unroll.UnrolledGeneratorLoss) -> None:
    """Compare the look-ahead with as many real steps of the real D."""
    fake, real, d = randn(5, 3), randn(5, 3), loss.discriminator
    ahead = loss.unroll(fake, real)
    before = copy.deepcopy(d.state_dict())
    train(d, loss.optimizer, [(fake, real)] * loss.unroll_steps, loss.objective)
    moved = 0
    for name, p in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], p.detach(), rtol=1e-9, atol=1e-12)
        moved += not torch.equal(p.detach(), before[name])
    assert moved == sum(1 for _ in d.parameters())


# --- what moves -----------------------------------------------------------------------------------


def test_parameters_that_d_gains_move() -> None:
    d = net()
    optimizer = adam(d)
    loss = Loss(d, optimizer, unroll_steps=3)
    d.append(nn.Linear(1, 1).to(DEVICE).double())
    optimizer.add_param_group({"params": d[3].parameters()})
    assert_live(loss)


@pytest.mark.parametrize("rename", [
    lambda d: prune.l1_unstructured(d[0], "weight", 0.3),
    lambda d: orthogonal(d[0], orthogonal_map="cayley", use_trivialization=False),
], ids=["pruned", "orthogonal"])  # fmt: skip
def test_parameters_that_get_another_name_move(rename: Callable[[nn.Module], object]) -> None:
    d = net()
    optimizer = adam(d)
    loss = Loss(d, optimizer, unroll_steps=2)
    rename(d)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(d.parameters())})
    assert_live(loss)


@pytest.mark.filterwarnings("ignore:optimizer. holds no")
def test_an_optimizer_of_frozen_parameters_alone_moves_them() -> None:
    d = net()
    d[2].requires_grad_(False)
    loss = Loss(d, torch.optim.SGD(d[2].parameters(), lr=0.1), unroll_steps=1)
    ahead = loss.unroll(randn(5, 3), randn(5, 3))
    moved = {n for n, p in d.named_parameters() if not torch.equal(p, ahead.parameters[n])}
    assert moved == {"2.weight", "2.bias"}


def test_a_frozen_part_stays_where_it_is_in_the_self_check_too() -> None:
    d = net()
    d[0].requires_grad_(False)
    loss = Loss(d, adam(d), unroll_steps=2)
    ahead = loss.unroll(randn(5, 3), randn(5, 3))
    assert torch.equal(ahead.parameters["0.weight"], d.get_parameter("0.weight"))
    assert not torch.equal(ahead.parameters["2.weight"], d.get_parameter("2.weight"))
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_parameters_that_share_memory_are_refused_and_neighbours_are_not() -> None:
    d = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}).to(DEVICE)
    one, two = d.get_parameter("one.weight"), d.get_parameter("two.weight")
    two.data = one.data.t()
    with pytest.raises(ValueError, match=r"'one\.weight' and 'two\.weight' share memory.*Make"):
        Loss(d, adam(d), unroll_steps=1)
    whole = torch.randn(3, 6, device=DEVICE)
    one.data, two.data = whole[:, :3], whole[:, 3:]
    Loss(d, adam(d), unroll_steps=1)


@pytest.mark.parametrize("where", ["a buffer", "an attribute", "a list"])
def test_what_d_keeps_of_a_parameters_memory_is_refused(where: str) -> None:
    d: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).to(DEVICE)
    shared = d[0].weight.detach()[1:]
    if where == "a buffer":
        d[1].register_buffer("kept", shared)
    else:
        vars(d[1]).update(kept=[shared] if where == "a list" else shared)
    with pytest.raises(
        ValueError, match=r"'1\.kept' shares memory with the parameter '0\.weight'.*keep a clone"
    ):
        Loss(d, adam(d), unroll_steps=1)
    d[0].requires_grad_(False)  # a step does not move it
    Loss(d, adam(d[1]), unroll_steps=1)


def test_a_weight_that_a_spectral_norm_makes_anew_shares_memory_with_nothing() -> None:
    d: Any = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 1)).to(DEVICE)
    assert d[0].weight.data_ptr() == d[0].weight_orig.data_ptr()
    Loss(d, adam(d), unroll_steps=1)


# --- what is given back ---------------------------------------------------------------------------


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
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.5), unroll_steps=3)
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
    loss = Loss(d, adam(d), unroll_steps=2)
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


@pytest.mark.parametrize("with_penalty", [False, True])
def test_an_objective_is_given_back_as_it_was(with_penalty: bool) -> None:
    d, own, real, fake = net(), LeCam(), randn(5, 3), fakes()
    loss = Loss(d, adam(d), own + R1(0.1) if with_penalty else own, unroll_steps=3)
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


def kept_in_a_closure() -> GradientTransformation:
    buffer: Any = None

    def update(updates: Any, state: Any, **_: Any) -> Any:
        nonlocal buffer
        last = buffer or [0.0] * len(updates)
        buffer = tuple(0.9 * b + g for b, g in zip(last, updates, strict=True))
        return tuple(-0.1 * b for b in buffer), state

    return GradientTransformation(lambda _: (), update)


def kept_in_an_object() -> GradientTransformation:
    class Momentum:
        def __init__(self) -> None:
            self.step, self.buffer = 0, dict[int, Any]()

        def update(self, updates: Any, state: Any, **_: Any) -> Any:
            self.step += 1
            for number, g in enumerate(updates):
                self.buffer[number] = 0.9 * self.buffer.get(number, 0.0) + g / self.step
            return tuple(-0.1 * b for b in self.buffer.values()), state

    return GradientTransformation(lambda _: (), Momentum().update)


@pytest.mark.parametrize(
    ("transformation", "name"), [(kept_in_a_closure, "buffer"), (kept_in_an_object, "step")]
)
def test_state_that_a_transformation_keeps_for_itself_is_refused(
    transformation: Callable[[], GradientTransformation], name: str
) -> None:
    d, impl = net(), transformation()
    before = snapshot(d, impl.update)
    message = rf"^optimizer: .*update keeps state in '{name}', outside.*Put it into .* state"
    for optimizer in (impl, torchopt.Optimizer(d.parameters(), impl)):
        with pytest.raises(ValueError, match=message):
            Loss(d, optimizer, unroll_steps=3)
    assert not changes(before, d, impl.update)


def test_the_parameters_of_d_in_a_projection_are_refused() -> None:
    d = net()
    anchor: dict[str, Tensor] = dict(d.named_parameters())

    def near(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: p + 0.1 * (anchor[name] - p) for name, p in theta.items()}

    with pytest.raises(
        RuntimeError, match=r"the update uses D's parameter .* itself .*\.detach\(\)"
    ):
        Loss(d, adam(d), unroll_steps=2, project=near)(fakes(), randn(5, 3))
    anchor = {name: p.detach() for name, p in anchor.items()}
    Loss(d, adam(d), unroll_steps=2, project=near)(fakes(), randn(5, 3)).backward()
    assert all(p.grad is None for p in d.parameters())


def test_a_multi_grad_hook_is_named() -> None:
    d = net()
    torch.autograd.graph.register_multi_grad_hook(tuple(d.parameters()), lambda _: None)
    with pytest.raises(TypeError, match=r"register_multi_grad_hook.*Use parameter\.register_hook"):
        Loss(d, adam(d), unroll_steps=1)(fakes(), randn(5, 3))


def test_attributes_of_a_parameter_are_those_of_theta() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            vars(self.layer.weight)["gain"] = 2.0
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            gain: float = vars(self.layer.weight)["gain"]
            output: Tensor = gain * self.layer(x)
            return output

    d = Gained()
    loss = Loss(d, adam(d), unroll_steps=2)
    assert_live(loss)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


# --- recomputed -----------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere sums may come in another order")
@pytest.mark.parametrize("change", ["projection", "hook"])
def test_a_step_whose_update_changed_in_between_is_refused(change: str) -> None:
    d, width = net(), [0.01]
    handle = d.get_parameter("0.weight").register_hook(lambda g: 2 * g)

    def clip(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: p.clamp(-width[0], width[0]) for name, p in theta.items()}

    options: dict[str, Any] = {"project": clip} if change == "projection" else {}
    value = Loss(d, adam(d), unroll_steps=2, checkpoint=True, **options)(fakes(), randn(5, 3))
    if change == "projection":
        width[0] = 0.05
    else:
        handle.remove()
    with pytest.raises(RuntimeError, match=r"must give the same result.*update or buffers differ"):
        value.backward()


def saved_bytes(k: int, **options: Any) -> int:
    """Return the memory that the graph of f_K keeps."""
    d, real = net(), randn(300, 3)
    loss = Loss(d, adam(d), unroll_steps=k, average=True, **options)
    loss(randn(300, 3).requires_grad_(), real)  # the first call inspects
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        value = loss(randn(300, 3).requires_grad_(), real)
    gc.collect()
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor for kept in alive}
    assert value.requires_grad
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def test_the_mean_of_all_steps_keeps_no_activations_when_it_is_recomputed() -> None:
    slope = (saved_bytes(12, checkpoint=True) - saved_bytes(2, checkpoint=True)) / 10
    theta = sum(p.nbytes for p in net().parameters())
    assert slope <= 3.5 * theta  # theta_D^k and Adam's moments, flat
    assert (saved_bytes(12) - saved_bytes(2)) / 10 > 50 * slope


@pytest.mark.parametrize("dropout", [False, True])
def test_the_recomputed_mean_is_the_mean(dropout: bool) -> None:
    d, real, fake = net(), randn(5, 3), fakes()
    if dropout:
        d.insert(2, nn.Dropout(0.5))
    results = []
    for checkpoint in (False, True):
        loss = Loss(d, adam(d), unroll_steps=3, average=True, checkpoint=checkpoint)
        loss(fake, real)
        torch.manual_seed(3)
        value = loss(fake, real)
        results.append((value, *torch.autograd.grad(value, fake)))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-15)


def test_a_mean_that_would_lose_a_gradient_when_it_is_recomputed_is_refused() -> None:
    weight = torch.ones((), dtype=torch.float64, device=DEVICE, requires_grad=True)

    class Weighted:
        discriminator_loss = Minimax().discriminator_loss

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            loss: Tensor = -(weight * d(fake)).mean()
            return loss

    d = net()
    loss = Loss(d, adam(d), Weighted(), unroll_steps=2, average=True, checkpoint=True)
    with pytest.raises(RuntimeError, match="whose gradient a recomputed step would lose"):
        loss(fakes(), randn(5, 3))


# --- compiled -------------------------------------------------------------------------------------


def difference(fast: Loss, eager: Loss, fake: Tensor, real: Tensor) -> float:
    wanted = gradient(eager, fake, real)
    return float((gradient(fast, fake, real) - wanted).norm() / wanted.norm())


def test_a_compiled_step_knows_of_hooks_that_come_later() -> None:
    d, real, fake = net(), randn(5, 3), fakes()
    optimizer = adam(d)
    eager = Loss(d, optimizer, unroll_steps=2)
    fast = Loss(d, optimizer, unroll_steps=2, compile=True)
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
            self.net, self.unused = net(), nn.Linear(3, 1)
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x)
            return output

    d, real, fake = Headed(), randn(5, 3), fakes()
    optimizer = adam(d)
    fast = Loss(d, optimizer, unroll_steps=2, compile=True)
    for _ in range(3):  # pytest makes the warning that it runs uncompiled an error
        assert difference(fast, Loss(d, optimizer, unroll_steps=2), fake, real) < 1e-10


def test_a_compiled_step_leaves_buffers_that_come_and_go_to_the_eager_one() -> None:
    d, real, fake = Lazy(), randn(5, 3), fakes()
    optimizer = adam(d)
    fast = Loss(d, optimizer, unroll_steps=2, compile=True)
    with pytest.warns(UserWarning, match="runs uncompiled.*makes or drops a buffer"):
        assert difference(fast, Loss(d, optimizer, unroll_steps=2), fake, real) == 0


def test_the_loss_runs_inside_a_compiled_training_step() -> None:
    d, real, fake = net(), randn(5, 3), fakes()
    loss = Loss(d, adam(d), unroll_steps=2)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        value: Tensor = loss(x * 1.0, real) * 2
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks at the .grad of tensors that have none
        found = step(fake)
    torch.testing.assert_close(found, 2 * loss(fake, real))


class Donating(torch.autograd.Function):
    """What torch.compile's backward pass does where it is to be kept for a second one."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, __: Tensor) -> Tensor:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


def test_the_terms_of_a_compiled_generator_are_refused_by_name() -> None:
    d, g = net(), nn.Linear(2, 3).to(DEVICE).double()
    fake: Tensor = Donating.apply(g(randn(5, 2)))
    with pytest.raises(RuntimeError, match=r"compiled generator.*generator\._orig_mod"):
        unroll.gradient_terms(Loss(d, adam(d), unroll_steps=1), fake, randn(5, 3), g.parameters())


# --- right derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-2, 0, 1, None])
def test_weight_norm_counts_dimensions_from_the_end_too(dim: int | None) -> None:
    normalised: Any = weight_norm
    d = nn.Sequential(normalised(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 1))
    d.to(DEVICE, torch.float64)
    loss = Loss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=2)
    assert_live(loss)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_native_layer_norm_under_a_penalty() -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
            self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            y, mean, rstd = torch.native_layer_norm(
                self.layer(x), [4], self.scale, self.shift, 1e-5
            )
            assert mean.shape == rstd.shape == (len(x), 1)
            output: Tensor = self.head(torch.tanh(y))
            return output

    d = Native()
    loss = Loss(d, adam(d), Minimax() + R1(1.0), unroll_steps=2)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3)).ok


def test_a_state_with_none_or_strange_entries_is_that_of_the_real_step() -> None:
    d = net()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
    for p in d.parameters():
        optimizer.state[p] = {"momentum_buffer": None, "note": "of an old checkpoint"}
    assert_live(Loss(d, optimizer, unroll_steps=3))


# --- the self-check -------------------------------------------------------------------------------


class WithNets(nn.Module):
    """An objective that is a module, holds others in a list, and points back at itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.nets = nn.Linear(1, 3), [nn.Linear(3, 2)]
        self.register_buffer("weight", torch.ones(2, 1))
        self.owner = {"me": [self]}
        self.to(DEVICE)
        self.nets[0].to(DEVICE)

    def judged(self, d: Any, x: Any) -> Tensor:
        w = self.get_buffer("weight")
        output: Tensor = (self.nets[0](self.net(d(x))) @ w).tanh().mean()
        return output

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return self.judged(d, fake) - self.judged(d, real)

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        return -self.judged(d, fake)


def test_the_self_check_takes_objectives_with_modules_lists_and_cycles() -> None:
    d, own = net().float(), WithNets()
    loss = Loss(d, adam(d), own, unroll_steps=2)
    before = snapshot(d, own)
    report = unroll.check_gradients(loss, fakes().float(), randn(5, 3).float())
    assert report.ok, report.suspicions
    assert not changes(before, d, own)


def test_the_self_check_leaves_what_hangs_on_a_function() -> None:
    def clip(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width: Any = vars(clip)["width"]
        return {name: p.clamp(-width, width) for name, p in theta.items()}

    vars(clip)["width"] = torch.tensor(0.4, device=DEVICE)
    d = net().float()
    loss = Loss(d, adam(d), unroll_steps=2, project=clip)
    assert unroll.check_gradients(loss, fakes().float(), randn(5, 3).float()).ok
    assert vars(clip)["width"].dtype == torch.float32


def test_the_self_check_names_what_it_cannot_copy() -> None:
    d, own = net(), LeCam()
    vars(own)["lock"] = threading.Lock()
    loss = Loss(d, adam(d), own, unroll_steps=1)
    loss(fakes(), randn(5, 3)).backward()
    with pytest.raises(
        TypeError, match=r"objective: must be what copy\.deepcopy can copy.*Keep locks"
    ):
        unroll.check_gradients(loss, fakes(), randn(5, 3))


def test_the_self_check_reads_casts_as_float64() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.to(DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.layer.weight.float(), self.layer.bias.float()
            return nn.functional.linear(x.float(), weight, bias).tanh()

    d = Casting()
    assert unroll.check_gradients(Loss(d, adam(d), unroll_steps=1), fakes(), randn(5, 3)).ok


def test_the_self_check_takes_minibatches_without_a_length() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield randn(5, 3), randn(5, 3)

        def __len__(self) -> int:
            raise TypeError("no length")

    d = net()
    loss = Loss(d, adam(d), unroll_steps=2)
    assert unroll.check_gradients(loss, fakes(), randn(5, 3), minibatches=Stream()).ok
