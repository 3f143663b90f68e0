"""How the loss and what ``unroll`` returns behave, from the outside."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import Tensor, nn

from tests.oracles import relative_error
from tests.players import batches, called, deep, small, train, with_options
from tests.settings import DEVICE, randn
from tests.snapshot import changes, snapshot
from tests.zoo import Conditional, Projection
from unroll import Hinge, Minimax, UnrolledDiscriminator, UnrolledGeneratorLoss, Wasserstein

LABELS = torch.arange(5, device=DEVICE) % 3


def adam(d: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of most tests."""
    return torch.optim.Adam(d.parameters(), lr=0.01)


def leaf(x: Tensor) -> Tensor:
    """Return a copy that requires a gradient."""
    return x.detach().clone().requires_grad_()


def gradient(loss: UnrolledGeneratorLoss, fake: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Return df_K/dfake."""
    fake = leaf(fake)
    (found,) = torch.autograd.grad(loss(fake, *rest, **options), fake)
    return found


# --- what D takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Conditional, Projection])
@pytest.mark.parametrize("k", [0, 3])
def test_tuples_and_mappings_are_arguments(build: Any, k: int) -> None:
    """The same numbers in every form, bit for bit, and those of a D with its label bound."""
    d = build().to(DEVICE, torch.float64)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=k)
    fake, real = randn(5, 4), randn(5, 4)
    forms: list[Any] = [
        lambda x: (x, LABELS),
        lambda x: {"x": x, "label": LABELS},
        lambda x: {"label": LABELS, "x": x},
    ]
    results = []
    for form in forms:
        x = leaf(fake)
        value = loss(form(x), form(real))
        value.backward()
        results.append((value, x.grad))
    assert all(torch.equal(value, results[0][0]) for value, _ in results)
    assert all(torch.equal(g, results[0][1]) for _, g in results)  # type: ignore[arg-type]
    if k:
        train(d, adam(d), [((fake, LABELS), (real, LABELS))] * k)
    plain = Minimax().generator_loss(called(d), (fake, LABELS), (real, LABELS))
    torch.testing.assert_close(results[0][0], plain, rtol=1e-12, atol=1e-14)


def test_labels_of_fake_and_real_may_differ() -> None:
    d = Conditional().to(DEVICE, torch.float64)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    fake, real = randn(5, 4), randn(5, 4)
    same = loss((leaf(fake), LABELS), (real, LABELS))
    other = loss((leaf(fake), LABELS + 1), (real, LABELS))
    assert not torch.isclose(same, other)


def test_several_differentiable_tensors_in_a_batch() -> None:
    """Soft labels that come from the generator get a gradient as well."""

    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))
            self.to(DEVICE, torch.float64)

        def forward(self, x: Tensor, soft: Tensor, scale: float = 1.0) -> Tensor:
            output: Tensor = self.layer(torch.cat([x, soft], 1)) * scale
            return output

    d = Soft()
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    x, soft = leaf(randn(5, 4)), leaf(randn(5, 3))
    real = {"x": randn(5, 4), "soft": randn(5, 3), "scale": 2.0}
    loss({"x": x, "soft": soft, "scale": 2.0}, real).backward()
    assert x.grad is not None
    assert soft.grad is not None
    loss((randn(5, 4), leaf(soft)), (randn(5, 4), randn(5, 3))).backward()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_real_gets_a_gradient_where_it_wants_one(k: int) -> None:
    """An encoder's output in ``real``; checked with central differences."""
    d = deep(layers=4)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.3), unroll_steps=k)
    fake, real = leaf(randn(5, 4)), leaf(randn(5, 4))
    loss(fake, real).backward()
    assert real.grad is not None
    plain = real.detach()
    assert relative_error(lambda x: loss(fake, x), plain, real.grad, 1) <= 1e-6
    torch.testing.assert_close(gradient(loss, fake, plain), fake.grad, rtol=1e-12, atol=0)


# --- K and the minibatches ------------------------------------------------------------------------


