"""What differs between a manifest of ours and the object that the API server has.

An object holds more than was applied: defaults, other managers' fields, status. So the manifest is compared as a
subset of the object, and the server's record of our fields (``metadata.managedFields``) answers the rest: which lists
are merged by key and which are one value, whether an empty value was dropped by the server or removed by somebody, and
which fields we still own that the manifest no longer has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from pagedserve_operator.fields import quantity
from pagedserve_operator.spec import Json

_QUANTITIES: Final = frozenset({"sizeLimit", "storage", "averageValue"})
_TABLES_OF_QUANTITIES: Final = frozenset({"requests", "limits"})
_OWNED_METADATA: Final = frozenset({"labels", "annotations", "ownerReferences"})
"""All that a manifest of ours says below ``metadata``, but for the object's name."""
_UNCOMPARED: Final = frozenset({"apiVersion", "kind"})

Owned = Mapping[str, Any]
"""A tree as in ``fieldsV1``: ``f:name``, ``k:{key}`` and ``v:value`` below each other; an empty one: a whole value."""


def differences(manifest: Json, observed: Json, *, manager: str) -> Iterator[str]:
    """Paths, as people write them, of what an apply by ``manager`` would change; none: nothing to do."""
    owned = owned_fields(observed, manager)
    for name, wanted in manifest.items():
        if name not in _UNCOMPARED and name != "metadata":
            yield from _value(wanted, observed.get(name), owned.get(f"f:{name}"), name)
    for name in sorted(_OWNED_METADATA):
        tree = owned.get("f:metadata", {}).get(f"f:{name}")
        yield from _value(manifest["metadata"].get(name), observed["metadata"].get(name), tree, f"metadata.{name}")
    for field in owned:
        name = field.removeprefix("f:")
        if field.startswith("f:") and name not in manifest and name != "metadata":
            yield name


def owned_fields(observed: Json, manager: str) -> Owned:
    """The fields that ``manager`` has applied and still owns."""
    for entry in observed.get("metadata", {}).get("managedFields") or ():
        if entry.get("manager") == manager and entry.get("operation") == "Apply" and not entry.get("subresource"):
            fields: Owned = entry.get("fieldsV1") or {}
            return fields
    return {}


def _value(wanted: Any, found: Any, owned: Owned | None, path: str) -> Iterator[str]:
    """``owned`` is our tree at this path; None where we own nothing of it."""
    if wanted is None:
        if owned is not None:
            yield path
    elif found is None:
        # The server drops empty values; one that we still own was dropped by it, not removed by somebody.
        if owned is None or not _is_empty(wanted):
            yield path
    elif isinstance(wanted, Mapping):
        yield from _table(wanted, found, owned, path) if isinstance(found, Mapping) else (path,)
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        yield from _list(wanted, found, owned, path) if isinstance(found, list) else (path,)
    elif not _same_scalar(wanted, found, path):
        yield path


def _table(wanted: Mapping[str, Any], found: Mapping[str, Any], owned: Owned | None, path: str) -> Iterator[str]:
    whole = owned is not None and not owned
    for name, value in wanted.items():
        below = owned if whole else (owned or {}).get(f"f:{name}")
        yield from _value(value, found.get(name), below, f"{path}.{name}")
    for field in owned or ():
        if field.startswith("f:") and field.removeprefix("f:") not in wanted:
            yield f"{path}.{field.removeprefix('f:')}"


def _list(wanted: Sequence[Any], found: list[Any], owned: Owned | None, path: str) -> Iterator[str]:
    if not owned:
        yield from _atomic_list(wanted, found, owned, path)
        return
    for index, item in enumerate(wanted):
        name = f"{path}[{_name_of(item, index)}]"
        tree = next((tree for key, tree in owned.items() if _is_item(key, item)), None)
        keys = _keys_of(item, owned)
        matches = [other for other in found if _may_match(item, other, keys)]
        if tree is None or not matches:
            yield name
        elif isinstance(item, Mapping):
            yield from _table(item, matches[0], tree, name)
    for key in owned:
        if key[:2] in ("k:", "v:") and not any(_is_item(key, item) for item in wanted):
            yield f"{path}[{key[2:]}]"


def _atomic_list(wanted: Sequence[Any], found: list[Any], owned: Owned | None, path: str) -> Iterator[str]:
    # Who changes any part of an atomic list owns all of it: a list that isn't ours was changed, even if only added to.
    if owned is None or len(wanted) != len(found):
        yield path
        return
    for index, (item, other) in enumerate(zip(wanted, found, strict=True)):
        yield from _value(item, other, owned, f"{path}[{index}]")


def _is_item(key: str, item: Any) -> bool:
    """Whether the tree's ``key`` stands for ``item``; fields that the manifest leaves to defaults are left out."""
    if key.startswith("v:"):
        return bool(_parsed(key) == item)
    if not key.startswith("k:") or not isinstance(item, Mapping):
        return False
    return all(item[name] == value for name, value in _parsed(key).items() if name in item)


def _keys_of(item: Any, owned: Owned) -> Mapping[str, Any] | None:
    """The key fields and their values by which ``owned`` knows the item."""
    return next((_parsed(key) for key in owned if key.startswith("k:") and _is_item(key, item)), None)


@lru_cache(maxsize=4096)
def _parsed(key: str) -> Any:
    # A thousand Deployments have the same few keys, and each look compares each key with each item.
    return json.loads(key[2:])


def _may_match(item: Any, other: Any, keys: Mapping[str, Any] | None) -> bool:
    """Whether ``other`` is the observed item with the same ``keys`` as ``item``."""
    if not isinstance(item, Mapping):
        return bool(item == other)
    if not isinstance(other, Mapping):
        return False
    return keys is not None and all(other.get(name) == value for name, value in keys.items())


def _name_of(item: Any, index: int) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    return str(item.get("name") or item.get("mountPath") or item.get("uid") or index)


def _same_scalar(wanted: Any, found: Any, path: str) -> bool:
    if wanted == found and isinstance(wanted, bool) == isinstance(found, bool):
        return True
    *_, parent, name = ["", *path.split(".")]
    if name not in _QUANTITIES and parent not in _TABLES_OF_QUANTITIES:
        return False
    try:
        return quantity(wanted) == quantity(found)
    except ValueError:
        return False


def _is_empty(value: Any) -> bool:
    return not value
