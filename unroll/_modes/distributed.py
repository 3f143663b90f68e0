"""The look-ahead of many ranks: one game over the global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unroll._functional import Pair, tensors


class Ranks(NamedTuple):
    """Over which ranks gradients are averaged, and of which parameters."""

    group: Any = None  # of processes; None is the world
    apart: frozenset[str] = frozenset()  # parameters of D that stay a rank's own


def resolved_sync(discriminator: nn.Module, module: nn.Module, sync: object) -> tuple[bool, Ranks]:
    """Return whether gradients are averaged over ranks, and how; ``module`` is D itself."""
    if sync is not None and not isinstance(sync, bool):
        raise TypeError(
            f"sync: must be True, False or None; got {sync!r}. None averages over ranks where the "
            "discriminator is wrapped in DistributedDataParallel."
        )
    # Wrappers of D, or parts of a D that wraps them itself.
    found = [m for m in discriminator.modules() if isinstance(m, DistributedDataParallel)]
    if found:
        averaged = {
            id(p)
            for part in found
            for path, layer in part.module.named_modules()
            for name, p in layer.named_parameters(recurse=False)
            if f"{path}.{name}" not in part.parameters_to_ignore  # as it asks itself
        }
        apart = frozenset(name for name, p in module.named_parameters() if id(p) not in averaged)
        return sync is not False, Ranks(found[0].process_group, apart)
    if sync and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "sync: must not be True without a process group; torch.distributed is not initialised. "
            "Call torch.distributed.init_process_group first, or leave sync out."
        )
    return bool(sync), Ranks()


class _MeanOverRanks(torch.autograd.Function):
    """The mean over ranks: linear and symmetric, so that its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, *reached: Tensor) -> Tensor:
        ctx.group, ctx.reached = group, len(reached)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _MeanOverRanks.apply(grad, ctx.group), None, *[None] * ctx.reached


def averaged(
    gradients: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    pair: Pair,
    *,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the gradients of all ranks, averaged, in one collective.

    A parameter that got a gradient on some ranks only counts as zero on the others.
    """
    moving = {name: p for name, p in moving.items() if name not in ranks.apart}
    if not moving:
        return dict(gradients)
    dtype = reduce(torch.promote_types, [p.dtype for p in moving.values()])
    parts = [gradients.get(name, torch.zeros_like(p)).reshape(-1) for name, p in moving.items()]
    present = torch.tensor([float(name in gradients) for name in moving], device=parts[0].device)
    flat = torch.cat([part.to(dtype) for part in [*parts, present]])
    # All ranks run the same backward pass, those whose gradients are constant too.
    reached = [t for t in (*tensors(pair), *moving.values()) if t.requires_grad]
    *means, counts = torch.split(
        _MeanOverRanks.apply(flat, ranks.group, *reached), [p.numel() for p in [*parts, present]]
    )
    return {name: g for name, g in gradients.items() if name in ranks.apart} | {
        name: mean.view(p.shape).to(p.dtype)
        for (name, p), mean, count in zip(moving.items(), means, counts.tolist(), strict=True)
        if count
    }


def agreed(
    draw: Callable[[], list[Any]], settings: Mapping[str, bool], module: nn.Module, ranks: Ranks
) -> list[Any]:
    """Return what ``draw`` does, after all ranks have said that they will take the same steps."""
    pairs: list[Any] = []
    failure: Exception | None = None
    try:
        pairs = draw()
    except Exception as error:  # told to the other ranks first, which would wait for this one
        failure = error
    device = next(module.parameters()).device
    mine = torch.tensor([len(pairs), failure is not None, *settings.values()], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(ranks.group))]
    dist.all_gather(everyone, mine, group=ranks.group)
    if failure is not None:
        raise failure
    rows = [rank.tolist() for rank in everyone]
    if any(row != rows[0] for row in rows):
        names = ["unroll_steps", "failed", *settings]
        said = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        differing = "; ".join(f"{k}: {v}" for k, v in said.items() if len(set(v)) > 1)
        raise RuntimeError(
            "sync: all ranks must take the same look-ahead steps; by rank, these differ: "
            f"{differing}. Give every rank the same unroll_steps, minibatches and options, or set "
            "sync=False."
        )
    return pairs
