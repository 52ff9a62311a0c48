"""What the scheduler says about a pod that no node takes, made steady: its node counts change all the time."""

from __future__ import annotations

import re
from typing import Final

_COUNT: Final = re.compile(r"^\d+ ")
_SUMMARY: Final = re.compile(r"^\d+/\d+ nodes are available: ")
_GPU: Final = re.compile(r"Insufficient (\S*(?:gpu|mig-)\S*)")


def causes(message: str) -> tuple[str, ...]:
    """The distinct causes without counts, sorted; the preemption's part is left out, since it repeats them."""
    body = _SUMMARY.sub("", message.split(" preemption:")[0]).rstrip(". ")
    # A taint's text holds commas of its own.
    parts = re.split(r", (?![^{]*\})", body)
    return tuple(sorted({_COUNT.sub("", part.strip()).rstrip(".") for part in parts if part.strip()}))


def missing_gpu(message: str) -> str:
    """The GPU resource that is short, or ""."""
    found = _GPU.search(message)
    return found[1].rstrip(",.") if found else ""
