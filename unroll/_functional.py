"""A discriminator as a pure function of its parameters and buffers, and what is preserved.

A batch is a tensor ``(N, ...)`` for ``D(x)``, a tuple for ``D(*x)`` or a mapping for ``D(**x)``.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from operator import getitem, is_
from threading import Lock, RLock
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn, strided
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from unroll._autograd_fixes import right_derivatives, stance

R = TypeVar("R")
Batch = Any
Pair = tuple[Batch, Batch]  # (fake, real)
LARGE = 1000  # entries: a forward pass fills small containers, a vocabulary would take long to copy
CONTAINERS = frozenset((dict, OrderedDict, defaultdict, Counter, list, set, deque))  # changeable
_FOLLOWED = CONTAINERS | {tuple}


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a nested value with ``function`` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped: Any = {key: map_tensors(function, item) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return mapped
        same_type = copy.copy(value)
        same_type.update(mapped)
        return same_type
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(function, item) for item in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value


def views(batch: Batch) -> Batch:
    """Return views: theta_D^k depends on the originals only, so a gradient in a view is partial.

    An objective or a D that differentiates in its input gets the gradient at a fixed theta_D^k.
    """
    return map_tensors(_view, batch)


def _view(t: Tensor) -> Tensor:
    if not t.requires_grad:
        return t.detach()
    return t.view_as(t) if t.layout == strided else t.clone()  # sparse ones have no views


def _of_module(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(self._module, *args)


class FunctionalDiscriminator:
    """D at some theta_D^k, as objectives get it: it can be used as D is.

    A tuple or a mapping given as the only argument is unpacked: ``d(batch)`` is ``D(x)`` for a
    tensor, ``D(*x)`` for a tuple, ``D(**x)`` for a mapping. What else one reads of it, D's methods,
    submodules and attributes, is that of the module, in which theta_D^k stands meanwhile.

    Args:
        forward: ``D(*args, **kwargs)`` at theta_D^k, nothing unpacked.
        module: D.
    """

    def __init__(self, forward: Callable[..., Any], module: nn.Module | None = None) -> None:
        vars(self).update(forward=forward, _module=module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``D(*args, **kwargs)``, a batch unpacked."""
        if len(args) == 1 and not kwargs:
            if isinstance(args[0], Mapping):
                return self.forward(**args[0])
            if isinstance(args[0], tuple):
                return self.forward(*args[0])
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of D."""
        return getattr(vars(self).get("_module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of D, which is given back afterwards."""
        setattr(self._module, name, value)

    # As of an nn.Sequential; Python looks for these in the class alone.
    __getitem__, __len__, __iter__ = (_of_module(f) for f in (getitem, len, iter))
    __bool__ = _of_module(lambda module: module is None or bool(module))


