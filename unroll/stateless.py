"""A discriminator as a pure function of its parameters and buffers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

Batch = Any  # a tensor, a tuple (positional arguments of D) or a mapping (its keyword arguments)


def tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors(value)]
    if isinstance(batch, (tuple, list)):
        return [t for value in batch for t in tensors(value)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return the batch with ``function`` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped: Any = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return mapped
        same_type = copy.copy(batch)
        same_type.update(mapped)
        return same_type
    if isinstance(batch, (tuple, list)):
        mapped = [map_tensors(function, value) for value in batch]
        return type(batch)(*mapped) if hasattr(batch, "_fields") else type(batch)(mapped)
    return batch


def aliased(batch: Batch) -> Batch:
    """Return the batch under names of its own: theta_D^k depends on it, but not on these.

    So a gradient that an objective or D takes in its input is the partial one, at fixed theta_D^k.
    """
    return map_tensors(lambda t: t.view_as(t) if t.requires_grad else t.detach(), batch)


def unwrap_once(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile``'s or a data-parallel wrapper holds, None for other modules."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        inner: nn.Module = module._orig_mod
    elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = module.module
    else:
        return None
    return inner


class Stateless:
    """``module`` as a pure function of parameters and buffers.

    The tensors are written into the module's own containers for the length of a call, which costs
    a tenth of what ``torch.func.functional_call`` does, and hooks and attributes keep working.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._empty: dict[str, None] = {}  # buffers that are None, until D is run perhaps
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        names: dict[int, str] = {}
        for prefix, submodule in module.named_modules():
            for found, container in (
                (self.parameters, submodule._parameters),
                (self.buffers, submodule._buffers),
            ):
                for key, tensor in container.items():
                    own = f"{prefix}.{key}" if prefix else key
                    if tensor is not None:  # a tied tensor has several places and one name
                        own = names.setdefault(id(tensor), own)
                        found.setdefault(own, tensor)
                    elif container is submodule._buffers:
                        self._empty[own] = None
                    else:
                        continue
                    self._places.setdefault(own, []).append((container, key))
        # Attributes that the user has put on a parameter, for D to read.
        self._attributes = {n: vars(p) for n, p in self.parameters.items() if vars(p)}

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return ``module(*args, **kwargs)`` and the buffers that it leaves behind."""
        # Fresh buffers at every call: one that is changed in place may be saved for backward.
        kept = {**dict.fromkeys(self.buffers), **self._empty}
        swapped = {**parameters, **kept, **{name: b.clone() for name, b in buffers.items()}}
        versions = {name: tensor._version for name, tensor in parameters.items()}
        for name, attributes in self._attributes.items():
            vars(parameters[name]).update(attributes)
        try:
            self._write(swapped)
            output = self.module(*args, **kwargs)
            slots = {name: self._places[name][0] for name in kept}
            left = {name: container[key] for name, (container, key) in slots.items()}
        finally:
            self._write({**self.parameters, **self.buffers, **self._empty})
        for name, tensor in parameters.items():
            if tensor._version != versions[name]:
                raise RuntimeError(mutation_message(name))
        return output, {name: buffer for name, buffer in left.items() if buffer is not None}

    def _write(self, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            for container, key in self._places[name]:
                container[key] = value


def hooked(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient as the hooks of the real parameter leave it."""
    for hook in (parameter._backward_hooks or {}).values():
        try:
            replaced = hook(gradient)
        except AssertionError as error:
            if "inside a backward call" not in str(error):
                raise
            raise TypeError(
                "discriminator: its parameters have a hook of register_multi_grad_hook, which runs "
                "in backward() alone. Use parameter.register_hook, or remove it for G's step."
            ) from error
        gradient = gradient if replaced is None else replaced
    return gradient


def mutation_message(name: str) -> str:
    """Return the text of the refusal of a D that writes into its own parameters."""
    return (
        f"discriminator: its forward pass must not change its parameters in place; it changed "
        f"{name!r}, which would make every look-ahead step differ from a training step. Move the "
        "change after optimizer.step() in your loop and give it to the look-ahead as project=."
    )


def _containers(values: Iterable[Any], found: dict[int, tuple[Any, Any]]) -> None:
    """Collect the containers among values, however deep, each with a copy of what it holds."""
    for value in values:
        if isinstance(value, (dict, list, set, deque)) and id(value) not in found:
            found[id(value)] = (value, value.copy() if value else ())
            if value:
                _containers(value.values() if isinstance(value, dict) else value, found)


@contextmanager
def held(module: nn.Module, also: Iterable[object] = ()) -> Iterator[None]:
    """Let ``module`` be used for a look-ahead and give it back exactly as it was.

    Attributes that a forward pass or a hook sets are restored, spectral norm's power iteration
    stands still, compiled parts run uncompiled (they cannot be differentiated twice). The
    attributes of the objects in ``also``, an objective's, are restored, too.
    """
    submodules = list(module.modules())
    nested = [part.modules() if isinstance(part, nn.Module) else [part] for part in also]
    others = [part for found in nested for part in found if hasattr(part, "__dict__")]
    holders = [part for part in (*submodules, *others) if not isinstance(part, ModuleType)]
    saved = [(vars(part), vars(part).copy()) for part in holders]
    containers: dict[int, tuple[Any, Any]] = {}  # parameters, buffers, lists that D may fill
    for _, before in saved:
        _containers(before.values(), containers)
    hooks = (hook for submodule in submodules for hook in submodule._forward_pre_hooks.values())
    spectral_hooks = [(h, h.n_power_iterations) for h in hooks if isinstance(h, SpectralNorm)]
    cache = parametrize._cache_enabled, parametrize._cache
    try:
        parametrize._cache_enabled, parametrize._cache = 0, {}  # it would hold theta_D^0's weights
        registered = [d for m in submodules for d in (m._parameters, m._buffers)]
        registered += [part._parameters for part in others if isinstance(part, nn.Module)]
        own = {id(tensor) for d in registered for tensor in d.values()}
        # Clones of other tensors, which D or the objective perhaps changes in place.
        for attributes, before in saved:
            for name, attribute in before.items():
                if isinstance(attribute, Tensor):
                    attributes[name] = attribute.clone()
        for container, content in containers.values():
            if content and not isinstance(container, set):
                items = content.items() if isinstance(container, dict) else enumerate(content)
                for key, value in items:
                    if isinstance(value, Tensor) and id(value) not in own:
                        container[key] = value.clone()
        for hook, _ in spectral_hooks:
            hook.n_power_iterations = 0
        for submodule in submodules:
            if isinstance(submodule, _SpectralNorm):
                submodule.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook, iterations in spectral_hooks:
            hook.n_power_iterations = iterations
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)
        for container, content in containers.values():
            if container or content:
                container.clear()
                add = container.update if isinstance(container, (dict, set)) else container.extend
                add(content)
        parametrize._cache_enabled, parametrize._cache = cache
