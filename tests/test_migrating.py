"""The diffs of the docs: both sides run, and give the gradients that the text says."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import relative_error

DOCS = Path(__file__).parents[1] / "docs"
PAGE = "\n".join((DOCS / f"{name}.md").read_text() for name in ("migrating", "frameworks"))
SETUP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
PLAIN = "A plain GAN loop"
RESTORED = "A look-ahead by copy and restore"
HIGHER = "higher"
META = "torchopt.MetaAdam"
LIGHTNING = "Lightning"
ACCELERATE = "Accelerate"
ACCUMULATION = "Gradient accumulation"
MIXED = "Mixed precision"

ADAM = "torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.5, 0.999))"
SGD = "d_optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.3)\n"
MOMENTUM = SGD.replace("lr=0.3", "lr=0.3, momentum=0.9")
BATCH_NORM = f"""
norm = nn.BatchNorm1d(32)
first = nn.Linear(2, 32, bias=False)  # a bias before the norm has only round-off as gradient
discriminator = nn.Sequential(first, norm, nn.LeakyReLU(0.2), nn.Linear(32, 1))
d_optimizer = {ADAM}
"""
Names = dict[str, Any]


def sides(diff: str) -> tuple[str, str]:
    """Return the programs before and after."""
    lines = diff.splitlines()
    assert all(not line or line[0] in " +-" for line in lines)
    before, after = (
        "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+"
    )
    return before, after


def sections() -> dict[str, str]:
    """Return the diffs by the heading that they stand under: one each."""
    found: dict[str, str] = {}
    for section in PAGE.split("\n## ")[1:]:
        diffs = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
        assert len(diffs) <= 1
        found |= {section.splitlines()[0]: diff for diff in diffs}
    return found


DIFFS = {heading: sides(diff) for heading, diff in sections().items()}


def edit(program: str, old: str, new: str) -> str:
    assert program.count(old) == 1, f"the page has changed: {old!r}"
    return program.replace(old, new)


def run(
    program: str,
    change: str = "",
    *,
    batches: int = 3,
    dtype: torch.dtype = torch.float64,
    **names: Any,
) -> Names:
    """Run a program after the page's setup and a change to it; return its names."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        exec(SETUP, names)
        exec(change, names)
        names["data"] = names["data"][:batches]
        exec(compile(program, "docs/migrating.md", "exec"), names)
    finally:
        torch.set_default_dtype(torch.float32)
    return names


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(names: Names) -> Tensor:
    """The generator's, in the last step."""
    return flat(p.grad for p in names["generator"].parameters())


def d_gradient(names: Names) -> Tensor:
    return flat(p.grad for p in names["discriminator"].parameters())


def difference(one: Names, other: Names) -> float:
    """Largest relative difference between the generators' gradients and between the players."""
    players = [
        (flat(one[player].parameters()), flat(other[player].parameters()))
        for player in ("generator", "discriminator")
    ]
    pairs = [(gradient(one), gradient(other)), *players]
    return float(max((a - b).norm() / b.norm() for a, b in pairs))


def test_all_diffs_of_the_pages_are_run_here() -> None:
    names = [PLAIN, RESTORED, HIGHER, META, LIGHTNING, ACCELERATE, ACCUMULATION, MIXED]
    assert list(DIFFS) == names


# A plain GAN loop


def test_plain_loop_is_unchanged_at_k_0() -> None:
    before, after = DIFFS[PLAIN]
    old, new = run(before), run(edit(after, "unroll_steps=5", "unroll_steps=0"))
    assert difference(new, old) == 0.0


def test_plain_loop_gets_another_gradient_at_k_5() -> None:
    before, after = DIFFS[PLAIN]
    old, new = gradient(run(before, batches=1)), gradient(run(after, batches=1))
    assert (new - old).norm() > 0.01 * old.norm()


