"""In which order the kinds of work share a step's token budget."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Phase(Enum):
    """A kind of work."""

    DECODE = "decode"
    SPLIT_PREFILL = "split_prefill"
    NEW = "new"


FIFO = (Phase.DECODE, Phase.SPLIT_PREFILL, Phase.NEW)
"""Steady tokens for what runs, then prefills in order of arrival."""

PREFILL_FIRST = (Phase.SPLIT_PREFILL, Phase.DECODE, Phase.NEW)
"""A prefill that has begun is finished before anything else."""

POLICIES: Mapping[str, tuple[Phase, ...]] = {"fifo": FIFO, "prefill_first": PREFILL_FIRST}