def test_k_is_a_plain_attribute() -> None:
    d, ((fake, real),) = small(), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=0)
    for k in (0, 4, 1, 0):
        loss.unroll_steps = k
        fresh = UnrolledGeneratorLoss(d, adam(d), unroll_steps=k)
        assert torch.equal(loss(leaf(fake), real), fresh(leaf(fake), real))
        assert loss.unroll(fake.requires_grad_(), real).losses.shape == (k,)


@pytest.mark.plain
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("method", ["forward", "unroll"])
def test_exactly_k_minibatches_are_drawn_before_the_first_step(k: int, method: str) -> None:
    d, ((fake, real),) = deep(layers=4), batches(1)
    calls: list[str] = []

    class Watching:
        def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            calls.append("step")
            return Minimax().discriminator_loss(d, fake, real)

        def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
            calls.append("f")
            return Minimax().generator_loss(d, fake, real)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            calls.append("draw")
            yield leaf(fake), real

    source = endless()
    loss = UnrolledGeneratorLoss(d, adam(d), Watching(), unroll_steps=k)
    loss(leaf(fake), real, minibatches=source)  # the first call looks at a step and at f
    calls.clear()
    getattr(loss, method)(leaf(fake), real, minibatches=source)
    assert calls == ["draw"] * k + ["step"] * k + ["f"] * (method == "forward")
    next(source)  # it is still open: nobody closed or exhausted it


def test_minibatches_may_be_lists_and_hold_more() -> None:
    d, ((fake, real), *more) = deep(layers=4), batches(5)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    pairs = [[leaf(f), r] for f, r in more]
    value = loss(leaf(fake), real, minibatches=pairs)
    assert torch.equal(value, loss(leaf(fake), real, minibatches=iter(pairs[:2])))


def test_every_fake_of_the_minibatches_gets_its_gradient() -> None:
    d, ((fake, real), *more) = deep(layers=4), batches(3)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    pairs = [(leaf(f), r) for f, r in more]
    loss(leaf(fake), real, minibatches=pairs).backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f, _ in pairs)


def test_the_same_minibatch_k_times_is_the_fixed_one() -> None:
    d, ((fake, real),) = deep(layers=4), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3)
    x = leaf(fake)
    resampled = loss(x, real, minibatches=[(x, real)] * 3)
    assert torch.equal(resampled, loss(x, real))
    (got,) = torch.autograd.grad(resampled, x)
    torch.testing.assert_close(got, gradient(loss, fake, real), rtol=1e-12, atol=1e-16)


# --- average and stop_gradient --------------------------------------------------------------------


@pytest.mark.parametrize("resampled", [False, True])
def test_average_is_the_mean_of_f_1_to_f_k(resampled: bool) -> None:
    d, ((fake, real), *more) = deep(layers=4), batches(4)
    pairs = [(leaf(f), r) for f, r in more] if resampled else None

    def at(k: int, *, average: bool = False) -> tuple[Tensor, Tensor]:
        loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=k, average=average)
        x = leaf(fake)
        value = loss(x, real, minibatches=pairs)
        return value, torch.autograd.grad(value, x)[0]

    values, gradients = zip(*(at(k) for k in (1, 2, 3)), strict=True)
    value, found = at(3, average=True)
    torch.testing.assert_close(value, torch.stack(values).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, torch.stack(gradients).mean(0), rtol=1e-12, atol=1e-16)
    assert torch.equal(at(1, average=True)[0], values[0])
    assert torch.equal(at(0, average=True)[0], at(0)[0])
    assert not torch.isclose(value, values[2])


def test_average_does_not_matter_to_unroll() -> None:
    d, ((fake, real),) = deep(layers=4), batches(1)
    one, two = (
        UnrolledGeneratorLoss(d, adam(d), unroll_steps=2, average=average).unroll(leaf(fake), real)
        for average in (False, True)
    )
    assert all(torch.equal(one.parameters[n], two.parameters[n]) for n in one.parameters)


