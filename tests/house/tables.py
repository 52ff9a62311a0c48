"""Tables of markdown, for the documents that are made from code."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """The lines of a table; cells are markdown, of which bars are escaped."""
    columns = list(head)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def code(value: object) -> str:
    """A value as it is written in a setting or in YAML."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
