"""Storages for kopf that keep nothing: only events are handled, so there is nothing to compare and no progress to note.

Kopf's own would copy each object a few times for every event of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import kopf


class NoDiffBase(kopf.DiffBaseStorage):
    """Knows no last handled state."""

    def build(self, *, body: Any, extra_fields: Iterable[Any] | None = None) -> Any:
        """Nothing of the object is essential."""
        return {}

    def fetch(self, *, body: Any) -> Any:
        """There is no earlier state."""
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        """Nothing is kept."""


class NoProgress(kopf.ProgressStorage):
    """Knows no handler under way."""

    def fetch(self, *, key: Any, body: Any) -> Any:
        """There is no record."""
        return None

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        """Nothing is kept."""

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        """Nothing was kept."""

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        """Nothing is written."""

    def clear(self, *, essence: Any) -> Any:
        """Nothing of ours is in it."""
        return essence
