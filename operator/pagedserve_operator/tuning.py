"""What is decided once and kept, so that a new operator, image default or catalogue never rolls running pods.

The decision is stored as JSON on the Deployment beside the hash of what the user can see; only a change of that hash
decides again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.sizing import Sizing

Origin = Literal["spec", "computed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Everything about the engine that isn't a function of the spec alone."""

    gpu: ResolvedGpu
    sizing: Sizing
    shape_source: str
    """Where the model's shape comes from, to print."""
    image: str
    """``repository:tag`` that runs."""
    weights_mib: int
    """Of the whole model: what a pod downloads and loads."""
    use_cuda_graph: bool
    sources: Mapping[str, Origin]
    """By field of ``status.tuning``: numBlocks, maxBatchTokens, maxModelLen, useCudaGraph, dtype."""

    def to_json(self) -> str:
        """Compact and with sorted keys: equal decisions are equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """What ``to_json`` wrote; None where the text is anything else."""
        try:
            return _read(cls, json.loads(text))
        except (TypeError, ValueError, KeyError, AttributeError):
            return None


def _read(kind: Any, value: Any) -> Any:
    """JSON as a value of the annotated type; raises TypeError, KeyError or AttributeError where it is another."""
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{field.name: _read(types[field.name], value[field.name]) for field in fields(kind)})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None and NoneType in arguments else _read(arguments[0], value)
    if origin is Literal:
        return _checked(value in arguments, value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    if origin is not None:
        return {str(key): _read(arguments[1], item) for key, item in value.items()}
    if kind is float:
        return float(_checked(isinstance(value, int | float), value))
    return _checked(type(value) is kind, value)


def _checked(holds: bool, value: Any) -> Any:
    if not holds:
        raise TypeError(value)
    return value