def test_stop_gradient_is_the_first_term() -> None:
    """The gradient of G's loss at D after K real steps, and not the full one."""
    d, ((fake, real),) = deep(layers=4), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3, stop_gradient=True)
    got = gradient(loss, fake, real)
    full = gradient(with_options(loss, stop_gradient=False), fake, real)
    train(d, adam(d), [(fake, real)] * 3)
    x = leaf(fake)
    (wanted,) = torch.autograd.grad(Minimax().generator_loss(d, x, real), x)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-15)
    assert (full - wanted).norm() > 1e-3 * wanted.norm()


def test_stop_gradient_takes_detached_minibatches() -> None:
    d, ((fake, real), *more) = deep(layers=4), batches(3)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2, stop_gradient=True)
    loss(leaf(fake), real, minibatches=more).backward()


# --- the unrolled discriminator -------------------------------------------------------------------


def test_it_is_a_discriminator() -> None:
    """Callable like D, at theta_D^K, with mappings of parameters and buffers."""
    d, ((fake, real),) = small(), batches(1)
    optimizer = adam(d)
    ahead = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3).unroll(leaf(fake), real)
    assert isinstance(ahead, UnrolledDiscriminator)
    assert list(ahead.parameters) == [name for name, _ in d.named_parameters()]
    assert list(ahead.buffers) == [name for name, _ in d.named_buffers()]
    assert all(p.requires_grad for p in ahead.parameters.values())
    assert not any(b.requires_grad for b in ahead.buffers.values())
    results = [*ahead.parameters.values(), *ahead.buffers.values()]
    before = snapshot(d, optimizer, results)
    output = ahead(real)
    assert torch.equal(ahead(real), output)
    assert torch.equal(ahead(input=real), output)
    assert not changes(before, d, optimizer, results)
    train(d, optimizer, [(fake, real)] * 3)
    torch.testing.assert_close(output, d(real), rtol=1e-12, atol=1e-14)


def test_its_outputs_differentiate_to_the_fakes() -> None:
    """f_K by hand from ``unroll`` is ``forward``."""
    d, ((fake, real),) = small(), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3)
    x = leaf(fake)
    ahead = loss.unroll(x, real)
    value = Minimax().generator_loss(ahead, x, real)
    assert torch.equal(value, loss(leaf(fake), real))
    (got,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got, gradient(loss, fake, real), rtol=1e-12, atol=1e-16)
    assert torch.autograd.grad(ahead.parameters["3.weight"].sum(), leaf(fake), allow_unused=True)


@pytest.mark.parametrize("how", ["detached", "stop_gradient", "no_grad"])
@pytest.mark.filterwarnings("ignore:objective. discriminator_loss does not depend:UserWarning")
def test_constants_where_no_graph_is_asked_for(how: str) -> None:
    d, ((fake, real),) = small(), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3, stop_gradient=how == "stop_gradient")
    x = fake if how == "detached" else leaf(fake)
    with torch.set_grad_enabled(how != "no_grad"):
        ahead = loss.unroll(x, real)
    held = [*ahead.parameters.values(), *ahead.buffers.values(), ahead.losses]
    held += [t for t in torchopt.pytree.tree_leaves(ahead.optimizer_state) if isinstance(t, Tensor)]
    assert not any(t.requires_grad for t in held)
    full = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3).unroll(leaf(fake), real)
    for name, parameter in full.parameters.items():
        torch.testing.assert_close(ahead.parameters[name], parameter.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [Minimax(), Hinge()], ids=repr)
def test_losses_are_ds_before_each_step(objective: Any) -> None:
    d, pairs = small(), batches(4)
    optimizer = adam(d)
    loss = UnrolledGeneratorLoss(d, optimizer, objective, unroll_steps=4)
    ahead = loss.unroll(*pairs[0], minibatches=[(leaf(fake), real) for fake, real in pairs])
    assert ahead.losses.shape == (4,)
    assert not ahead.losses.requires_grad
    wanted = []
    for fake, real in pairs:
        wanted.append(objective.discriminator_loss(copy.deepcopy(d), fake, real).detach())
        train(d, optimizer, [(fake, real)], objective)
    torch.testing.assert_close(ahead.losses, torch.stack(wanted), rtol=1e-12, atol=0)


