"""``checkpoint=True``: the plain gradient, from steps that are run twice and not kept."""

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.players import OPTIMIZERS, batches, deep, fakes, small, tanh_net, train, with_options
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.zoo import ZOO
from unroll import Minimax, NonSaturating, UnrolledGeneratorLoss, gradient_terms

ANIMALS = [
    "BatchNorm1d", "spectral norm", "weight norm", "weight norm, hooks", "dropout", "dropout2d",
    "attention, no weights", "transformer layer", "LSTM", "conditional, mapping", "projection",
    "many outputs", "tied", "unused parameters", "frozen backbone", "changing buffers",
    "changing buffers, in place", "RpGAN + R1 + R2", "LayerNorm + R1",
]  # fmt: skip
TRAINED = [
    "Adam", "Adam amsgrad", "Adam tensor lr", "SGD nesterov", "torchopt.SGD dampening",
    "torchopt.RMSprop centered", "torchopt.Optimizer of a chain", "torchopt.MetaAdam",
    "torchopt.FuncOptimizer",
]  # fmt: skip


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def both(
    d: nn.Module, optimizer: Any, run: Callable[[UnrolledGeneratorLoss], Any], **options: Any
) -> tuple[Any, Any]:
    """Return what ``run`` does with the plain loss and with the checkpointed one."""
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(5)
        loss = UnrolledGeneratorLoss(d, optimizer, checkpoint=checkpoint, **options)
        results.append((run(loss), torch.get_rng_state()))
    (plain, state), (recomputed, other_state) = results
    assert torch.equal(state, other_state), "the random numbers went apart"
    return plain, recomputed


def assert_close(got: Any, wanted: Any) -> None:
    for a, b in zip(got, wanted, strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-4)
        assert error <= 1e-12, f"off by {error:.1e}"


def drawn_twice(loss: UnrolledGeneratorLoss, *batch: Any, **options: Any) -> Tensor:
    """Return f_K; a number is drawn between the two passes, and one after them."""
    value: Tensor = loss(*batch, **options)
    torch.rand(1)
    return value


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", ANIMALS)
def test_every_kind_of_discriminator(name: str, average: bool) -> None:
    animal = ZOO[name]
    d = animal.make()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.9))
    draws = randn(4, 5, *animal.shape)
    train(d, optimizer, [(animal.feed(draws[0]), animal.feed(draws[1]))], animal.objective)
    before = snapshot(d, optimizer)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        fake, real = leaf(draws[2]), leaf(draws[3])
        value = drawn_twice(loss, animal.feed(fake), animal.feed(real))
        return [value, *torch.autograd.grad(value, (fake, real))]

    plain, recomputed = both(
        d, optimizer, run, objective=animal.objective, unroll_steps=4, average=average
    )
    assert torch.equal(plain[0], recomputed[0])
    assert_close(recomputed[1:], plain[1:])
    assert plain[1].norm() > 0
    assert not changes(before, d, optimizer)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_every_kind_of_optimizer(name: str, warm: int) -> None:
    d = small()
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, batches(warm, seed=1))
    pairs = batches(4)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        fakes = [leaf(fake) for fake, _ in pairs]
        resampled = zip(fakes[1:], [real for _, real in pairs[1:]], strict=True)
        value = drawn_twice(loss, fakes[0], pairs[0][1], minibatches=resampled)
        return [value, *torch.autograd.grad(value, fakes)]

    plain, recomputed = both(
        d,
        optimizer,
        run,
        unroll_steps=3,
        project=lambda theta: {name: p.clamp(-0.5, 0.5) for name, p in theta.items()},
    )
    assert_close(recomputed, plain)


def test_a_bare_transformation_with_its_state() -> None:
    d, transformation = deep(), torchopt.chain(torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1))
    state = transformation.init(tuple(d.parameters()))
    ((fake, real),) = batches(1)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        x = leaf(fake)
        value = drawn_twice(loss, x, real, optimizer_state=state)
        return [value, *torch.autograd.grad(value, x)]

    plain, recomputed = both(d, transformation, run, unroll_steps=3)
    assert_close(recomputed, plain)


