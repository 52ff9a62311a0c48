"""What a step may still take: query tokens, and blocks for requests that have not started."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PROMPT_LOGITS = 256
"""Prompt positions that one step scores at most: each costs a row of logits as wide as the vocabulary."""


@dataclass(slots=True)
class StepPlan:
    """A step in the making: which slots run how many tokens, under one token budget."""

    tokens_left: int
    max_num_seqs: int
    decodes: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Slots that compute their one outstanding token."""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """(slot, tokens) of prefill chunks."""
    drafts: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    """By slot among ``decodes``, the tokens guessed to follow."""
    admitted: set[int] = field(default_factory=set)
    """Slots that were given away in this step."""
    prompt_logits_left: int = PROMPT_LOGITS
    planned: npt.NDArray[np.bool_] = field(init=False)
    """[max_num_seqs] slots in this step. They are never preempted: another row may read what they write."""

    def __post_init__(self) -> None:
        self.planned = np.zeros(self.max_num_seqs, np.bool_)

    def take_decodes(self, slots: npt.NDArray[np.int32]) -> None:
        """Run one token of each of ``slots``."""
        self.decodes = slots
        self.planned[slots] = True
        self.tokens_left -= len(slots)

    def take_chunk(self, slot: int, tokens: int) -> None:
        """Run ``tokens`` tokens of ``slot``."""
        self.chunks.append((slot, tokens))
        self.planned[slot] = True
        self.tokens_left -= tokens

    def take_draft(self, slot: int, draft: npt.NDArray[np.int32]) -> None:
        """Run ``draft`` behind the token of ``slot``."""
        self.drafts[slot] = draft
        self.tokens_left -= len(draft)

    @property
    def rows_left(self) -> int:
        """Rows that a step may still have: as many as there are slots, whatever they are for."""
        drafted = sum(len(draft) for draft in self.drafts.values())
        return self.max_num_seqs - len(self.decodes) - len(self.chunks) - drafted

    @property
    def empty(self) -> bool:
        """Whether nothing runs."""
        return not self.chunks and not len(self.decodes)


@dataclass(frozen=True, slots=True)
class BlockReserve:
    """Blocks that only what already runs may use."""

    blocks: int

    @classmethod
    def of(cls, num_blocks: int, *, safety_margin: float) -> BlockReserve:
        """The share ``safety_margin`` of ``num_blocks``, rounded up."""
        return cls(math.ceil(num_blocks * safety_margin))

    def admits(self, *, free: int, needed: int) -> bool:
        """Whether a new request that needs ``needed`` of ``free`` blocks leaves the reserve alone."""
        return free - needed >= self.blocks
