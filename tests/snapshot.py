"""Everything that a user holds, bit by bit: what tests compare before and after a look-ahead."""

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


def snapshot(*held: object) -> dict[str, Any]:
    """Return a flat record of modules, optimizers and whatever hangs on them.

    It follows attributes, containers and the closures of functions (torchopt keeps a momentum's
    ``first_call`` there), and knows each object by its identity and each tensor by its bytes,
    its ``grad`` and its flags.
    """
    record: dict[str, Any] = {}
    seen: dict[int, object] = {}
    for number, item in enumerate(held):
        _record(item, f"[{number}]", record, seen)
    record["kept alive, so that no identity is reused"] = list(seen.values())
    return record


def changes(before: Mapping[str, Any], *held: object) -> list[str]:
    """Return the places where the objects differ from an earlier snapshot of them."""
    after = snapshot(*held)
    paths = [path for path in before.keys() | after.keys() if path.startswith("[")]
    missing = object()
    return sorted(p for p in paths if before.get(p, missing) != after.get(p, missing))


def bits(tensor: Tensor) -> bytes:
    """Return the contents of a tensor, so that -0.0 and NaN count as themselves."""
    if tensor.is_meta:
        return b""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    flat = dense.cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def _record(item: Any, path: str, record: dict[str, Any], seen: dict[int, object]) -> None:
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        record[path] = (type(item), repr(item))
        return
    record[path] = (type(item), None if isinstance(item, tuple) else id(item))
    if id(item) in seen:
        return
    seen[id(item)] = item
    if isinstance(item, (UninitializedParameter, UninitializedBuffer)):
        return
    if isinstance(item, Tensor):
        record[f"{path}:tensor"] = (
            bits(item), item.dtype, tuple(item.shape), item.stride(), item.device,
            item.requires_grad, item.is_leaf, item.grad_fn.name() if item.grad_fn else None,
        )  # fmt: skip
        if item.is_leaf and item.grad is not None:
            _record(item.grad, f"{path}.grad", record, seen)
    elif isinstance(item, Mapping):
        for number, (key, value) in enumerate(item.items()):
            name = key if isinstance(key, str) else f"#{number} {id(key)}"
            _record(value, f"{path}[{name}]", record, seen)
    elif isinstance(item, (list, tuple, set, frozenset)):
        for number, value in enumerate(item):
            _record(value, f"{path}[{number}]", record, seen)
    elif isinstance(item, FunctionType):
        for name, cell in zip(item.__code__.co_freevars, item.__closure__ or (), strict=True):
            _record(cell.cell_contents, f"{path}<{name}>", record, seen)
    elif isinstance(item, MethodType):
        _record(item.__self__, f"{path}.__self__", record, seen)
    elif not isinstance(item, type) and hasattr(item, "__dict__"):
        for name, value in vars(item).items():
            _record(value, f"{path}.{name}", record, seen)
