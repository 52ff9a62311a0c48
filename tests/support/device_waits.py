"""Finds on a CPU what would make the host wait for a device: calls whose result's value or shape depends on data.

Two views are needed. Operators are seen below Python, wherever they are called; what a tensor's own methods read
(``numpy``, ``tolist``) never becomes an operator, so these are seen as Python calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::equal",
        "aten::nonzero",
        "aten::nonzero_numpy",
        "aten::argwhere",
        "aten::masked_select",
        "aten::_unique",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::bincount",
        "aten::repeat_interleave",
    }
)
_INDEXED = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
"""Wait where an index is a mask: its places must be counted first."""

_METHODS = frozenset({"numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__"})


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        masked = name in _INDEXED and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _OPERATORS or masked:
            self._found.append(func.name())
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        to_host = name == "cpu" or (
            name == "to" and "cpu" in (str(arg) for arg in args[1:]) and not kwargs.get("non_blocking")
        )
        if name in _METHODS or to_host:
            self._found.append(f"Tensor.{name}")
        return func(*args, **kwargs)


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """The names of the calls that would wait, as they come."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        yield found