def test_plain_loop_left_more_behind_in_d() -> None:
    before, after = DIFFS[PLAIN]
    old, new = run(before, BATCH_NORM), run(after, BATCH_NORM)
    assert old["norm"].num_batches_tracked == 3 * 3
    assert new["norm"].num_batches_tracked == 3 * 2

    own = edit(before, "    g_loss.backward()\n    g_optimizer.step()", "    pass")
    expected, collected, left = (d_gradient(run(p, batches=1)) for p in (own, before, after))
    assert torch.equal(left, expected)
    assert not torch.allclose(collected, expected)


# A look-ahead by copy and restore

SAVE = "    saved = copy.deepcopy(discriminator.state_dict())\n"
RESTORE = "    discriminator.load_state_dict(saved)"


def restoring_the_optimizer(program: str) -> str:
    saved = "    saved_optimizer = copy.deepcopy(d_optimizer.state_dict())\n"
    program = edit(program, SAVE, SAVE + saved)
    return edit(program, RESTORE, RESTORE + "\n    d_optimizer.load_state_dict(saved_optimizer)")


@pytest.mark.parametrize("change", ["", BATCH_NORM, MOMENTUM])
def test_copy_and_restore_is_the_first_term(change: str) -> None:
    before, after = DIFFS[RESTORED]
    old, new = run(before, change, batches=1), run(after, change, batches=1)
    assert difference(new, old) < 1e-12
    without_graph = edit(before, "    fake = generator", "    fake = again = generator")
    without_graph = edit(
        without_graph,
        "d_loss = d_loss + criterion(discriminator(fake.detach())",
        "with torch.no_grad():\n            again = fake + 0\n"
        "        d_loss = d_loss + criterion(discriminator(again)",
    )
    assert difference(run(without_graph, change, batches=1), old) == 0.0


def test_copy_and_restore_misses_the_second_term() -> None:
    before, after = DIFFS[RESTORED]
    full = "\n".join(line for line in after.splitlines() if "stop_gradient" not in line)
    old, new = gradient(run(before, SGD, batches=1)), gradient(run(full, SGD, batches=1))
    assert (new - old).norm() > 0.01 * new.norm()
    assert torch.equal(new, gradient(run(DIFFS[PLAIN][1], SGD, batches=1)))


def test_copy_and_restore_leaks_the_moments_of_adam() -> None:
    before, after = DIFFS[RESTORED]
    old, new = run(before), run(after)
    assert {int(s["step"]) for s in old["d_optimizer"].state.values()} == {3 * 6}
    assert {int(s["step"]) for s in new["d_optimizer"].state.values()} == {3}
    assert difference(new, old) > 1e-5
    assert difference(new, run(restoring_the_optimizer(before))) < 1e-12


def test_copy_and_restore_agrees_over_the_run_without_an_optimizer_state() -> None:
    before, after = DIFFS[RESTORED]
    assert difference(run(after, SGD), run(before, SGD)) < 1e-12
    assert difference(run(after, MOMENTUM), run(before, MOMENTUM)) > 1e-5


def test_a_deep_copy_that_is_assigned_back_is_never_trained() -> None:
    before, _ = DIFFS[RESTORED]
    swapping = edit(before, SAVE, "    saved = copy.deepcopy(discriminator)\n")
    swapping = edit(swapping, RESTORE, "    discriminator = saved")
    once, often = run(swapping, batches=1), run(swapping, batches=3)
    d = often["discriminator"]
    held = {id(p) for group in often["d_optimizer"].param_groups for p in group["params"]}
    assert held.isdisjoint(map(id, d.parameters()))
    assert torch.equal(flat(d.parameters()), flat(once["discriminator"].parameters()))


def test_copying_parameters_back_leaks_batch_norm() -> None:
    before, after = DIFFS[RESTORED]
    parameters_only = edit(
        edit(before, "discriminator.state_dict()", "list(discriminator.parameters())"),
        RESTORE,
        "    with torch.no_grad():\n"
        "        for p, s in zip(discriminator.parameters(), saved, strict=True):\n"
        "            p.copy_(s)",
    )
    assert run(parameters_only, BATCH_NORM)["norm"].num_batches_tracked == 3 * (2 + 5 * 2 + 1)
    old, new = run(before, BATCH_NORM, batches=1), run(after, BATCH_NORM, batches=1)
    assert torch.equal(old["norm"].running_mean, new["norm"].running_mean)