def test_the_two_terms_and_the_discriminator_ahead() -> None:
    d, generator = small(), nn.Linear(3, 4).to(DEVICE, torch.float64)
    ((_, real),) = batches(1)
    z = randn(5, 3)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        fake = generator(z)
        first, second = gradient_terms(loss, fake, real, generator.parameters())
        ahead = loss.unroll(fake, real)
        sizes = [p.square().sum() for p in ahead.parameters.values()]
        reaction = ahead(real).sum() + torch.stack(sizes).sum()
        third = torch.autograd.grad(reaction, list(generator.parameters()))
        return [*first, *second, *third, ahead.losses, *map(Tensor.double, ahead.buffers.values())]

    plain, recomputed = both(
        d, torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.5), run, unroll_steps=3
    )
    assert_close(recomputed, plain)


@pytest.mark.parametrize("options", [{"stop_gradient": True}, {"unroll_steps": 0}], ids=str)
def test_where_there_is_nothing_to_recompute(options: dict[str, Any]) -> None:
    d = small()
    ((fake, real),) = batches(1)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        x = leaf(fake)
        value = loss(x, real)
        return [value, *torch.autograd.grad(value, x)]

    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    plain, recomputed = both(d, optimizer, run, **{"unroll_steps": 3, **options})
    assert all(map(torch.equal, plain, recomputed))
    with torch.no_grad():
        value = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, checkpoint=True)(fake, real)
    assert not value.requires_grad


class Counted(NonSaturating):
    """The game, which counts D's losses."""

    calls = 0

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        type(self).calls += 1
        return super().discriminator_loss(discriminator, fake, real)


def test_every_step_runs_twice() -> None:
    d = small()
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters()), Counted(), unroll_steps=4, checkpoint=True
    )
    ((fake, real),) = batches(1)
    loss(leaf(fake), real)  # the first call looks for broken derivatives
    for _ in range(2):
        Counted.calls = 0
        value = loss(leaf(fake), real)
        assert Counted.calls == 4
        value.backward()
        assert Counted.calls == 8


class Saved:
    """A tensor that some graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_bytes(loss: UnrolledGeneratorLoss, fake: Tensor, real: Tensor) -> int:
    """Return the size of the storages that the graph of f_K holds, without the batch's."""
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        item = Saved(tensor.detach())
        saved.add(item)
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        value = loss(leaf(fake), real)
    gc.collect()
    storages = {item.tensor.untyped_storage().data_ptr(): item.tensor for item in saved}
    assert value.requires_grad
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize(("name", "copies"), [("SGD", 1), ("SGD momentum", 2), ("Adam", 3)])
def test_a_step_keeps_the_parameters_and_the_optimizers_state_only(name: str, copies: int) -> None:
    d = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    d.to(DEVICE, torch.float64)
    optimizer = OPTIMIZERS[name](d)
    train(d, optimizer, batches(1, seed=1))
    fake, real = randn(500, 4), randn(500, 4)  # activations are far larger than parameters
    theta = sum(p.numel() * p.element_size() for p in d.parameters())

    def held(k: int, checkpoint: bool) -> int:
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=k, checkpoint=checkpoint)
        loss(leaf(fake), real)  # what the first call searches for must not count
        return held_bytes(loss, fake, real)

    slope = (held(12, True) - held(2, True)) / 10
    assert slope <= copies * theta + 64  # and D's loss
    assert (held(12, False) - held(2, False)) / 10 > 100 * slope


