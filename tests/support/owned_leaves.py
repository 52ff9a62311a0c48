"""What a field manager owns of an object, leaf by leaf, read from the server's own record of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from control_client import JSON
from pagedserve_operator.drift import Owned, owned_fields

Pointer = tuple[str | int, ...]
"""The way to a value: names in tables, indices in lists."""
Values = dict[str, Any]


def owned_leaves(observed: JSON, manager: str) -> Iterator[Pointer]:
    """Where in ``observed`` each scalar that ``manager`` has applied stands."""
    yield from _leaves(owned_fields(observed, manager), observed, ())


def values_of(tree: Owned, observed: Any) -> Any:
    """The part of ``observed`` that ``tree`` (as in ``fieldsV1``) covers; None where there is nothing."""
    if not tree or observed is None:
        return observed
    below = {key: child for key, child in tree.items() if key != "."}
    return {key: values_of(child, _step(key, observed)[1]) for key, child in below.items()}


def _leaves(tree: Owned, value: Any, at: Pointer) -> Iterator[Pointer]:
    if not tree:
        yield from _scalars(value, at)
        return
    for key, below in tree.items():
        if key != ".":
            step, child = _step(key, value)
            if step is not None:
                yield from _leaves(below, child, (*at, step))


def _scalars(value: Any, at: Pointer) -> Iterator[Pointer]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _scalars(child, (*at, name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _scalars(child, (*at, index))
    else:
        yield at


def _step(key: str, value: Any) -> tuple[str | int | None, Any]:
    """How a key of ``fieldsV1`` leads on, and to what."""
    kind, _, rest = key.partition(":")
    if kind == "f":
        known = isinstance(value, dict) and rest in value
        return (rest, value[rest]) if known else (None, None)
    for index, item in enumerate(value if isinstance(value, list) else ()):
        wanted = json.loads(rest)
        if item == wanted if kind == "v" else all(item.get(name) == part for name, part in wanted.items()):
            return index, item
    return None, None