# higher


@pytest.mark.parametrize("change", [SGD, MOMENTUM])
def test_higher_with_sgd_gives_the_same_gradients(change: str) -> None:
    before, after = DIFFS[HIGHER]
    assert after == DIFFS[PLAIN][1], "so this is the gradient of the first diff, too"
    assert difference(run(after, change), run(before, change)) < 1e-12


def test_higher_with_adam_differs_by_where_eps_goes() -> None:
    before, after = DIFFS[HIGHER]
    assert 1e-8 < difference(run(after), run(before)) < 1e-4
    tiny = f"d_optimizer = {edit(ADAM, 'lr=lr', 'lr=lr, eps=1e-30')}\n"
    assert difference(run(after, tiny), run(before, tiny)) < 1e-12


def test_higher_refuses_adamw() -> None:
    before, after = DIFFS[HIGHER]
    adamw = f"d_optimizer = {edit(ADAM, 'Adam', 'AdamW')}\n"
    with pytest.raises(ValueError, match="not supported by higher"):
        run(before, adamw)
    assert gradient(run(after, adamw)).isfinite().all()


SPECTRAL = f"""
from torch.nn.utils.parametrizations import spectral_norm
discriminator = nn.Sequential(
    spectral_norm(nn.Linear(2, 32)), nn.Tanh(), spectral_norm(nn.Linear(32, 1))
)
{SGD}
"""


@pytest.mark.parametrize("side", [0, 1])
def test_higher_is_wrong_on_spectral_norm(side: int) -> None:
    program = edit(DIFFS[HIGHER][side], "    d_optimizer.step()", "    pass")
    program = edit(program, "generator(torch.randn(64, 8))", "given")

    def at(fake: Tensor) -> Names:
        given = fake.detach().requires_grad_()
        with torch.enable_grad():
            return run(
                edit(program, "    g_optimizer.step()", "    pass"),
                SPECTRAL,
                batches=1,
                given=given,
            )

    fake = torch.randn(64, 2, dtype=torch.float64)
    found = at(fake)["given"].grad
    error = relative_error(lambda x: at(x)["g_loss"].detach(), fake, found, directions=1)
    assert error > 1e-4 if side == 0 else error < 1e-7


# torchopt.MetaAdam


def test_meta_adam_gives_the_same_gradients() -> None:
    before, after = DIFFS[META]
    assert difference(run(after), run(before)) < 1e-12


def test_the_optimizer_of_d_starts_from_its_own_moments() -> None:
    after = DIFFS[META][1]
    bare = "torchopt.adam(lr, betas=(0.5, 0.999))"
    assert difference(run(edit(after, bare, "d_optimizer")), run(after)) > 1e-5
    live = edit(after, bare, "d_optimizer")
    assert difference(run(live), run(DIFFS[PLAIN][1])) == 0.0
    meta = edit(after, bare, "torchopt.MetaAdam(discriminator, lr=lr, betas=(0.5, 0.999))")
    assert difference(run(meta), run(after)) < 1e-12


DEAD = f"""
discriminator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
nn.init.constant_(discriminator[0].bias[:1], -100.0)
d_optimizer = {ADAM}
"""


def test_meta_adam_is_nan_at_a_dead_unit() -> None:
    before, after = DIFFS[META]
    assert not gradient(run(before, DEAD, batches=1)).isfinite().all()
    assert gradient(run(after, DEAD)).isfinite().all()
    rooted = edit(before, "0.999))", "0.999), eps_root=1e-16)")
    assert gradient(run(rooted, DEAD)).isfinite().all()


def test_meta_adam_left_more_behind_in_d() -> None:
    before, after = DIFFS[META]
    old, new = run(before, BATCH_NORM, batches=1), run(after, BATCH_NORM, batches=1)
    assert old["norm"].num_batches_tracked == 2 + 5 * 2 + 1
    assert new["norm"].num_batches_tracked == 2
    assert not torch.allclose(d_gradient(old), d_gradient(new))