def test_without_steps_it_is_d() -> None:
    d, ((fake, real),) = small(), batches(1)
    ahead = UnrolledGeneratorLoss(d, adam(d), unroll_steps=0).unroll(leaf(fake), real)
    assert ahead.losses.shape == (0,)
    assert all(torch.equal(ahead.parameters[n], p) for n, p in d.named_parameters())
    assert torch.equal(ahead(real), copy.deepcopy(d)(real))
    assert "parameters" in repr(ahead)


# --- project --------------------------------------------------------------------------------------


def clip(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """WGAN's weight clipping."""
    return {name: p.clamp(-0.1, 0.1) for name, p in parameters.items()}


@pytest.mark.parametrize("k", [0, 1, 3])
def test_project_is_the_real_steps_clipping(k: int) -> None:
    d, ((fake, real),) = deep(layers=4), batches(1)
    trained = torch.optim.SGD(d.parameters(), lr=0.5, momentum=0.9)
    loss = UnrolledGeneratorLoss(d, trained, Wasserstein(), unroll_steps=k, project=clip)
    ahead = loss.unroll(leaf(fake), real)
    for _ in range(k):
        train(d, trained, [(fake, real)], Wasserstein())
        with torch.no_grad():
            for parameter in d.parameters():
                parameter.clamp_(-0.1, 0.1)
    for name, parameter in d.named_parameters():
        torch.testing.assert_close(ahead.parameters[name], parameter, rtol=1e-12, atol=1e-14)


def test_project_is_differentiated_through() -> None:
    """Row normalisation, checked with central differences."""

    def normalise(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["4.weight"]
        return {**parameters, "4.weight": weight / weight.norm(dim=1, keepdim=True)}

    d, ((fake, real),) = deep(layers=4), batches(1)
    sgd = torch.optim.SGD(d.parameters(), lr=0.3)
    loss = UnrolledGeneratorLoss(d, sgd, unroll_steps=3, project=normalise)
    found = gradient(loss, fake, real)
    assert relative_error(lambda x: loss(x, real), fake, found, 1) <= 1e-6
    free = UnrolledGeneratorLoss(d, sgd, unroll_steps=3)
    assert not torch.isclose(loss(leaf(fake), real), free(leaf(fake), real))


# --- the module -----------------------------------------------------------------------------------


def test_it_owns_nothing() -> None:
    d = small()
    objective = torch.nn.Module()
    objective.discriminator_loss = Minimax().discriminator_loss  # type: ignore[assignment]
    objective.generator_loss = Minimax().generator_loss  # type: ignore[assignment]
    for own in (Minimax(), objective):
        loss = UnrolledGeneratorLoss(d, adam(d), own, unroll_steps=1)  # type: ignore[arg-type]
        assert list(loss.parameters()) == []
        assert list(loss.buffers()) == []
        assert list(loss.children()) == []
        assert len(loss.state_dict()) == 0
        loss.load_state_dict({})
        d.train()
        loss.eval()
        assert d.training
        before = snapshot(d)
        loss.to(torch.float16).requires_grad_(False).zero_grad()
        assert not changes(before, d)


def test_a_model_that_holds_the_loss_does_not_hold_d() -> None:
    """As in a LightningModule that has both as attributes."""
    model = nn.Module()
    model.d = small()
    model.loss = UnrolledGeneratorLoss(model.d, adam(model.d), unroll_steps=1)
    assert all(key.startswith("d.") for key in model.state_dict())
    assert len(list(model.parameters())) == len(list(model.d.parameters()))


@pytest.mark.parametrize(
    "name",
    ["discriminator", "optimizer", "objective", "project", "average", "unrol_steps", "compile"],
)
def test_nothing_but_k_is_assigned(name: str) -> None:
    d = small()
    loss: Any = UnrolledGeneratorLoss(d, adam(d), unroll_steps=1)
    before = dict(vars(loss))
    with pytest.raises(
        AttributeError, match=rf"^{name}: cannot be assigned, .*only unroll_steps.*got 3"
    ):
        setattr(loss, name, 3)
    assert vars(loss) == before
    loss.unroll_steps = np.int64(4)
    assert type(loss.unroll_steps) is int
    with pytest.raises(ValueError, match=r"unroll_steps: must be at least 0; got -1"):
        loss.unroll_steps = -1
    assert loss.unroll_steps == 4


def test_what_a_module_does_to_its_children_is_allowed() -> None:
    d, ((fake, real),) = small(), batches(1)
    model = nn.ModuleDict({"loss": UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)})
    wanted = model["loss"](leaf(fake), real)
    model.train(False).eval().to(torch.float64).requires_grad_(False).zero_grad()
    model["loss"].compile(backend="eager")
    for loss in (
        model["loss"],
        copy.deepcopy(model["loss"]),
        pickle.loads(pickle.dumps(model["loss"])),
    ):
        assert torch.equal(loss(leaf(fake), real), wanted)


def test_repr_says_what_it_does() -> None:
    d = small()
    loss = UnrolledGeneratorLoss(d, adam(d), Hinge(), unroll_steps=7, stop_gradient=True)
    for part in ("Sequential", "Adam", "Hinge()", "unroll_steps=7", "stop_gradient=True"):
        assert part in repr(loss)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_stay_connected(way: str) -> None:
    """A copy's optimizer trains the copy's D: the same value, then independent lives."""
    d, ((fake, real),) = small(), batches(1)
    optimizer = adam(d)
    train(d, optimizer, batches(2, seed=1))
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    copied = copy.deepcopy(loss) if way == "deepcopy" else pickle.loads(pickle.dumps(loss))
    assert torch.equal(copied(leaf(fake), real), loss(leaf(fake), real))
    value = loss(leaf(fake), real)
    train(copied.discriminator, copied.optimizer, batches(2, seed=2))
    assert torch.equal(loss(leaf(fake), real), value)
    assert not torch.equal(copied(leaf(fake), real), value)


def test_calls_are_repeatable() -> None:
    d, ((fake, real),) = small(), batches(1)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=3)
    first, second = (gradient(loss, fake, real) for _ in range(2))
    assert torch.equal(first, second)