class Functional:
    """``module`` as a pure function of parameters and buffers.

    The tensors are written into the module's own containers for the length of a call, which costs
    a tenth of what ``torch.func.functional_call`` does, and hooks and attributes keep working.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: dict[str, Tensor] = {}
        layers: list[tuple[type[nn.Module], bool]] = []
        self._slots: dict[str, Any] = {}  # buffers, and those that are None, until D is run perhaps
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        names: dict[int, str] = {}
        for prefix, submodule in module.named_modules():
            layers.append((type(submodule), submodule.training))
            parameters, buffers = submodule._parameters, submodule._buffers
            for found, container in (self.parameters, parameters), (self._slots, buffers):
                for key, tensor in container.items():
                    name = f"{prefix}.{key}" if prefix else key
                    if tensor is not None:  # a tied tensor has several places and one name
                        name = names.setdefault(id(tensor), name)
                    elif found is self.parameters:
                        continue
                    found.setdefault(name, tensor)
                    self._places.setdefault(name, []).append((container, key))
        self.buffers = {name: buffer for name, buffer in self._slots.items() if buffer is not None}
        self.layers = tuple(layers)  # their types, and which are in training mode
        # Attributes that the user has put on a parameter, for D to read.
        self._attributes = {n: vars(p) for n, p in self.parameters.items() if vars(p)}

    def __call__(
        self,
        function: Callable[[FunctionalDiscriminator], R],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> tuple[R, dict[str, Tensor]]:
        """Return ``function(D)`` with these tensors in D, and the buffers that it leaves behind."""
        versions = {name: tensor._version for name, tensor in parameters.items()}
        for name, attributes in self._attributes.items():
            vars(parameters[name]).update(attributes)
        # Where theta_D^k is a constant, D's own kernels are right; f_0 is the user's, bit for bit.
        differentiated = any(p.requires_grad for p in parameters.values())
        try:
            self._write({**parameters, **dict.fromkeys(self._slots), **buffers})
            self._renew_buffers()
            with right_derivatives() if differentiated else nullcontext():
                result = function(FunctionalDiscriminator(self._forward, self.module))
            places = {name: self._places[name][0] for name in self._slots}
            left = {name: container[key] for name, (container, key) in places.items()}
        finally:
            self._write({**self.parameters, **self._slots})
        for name, tensor in parameters.items():
            if tensor._version != versions[name]:
                raise RuntimeError(MUTATION.format(name))
        return result, {name: buffer for name, buffer in left.items() if buffer is not None}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._renew_buffers()
        return self.module(*args, **kwargs)

    def _renew_buffers(self) -> None:
        """Clone the buffers: one that D changes in place may be saved for backward."""
        for name in self._slots:
            container, key = self._places[name][0]
            if container[key] is not None:
                self._write({name: container[key].clone()})

    def _write(self, values: Mapping[str, Tensor | None]) -> None:
        for name, value in values.items():
            for container, key in self._places[name]:
                container[key] = value


MUTATION = (
    "discriminator: its forward pass must not change its parameters in place; it changed {!r}, "
    "which would make every look-ahead step differ from a training step. Move the change after "
    "optimizer.step() in your loop and give it to the look-ahead as project=; in place of a "
    "spectral norm of your own, use torch.nn.utils.parametrizations.spectral_norm."
)


@contextmanager
def preserved(module: nn.Module, also: Iterable[object] = ()) -> Iterator[None]:
    """Let ``module`` be used for a look-ahead, one at a time, and give it back exactly as it was.

    Attributes that a forward pass or a hook sets, and containers of up to ``LARGE`` entries that it
    fills, are restored; tensors among them are clones meanwhile, which D may change in place. So
    are those of the objects in ``also``, an objective's. Spectral norm's power iteration stands
    still, and compiled parts run uncompiled: they cannot be differentiated twice.
    """
    with _locks_guard:
        lock = _locks.setdefault(module, RLock())
    with lock, _restored(module, also):
        yield


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # losses of one D share its lock
_locks_guard = Lock()


@contextmanager
def _restored(module: nn.Module, also: Iterable[object]) -> Iterator[None]:
    found = _held(module, also)
    holders = [value for value, content in found if value is not content]
    own = {id(p) for m in holders if isinstance(m, nn.Module) for p in m._parameters.values()}
    written = {id(m._buffers): m._buffers for m in module.modules()}  # by a look-ahead step
    saved = [(content, content.copy() if content else ()) for _, content in found]
    clones: dict[int, Tensor] = {}
    cache = parametrize._cache_enabled, parametrize._cache

    def stand_in(value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in own:
            return clones.setdefault(id(value), value.clone())
        if type(value) is tuple and len(value) <= LARGE:
            made = tuple(map(stand_in, value))
            return value if all(map(is_, made, value)) else made
        return value

    try:
        parametrize._cache_enabled, parametrize._cache = 0, {}  # it would hold theta_D^0's weights
        for container, content in saved:
            if content and type(content) not in (set, Counter) and id(container) not in written:
                items = content.items() if isinstance(content, dict) else enumerate(content)
                for key, value in items:
                    if isinstance(value, (Tensor, tuple)):
                        container[key] = stand_in(value)
        for value in holders:
            if isinstance(value, SpectralNorm):
                value.n_power_iterations = 0
            if isinstance(value, _SpectralNorm):
                value.training = False
            if isinstance(value, nn.parallel.DistributedDataParallel):  # its ranks would wait
                value.require_backward_grad_sync = value.require_forward_param_sync = False
        with stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
        kept = {id(b): name for buffers in written.values() for name, b in buffers.items()}
        if elsewhere := [kept[i] for i, c in clones.items() if i in kept and c._version]:
            raise RuntimeError(
                f"discriminator: the buffer {elsewhere[0]!r} is changed in a list or an attribute "
                "that holds it, too, where a look-ahead step has a copy. Change the buffer itself."
            )
    finally:
        put_back(saved)
        parametrize._cache_enabled, parametrize._cache = cache


def _held(module: nn.Module, also: Iterable[object]) -> list[tuple[Any, Any]]:
    """Return modules with their attributes, and containers of ``LARGE`` entries at most, inside."""
    found: dict[int, tuple[Any, Any]] = {}
    stack: list[Any] = [*module.modules(), *also]
    roots = {id(value) for value in stack if not isinstance(value, (type, ModuleType))}
    while stack:
        value = stack.pop()
        holder = id(value) in roots or isinstance(value, (nn.Module, SpectralNorm))
        content = getattr(value, "__dict__", value) if holder else value
        lazy = holder and getattr(value, "has_uninitialized_params", bool)()
        if id(content) in found or lazy or type(content) not in _FOLLOWED:
            continue
        if holder or len(content) <= LARGE:
            found[id(content)] = value, content
            items = content.values() if isinstance(content, dict) else content
            for item in items:
                if type(item) in CONTAINERS and not item:  # most of a module's are empty
                    found[id(item)] = item, item
                elif type(item) in CONTAINERS or isinstance(item, (tuple, nn.Module, SpectralNorm)):
                    stack.append(item)
    return [pair for pair in found.values() if type(pair[1]) is not tuple]


def put_back(saved: Iterable[tuple[Any, Any]]) -> None:
    """Let containers hold again what copies of them hold, where that has changed."""
    for container, content in saved:
        if not container and not content:  # most of a module's
            continue
        if isinstance(content, set):
            unchanged = container == content
        else:
            unchanged = len(container) == len(content) and all(map(is_, container, content))
        if unchanged and isinstance(content, dict):
            unchanged = all(map(is_, container.values(), content.values()))
        if not unchanged:
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(content)