# Lightning and Accelerate, by stand-ins with what a GAN uses of them; tests/frameworks has the real


class LightningOptimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


class LightningModule(nn.Module):
    automatic_optimization = True

    def optimizers(self) -> list[LightningOptimizer]:
        configured: Any = self.configure_optimizers
        return [LightningOptimizer(optimizer) for optimizer in configured()]

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def toggle_optimizer(self, optimizer: LightningOptimizer) -> None:
        own = {id(p) for group in optimizer.optimizer.param_groups for p in group["params"]}
        for p in self.parameters():
            p.requires_grad_(id(p) in own)

    def untoggle_optimizer(self, _: LightningOptimizer) -> None:
        self.requires_grad_(True)


class AcceleratedOptimizer(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step  # type: ignore[method-assign]


class Accelerator:
    def __init__(self, *, cpu: bool) -> None:
        assert cpu

    def prepare(self, *objects: Any) -> list[Any]:
        optimizers = torch.optim.Optimizer
        return [AcceleratedOptimizer(o) if isinstance(o, optimizers) else o for o in objects]

    def backward(self, loss: Tensor) -> None:
        loss.backward()


FIT = """
module = GAN()
getattr(module, "on_fit_start", lambda: None)()
for batch in data:
    module.training_step(batch)
"""


@pytest.mark.parametrize("framework", [LIGHTNING, ACCELERATE])
def test_frameworks_give_the_gradients_of_the_plain_loop(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, member in (("lightning", LightningModule), ("accelerate", Accelerator)):
        module: Any = types.ModuleType(name)
        setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    for program, plain in zip(DIFFS[framework], DIFFS[PLAIN], strict=True):
        names = run(program + (FIT if framework == LIGHTNING else ""))
        assert difference(names, run(plain)) == 0.0
    if framework == LIGHTNING:
        keys = {k.split(".")[0] for k in names["module"].state_dict()}
        assert keys == {"generator", "discriminator"}


# Gradient accumulation


def test_accumulated_look_aheads_are_those_of_the_parts() -> None:
    before, after = DIFFS[ACCUMULATION]
    plain = run(DIFFS[PLAIN][0])
    at_zero = edit(after, "unroll_steps=5", "unroll_steps=0")
    assert difference(run(at_zero), run(before)) == 0.0
    assert difference(run(at_zero), plain) < 1e-12
    one_part = run(DIFFS[PLAIN][1], batches=1), run(after, batches=1)
    assert difference(*one_part) > 1e-6


def test_look_aheads_leave_what_d_has_accumulated() -> None:
    before, after = DIFFS[ACCUMULATION]
    own, collected, left = (
        d_gradient(run(p, batches=1))
        for p in (edit(before, "(g_loss / 4).backward()", "pass"), before, after)
    )
    assert torch.equal(left, own)
    assert not torch.allclose(collected, own)


# Mixed precision


def test_mixed_precision() -> None:
    after = DIFFS[MIXED][1]
    scaled = run(after, batches=1, dtype=torch.float32)
    off = edit(after, "GradScaler(device)", "GradScaler(device, enabled=False)")
    assert torch.equal(gradient(scaled), gradient(run(off, batches=1, dtype=torch.float32)))
    full = after.replace("dtype=torch.bfloat16", "enabled=False")
    exact = gradient(run(full, batches=1, dtype=torch.float32))
    assert torch.equal(exact, gradient(run(DIFFS[PLAIN][1], batches=1, dtype=torch.float32)))
    cosine = torch.cosine_similarity(gradient(scaled), exact, dim=0)
    assert 0.99 < cosine < 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ahead = scaled["unrolled"].unroll(scaled["fake"].detach(), scaled["data"][0])
    assert {p.dtype for p in ahead.parameters.values()} == {torch.float32}


def test_mixed_precision_is_unchanged_at_k_0() -> None:
    before, after = DIFFS[MIXED]
    at_zero = edit(after, "unroll_steps=5", "unroll_steps=0")
    assert difference(run(at_zero, dtype=torch.float32), run(before, dtype=torch.float32)) == 0.0