def test_two_values_before_any_backward() -> None:
    """Graphs of separate calls are separate."""
    d, pairs = small(), batches(2)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    leaves = [leaf(fake) for fake, _ in pairs]
    values = [loss(x, real) for x, (_, real) in zip(leaves, pairs, strict=True)]
    torch.autograd.backward(torch.stack(values).sum())
    for x, (fake, real) in zip(leaves, pairs, strict=True):
        torch.testing.assert_close(x.grad, gradient(loss, fake, real), rtol=1e-12, atol=0)


def test_real_training_between_value_and_backward() -> None:
    """The look-ahead is on private copies: D may step before f_K is differentiated."""
    d, ((fake, real),) = small(), batches(1)
    optimizer = adam(d)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    wanted = gradient(loss, fake, real)
    x = leaf(fake)
    value = loss(x, real)
    train(d, optimizer, batches(2, seed=3))
    value.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_positional_arguments_are_the_documented_ones() -> None:
    d = small()
    with pytest.raises(TypeError, match="positional"):
        UnrolledGeneratorLoss(d, adam(d), Minimax(), 3)  # type: ignore[call-arg]


# --- compiled D, mixed precision, default dtype ---------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["wrapped", "method", "inner"])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_d(backend: str, form: str) -> None:
    """It runs uncompiled in the look-ahead, and is compiled again afterwards."""
    torch._dynamo.reset()
    d, ((fake, real),) = deep(layers=4), batches(1)
    optimizer = adam(d)
    wanted = gradient(UnrolledGeneratorLoss(d, optimizer, unroll_steps=2), fake, real)
    compiled: nn.Module = d
    if form == "wrapped":
        compiled = torch.compile(d, backend=backend)  # type: ignore[assignment]
    elif form == "method":
        d.compile(backend=backend)
    else:
        inner: Any = torch.compile(d, backend=backend)
        compiled = nn.Sequential(inner)
        optimizer = adam(compiled)
    compiled(real).mean().backward()
    loss = UnrolledGeneratorLoss(compiled, optimizer, unroll_steps=2)
    got = gradient(loss, fake, real)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-16)
    if form == "wrapped":
        names = list(loss.unroll(leaf(fake), real).parameters)
        assert names == [name for name, _ in d.named_parameters()]
    torch.testing.assert_close(compiled(real), d(real), rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Adam", "SGD", "torchopt"])
def test_autocast(name: str) -> None:
    """The forward passes are bfloat16; parameters and optimizer stay float32."""
    torch.manual_seed(1)
    d = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1)).to(DEVICE)
    builds: dict[str, Any] = {
        "Adam": lambda: torch.optim.Adam(d.parameters(), lr=0.01),
        "SGD": lambda: torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9),
        "torchopt": lambda: torchopt.Adam(d.parameters(), lr=0.01),
    }
    optimizer = builds[name]()
    fake, real = (torch.randn(64, 8, device=DEVICE) for _ in range(2))
    train(d, optimizer, [(fake, real)] * 3)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3)
    wanted = gradient(loss, fake, real)
    dtypes: set[torch.dtype] = set()

    def look(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        dtypes.update(p.dtype for p in parameters.values())
        dtypes.add((parameters["0.weight"] @ parameters["0.weight"].T).dtype)
        return parameters

    half = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, project=look)
    before = snapshot(d, optimizer)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        x = leaf(fake)
        value = half(x, real)
    value.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert dtypes == {torch.float32}, "the optimizer's arithmetic runs outside of autocast"
    cosine = nn.functional.cosine_similarity(x.grad.flatten(), wanted.flatten(), dim=0)
    assert 0.99 <= cosine.item() < 1
    assert not torch.equal(x.grad, wanted)
    assert not changes(before, d, optimizer)