def test_training_d_between_the_passes_does_not_matter() -> None:
    d = small()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    train(d, optimizer, batches(1, seed=1))
    ((fake, real),) = batches(1)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        x = leaf(fake)
        value = loss(x, real)
        kept = copy.deepcopy((d.state_dict(), optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.7
        train(d, optimizer, batches(1, seed=2))
        d.eval()
        found = torch.autograd.grad(value, x)
        assert not d.training
        d.train()
        d.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        return [value, *found]

    plain, recomputed = both(d, optimizer, run, unroll_steps=3)
    assert_close(recomputed, plain)


def test_autocast_is_replayed() -> None:
    d = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)).to(DEVICE)
    ((fake, real),) = batches(1, torch.float32)

    def run(loss: UnrolledGeneratorLoss) -> list[Tensor]:
        x = leaf(fake)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(x, real)
        return [value, *torch.autograd.grad(value, x)]

    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    plain, recomputed = both(d, optimizer, run, unroll_steps=3)
    assert torch.equal(plain[0], recomputed[0])
    torch.testing.assert_close(plain[1], recomputed[1], rtol=1e-6, atol=1e-8)


class _Ones(TorchFunctionMode):
    """Such as a default device: another answer of torch's while it is on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 3 * found if func is torch.ones else found


def test_modes_of_torch_are_replayed() -> None:
    class Labelled(Minimax):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            label = torch.ones(len(real), 1, device=DEVICE, dtype=torch.float64)
            of_real: Tensor = (discriminator(real) - label).square().mean()
            of_fake: Tensor = discriminator(fake).mean()
            return of_real + of_fake

    d, ((fake, real),) = small(), batches(1)
    x, found = leaf(fake), []
    for checkpoint in (False, True):
        loss = UnrolledGeneratorLoss(
            *(d, torch.optim.SGD(d.parameters(), lr=0.1), Labelled()),
            unroll_steps=2,
            checkpoint=checkpoint,
        )
        with _Ones():
            found.append(torch.autograd.grad(loss(x, real), x)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def checkpointed(**options: Any) -> UnrolledGeneratorLoss:
    d = small()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    return UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, checkpoint=True, **options)


def test_the_graph_may_be_kept_and_used_again() -> None:
    ((fake, real),) = batches(1)
    x = leaf(fake)
    value = checkpointed()(x, real)
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(once, again)


def test_a_second_derivative_is_refused() -> None:
    ((fake, real),) = batches(1)
    x = leaf(fake)
    with pytest.raises(RuntimeError, match=r"^checkpoint: f_K has first derivatives only.*False"):
        torch.autograd.grad(checkpointed()(x, real), x, create_graph=True)


def test_a_batch_that_is_changed_before_the_backward_pass_is_noticed() -> None:
    ((fake, real),) = batches(1)
    value = checkpointed()(leaf(fake), real)
    real.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class Scaled:
    """A game with a tensor of its own that is being trained."""

    def __init__(self) -> None:
        self.scale = randn(1).requires_grad_()

    def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = (discriminator(fake) * self.scale - discriminator(real)).square().mean()
        return loss

    def generator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
        loss: Tensor = discriminator(fake).mean()
        return loss


def test_a_tensor_whose_gradient_would_be_lost_is_refused() -> None:
    ((fake, real),) = batches(1)
    loss, bound = checkpointed(objective=Scaled()), randn(1).requires_grad_()
    message = r"^checkpoint: .* no part of the batch \(shape \(1,\).*checkpoint=False"
    with pytest.raises(RuntimeError, match=message):
        loss(leaf(fake), real)
    loss = checkpointed(project=lambda theta: {n: p * bound for n, p in theta.items()})
    with pytest.raises(RuntimeError, match=message):
        loss(leaf(fake), real)
    game = Scaled()
    loss = with_options(checkpointed(objective=game), checkpoint=False)
    loss(leaf(fake), real).backward()
    assert game.scale.grad is not None


def test_an_error_in_the_backward_pass_leaves_d_as_it_was() -> None:
    class Fails(Counted):
        def discriminator_loss(self, discriminator: Any, fake: Any, real: Any) -> Tensor:
            value = super().discriminator_loss(discriminator, fake, real)
            if type(self).calls > 2:
                raise ZeroDivisionError("in the second run")
            return value

    ((fake, real),) = batches(1)
    loss = checkpointed(objective=Fails())
    Fails.calls = -4  # of the first call
    loss(leaf(fake), real)
    before = snapshot(loss.discriminator, loss.optimizer)
    Fails.calls = 0
    value = loss(leaf(fake), real)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError, match="in the second run"):
        value.backward()
    assert not changes(before, loss.discriminator, loss.optimizer)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_again_to_the_same_bits(dtype: torch.dtype) -> None:
    """Kernels without a graph round otherwise there, so the first run has one, too."""
    layers = (nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1))
    d = nn.Sequential(*layers).to(DEVICE, dtype)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.05)
    fake, real = (randn(5, 1, 6, 6).to(dtype) for _ in range(2))
    found = []
    for checkpoint in (False, True):
        x = leaf(fake)
        loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, checkpoint=checkpoint)
        loss(x, real).backward()
        found.append(x.grad)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="elsewhere sums may come in another order")
@pytest.mark.parametrize("change", ["projection", "hook"])
def test_a_step_whose_update_changed_in_between_is_refused(change: str) -> None:
    d, width = tanh_net(), [0.01]
    handle = d.get_parameter("0.weight").register_hook(lambda g: 2 * g)

    def clip(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: p.clamp(-width[0], width[0]) for name, p in theta.items()}

    options: dict[str, Any] = {"project": clip} if change == "projection" else {}
    value = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=2, checkpoint=True, **options
    )(fakes(), randn(5, 3))
    if change == "projection":
        width[0] = 0.05
    else:
        handle.remove()
    with pytest.raises(RuntimeError, match=r"must give the same result.*update or buffers differ"):
        value.backward()


def saved_bytes(k: int, **options: Any) -> int:
    """Return the memory that the graph of f_K keeps."""
    d, real = tanh_net(), randn(300, 3)
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.05), unroll_steps=k, average=True, **options
    )
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


@pytest.mark.plain
def test_the_mean_of_all_steps_keeps_no_activations_when_it_is_recomputed() -> None:
    slope = (saved_bytes(12, checkpoint=True) - saved_bytes(2, checkpoint=True)) / 10
    theta = sum(p.nbytes for p in tanh_net().parameters())
    assert slope <= 3.5 * theta  # theta_D^k and Adam's moments, flat
    assert (saved_bytes(12) - saved_bytes(2)) / 10 > 50 * slope


@pytest.mark.parametrize("dropout", [False, True])
def test_the_recomputed_mean_is_the_mean(dropout: bool) -> None:
    d, real, fake = tanh_net(), randn(5, 3), fakes()
    if dropout:
        d.insert(2, nn.Dropout(0.5))
    results = []
    for checkpoint in (False, True):
        loss = UnrolledGeneratorLoss(
            d,
            torch.optim.Adam(d.parameters(), lr=0.05),
            unroll_steps=3,
            average=True,
            checkpoint=checkpoint,
        )
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

    d = tanh_net()
    loss = UnrolledGeneratorLoss(
        d,
        torch.optim.Adam(d.parameters(), lr=0.05),
        Weighted(),
        unroll_steps=2,
        average=True,
        checkpoint=True,
    )
    with pytest.raises(RuntimeError, match="whose gradient a recomputed step would lose"):
        loss(fakes(), randn(5, 3))


class Reversing(nn.Module):
    """A gradient reversal whose size depends on how often it has run."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        size = self.calls / 10
        x = x * 1.0
        x.register_hook(lambda g: -size * g)
        return x


def test_state_that_a_backward_pass_alone_reads_is_refused() -> None:
    first = nn.Linear(4, 6)
    d = nn.Sequential(first, Reversing(), nn.Tanh(), nn.Linear(6, 1)).to(DEVICE, torch.float64)
    ((fake, real),) = batches(1)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2, checkpoint=True)
    with pytest.raises(RuntimeError, match=r"^checkpoint: a look-ahead step must give the same"):
        loss(fake.requires_grad_(), real)
