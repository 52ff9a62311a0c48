"""Kinds of JSON values that hold others: lists, objects of the client's own making, and choices between kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagedserve_engine.server.fields import JsonSchema, Kind, refuse

MAX_DEPTH = 64
"""Levels of nesting in a client's own JSON (tool parameters, schemas): far below what recursive readers survive."""


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of ``low`` to ``high`` items of one kind."""

    item: Kind
    low: int = 0
    high: int | None = None

    @property
    def words(self) -> str:
        """Length and what an item is."""
        most = f" of at most {self.high} items" if self.high else ""
        return f"a {'non-empty ' if self.low else ''}list{most}, each {self.item.words}"

    def accepts(self, value: object) -> bool:
        """Lists."""
        return isinstance(value, list)

    def check(self, value: Any, path: str) -> list[Any]:
        """The items, each checked."""
        if not isinstance(value, list) or len(value) < self.low or (self.high is not None and len(value) > self.high):
            raise refuse(path, value, self.words)
        return [self.item.check(item, f"{path}[{index}]") for index, item in enumerate(value)]

    def schema(self) -> JsonSchema:
        """Length and item."""
        bounds = {"minItems": self.low or None, "maxItems": self.high}
        return {
            "type": "array",
            "items": self.item.schema(),
            **{name: bound for name, bound in bounds.items() if bound is not None},
        }


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object of the client's own making, such as a JSON schema; only its depth is looked at."""

    words: str = f"an object nested at most {MAX_DEPTH} deep"

    def accepts(self, value: object) -> bool:
        """Objects."""
        return isinstance(value, dict)

    def check(self, value: Any, path: str) -> dict[str, Any]:
        """The object as it came."""
        if not isinstance(value, dict) or not is_shallow(value):
            raise refuse(path, value, self.words)
        return value

    def schema(self) -> JsonSchema:
        """Any object."""
        return {"type": "object"}


def is_shallow(value: object) -> bool:
    """Whether ``value`` nests at most MAX_DEPTH levels; looked at level by level, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        level = [child for group in children for child in group]
        if not level:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Either:
    """One of several kinds, told apart by their JSON types."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:
        """All of them."""
        return ", or ".join(kind.words for kind in self.kinds)

    def accepts(self, value: object) -> bool:
        """What any of them accepts."""
        return any(kind.accepts(value) for kind in self.kinds)

    def check(self, value: Any, path: str) -> Any:
        """As the first kind whose JSON type fits."""
        for kind in self.kinds:
            if kind.accepts(value):
                return kind.check(value, path)
        raise refuse(path, value, self.words)

    def schema(self) -> JsonSchema:
        """All of them."""
        return {"anyOf": [kind.schema() for kind in self.kinds]}
