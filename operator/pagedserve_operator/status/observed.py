"""Reading objects of the API server that may be partial, late or strange: whatever is missing reads as empty.

Diagnosing must never fail: a pod that can't be understood says less, it doesn't hide the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pagedserve_operator.spec import Json


def table(value: Any, *path: str) -> Json:
    """The object at ``path`` below ``value``; empty where there is none."""
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def rows(value: Any, *path: str) -> tuple[Json, ...]:
    """The objects of the list at ``path``; empty where there is none."""
    listed = table(value, *path[:-1]).get(path[-1]) if path else value
    return tuple(dict(row) for row in listed if isinstance(row, Mapping)) if isinstance(listed, list | tuple) else ()


def text(value: Any, *path: str) -> str:
    """The string at ``path`` on one line; "" where there is none."""
    found = table(value, *path[:-1]).get(path[-1])
    return " ".join(found.split()) if isinstance(found, str) else ""


def number(value: Any, *path: str, default: int = 0) -> int:
    """The whole number at ``path``, else ``default``."""
    found = table(value, *path[:-1]).get(path[-1])
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def moment(value: Any, *path: str) -> datetime | None:
    """The RFC 3339 time at ``path``; None where there is none."""
    try:
        found = datetime.fromisoformat(text(value, *path))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def condition(value: Any, kind: str) -> Json:
    """The condition of that type in ``value``'s status; empty where there is none."""
    return next((row for row in rows(value, "status", "conditions") if row.get("type") == kind), {})
