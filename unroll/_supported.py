"""What a discriminator must be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.spectral_norm import SpectralNorm


def _unwrapped(module: Any) -> nn.Module:
    """Return what wrappers of ``torch.compile``, data parallelism and Fabric hold."""
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before it is imported
    while True:
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            module = module._orig_mod
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif type(module).__name__ == "_FabricModule":  # holds Fabric's DistributedDataParallel
            module = module.get_submodule("_forward_module")
        else:
            return module  # type: ignore[no-any-return]


def checked_discriminator(discriminator: object) -> nn.Module:
    """Return the user's own module inside all wrappers, or refuse it."""
    if not isinstance(discriminator, nn.Module):
        raise TypeError(
            "discriminator: must be an nn.Module; got "
            f"{type(discriminator).__name__}. Pass the module whose parameters are trained."
        )
    module = _unwrapped(discriminator)
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            raise TypeError(
                f"discriminator: a torch.jit module ({name or 'the discriminator itself'}) cannot "
                "run with parameters other than its own. Pass the nn.Module it was made from."
            )
        if type(submodule).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise TypeError(
                f"discriminator: {name or 'the discriminator itself'} is quantised, and rounding "
                "has no derivative. Pass the floating-point module from before the quantisation."
            )
        if any(c.__module__.startswith("torch.distributed.fsdp") for c in type(submodule).__mro__):
            raise TypeError(
                f"discriminator: {name or 'the discriminator itself'} is sharded by FSDP, whose "
                "gathering hooks have no second derivative. Wrap D in DistributedDataParallel."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, (UninitializedParameter, UninitializedBuffer)):
            raise ValueError(
                f"discriminator: parameter {name!r} is not initialised yet (a lazy module). Run "
                "one batch through the discriminator before wrapping it."
            )
        if parameter.is_meta:
            raise ValueError(
                f"discriminator: parameter {name!r} is on the meta device, where it has no values. "
                "Give it some first: D.to_empty(device=...) and D.load_state_dict(...)."
            )
        if parameter.is_complex():
            raise TypeError(
                f"discriminator: parameter {name!r} is complex, which the look-ahead does not "
                "support. Store its real and imaginary parts."
            )
    _refuse_shared_memory(module)
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"discriminator: must have parameters to look ahead with; {type(module).__name__} has "
            "none. Pass the module whose parameters the optimizer trains."
        )
    return module


def overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have elements in common."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    layouts = [(t.shape, t.stride(), t.storage_offset()) for t in (one, other)]
    ends = [
        offset + 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        for shape, steps, offset in layouts
    ]
    if max(offset for *_, offset in layouts) >= min(ends):  # as in the weights of a flattened LSTM
        return False
    first = min(offset for *_, offset in layouts)
    used = torch.zeros(max(ends) - first, dtype=torch.bool)
    one, other = (used.as_strided(shape, steps, o - first) for shape, steps, o in layouts)
    one.fill_(True)
    return bool(other.any())


def _refuse_shared_memory(module: nn.Module) -> None:
    """Refuse parameters that have elements in common, with each other or with what D keeps."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, p in module.named_parameters():
        if p.layout == torch.strided and p.numel():
            where = p.untyped_storage().data_ptr()
            by_storage.setdefault(where, []).append((name, p))
    for sharing in by_storage.values():
        for (one, first), (other, second) in combinations(sharing, 2):
            if overlap(first, second):
                raise ValueError(
                    f"discriminator: parameters {one!r} and {other!r} share memory, so that a step "
                    "of one moves the other, which a look-ahead step does not. Make them one "
                    "nn.Parameter, transposed where it is used, or use parametrizations."
                )
    for path, layer in module.named_modules():
        for key, t in _kept(layer):
            for name, whole in by_storage.get(t.untyped_storage().data_ptr(), ()):
                if whole.requires_grad and not t.requires_grad and overlap(whole, t):
                    raise ValueError(
                        f"discriminator: {f'{path}.{key}'.lstrip('.')!r} shares memory with the "
                        f"parameter {name!r}, so that a step of it moves both, which a look-ahead "
                        "step does not. Read parameter.detach() where it is used, or keep a clone."
                    )


def _kept(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a layer holds beside its parameters, by the name of what holds them.

    But those that a spectral norm's hook makes anew before the layer runs.
    """
    hooks = layer._forward_pre_hooks.values()
    renewed = [hook.name for hook in hooks if isinstance(hook, SpectralNorm)]
    for key, value in (*layer._buffers.items(), *vars(layer).items()):
        several = value.values() if isinstance(value, dict) else value
        for t in several if isinstance(value, (dict, list, tuple)) else [value]:
            if type(t) is Tensor and t.layout == torch.strided and key not in renewed:
                yield key, t