def test_a_grad_scaler_scales_the_value_alone() -> None:
    d, ((fake, real),) = small(torch.float32), batches(1, torch.float32)
    loss = UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    x = leaf(fake)
    scaler.scale(loss(x, real)).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad / 1024, gradient(loss, fake, real), rtol=1e-5, atol=1e-8)


def test_dropout_draws_from_the_global_generator() -> None:
    d = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).to(DEVICE, torch.float64)
    ((fake, real),) = batches(1)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), lr=0.1), unroll_steps=2)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(loss(leaf(fake), real))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    torch.manual_seed(0)
    loss(leaf(fake), real)
    first = torch.rand(())
    torch.manual_seed(0)
    UnrolledGeneratorLoss(d, adam(d), unroll_steps=2)(leaf(fake), real)
    assert torch.equal(torch.rand(()), first), "the first call draws no more than later ones"


@pytest.mark.parametrize("wrapper", [nn.DataParallel])
def test_a_data_parallel_d_is_unwrapped(wrapper: Any) -> None:
    d, ((fake, real),) = small(), batches(1)
    optimizer = adam(d)
    wanted = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)(leaf(fake), real)
    got = UnrolledGeneratorLoss(wrapper(d), optimizer, unroll_steps=2)(leaf(fake), real)
    assert torch.equal(got, wanted)


def test_minibatches_may_be_slots_of_one_buffer() -> None:
    d, ((fake, real),), slots = small(), batches(1), randn(3, 6, 4)
    loss = UnrolledGeneratorLoss(d, torch.optim.SGD(d.parameters(), 0.1), unroll_steps=3)

    def filled() -> Iterator[tuple[Tensor, Tensor]]:
        for slot in slots.clone():
            yield fake, slot.mul_(1)

    pairs = [(fake, slot) for slot in slots]
    wanted, found = (loss.unroll(fake, real, minibatches=m).losses for m in (pairs, filled()))
    assert torch.equal(wanted, found)
