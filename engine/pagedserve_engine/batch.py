"""What one step runs, as plain data: the scheduler fills it, the runner reads it, nobody changes it.

A batch holds copies of all that it names, so that it stays true while the scheduler moves on: between a step's launch
and its commit, requests may end, give their slots up, or be in the next step already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagedserve_engine.request import RequestState, TokenLogprob

Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True, frozen=True, eq=False)
class Batch:
    """One step's rows; R rows, T query tokens, G layer groups.

    Decoding rows come first, so that a uniform decode batch is a prefix.
    """

    requests: list[RequestState]
    """R requests, in row order; one with drafts has several rows."""
    slots: Int32Array
    """[R] row of each request in the scheduler's tables; stable while a request runs."""
    stays: Int32Array
    """[R] number of each request's stay in its slot; a slot that was left, or given to another, has a higher one."""
    query_lens: Int32Array
    """[R] tokens of each row that this step computes, ≥ 1."""
    context_lens: Int32Array
    """[R] tokens of each row that the cache holds before this step."""
    token_ids: Int32Array
    """[T] the query tokens, row after row; 0 for those that are carried over."""
    carried: npt.NDArray[np.bool_]
    """[R] rows of one query token that a step in flight samples: the device has it, the host doesn't yet."""
    sampled: npt.NDArray[np.bool_]
    """[R] rows whose last query token gets a next token: they reach the end of what is known."""
    block_tables: tuple[Int32Array, ...]
    """G arrays [R, blocks] of block ids by position; 0, the null block, outside a sliding window."""
    num_decodes: int
    """The first so many rows have one query token and are sampled, drafts among them."""
    admitted: tuple[int, ...]
    """Rows whose request entered its slot with this step."""
    read_first: bool = False
    """Whether the host must know this step's tokens before the next step is chosen: a grammar follows them, or drafts
    are compared with them."""
    depths: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    """[num_decodes] how many drafted tokens a row's query is behind what is known, 0: its query is known; empty where
    nothing is drafted. A request's drafts are rows of its own slot, right behind its row in the order of positions."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of this step (T)."""
        return len(self.token_ids)


@dataclass(slots=True, frozen=True)
class StepOutput:
    """What the runner brings back for a Batch, in the order of its sampled rows (S of them)."""

    token_ids: Int32Array
    """[S] the next token of each sampled row."""
    logprobs: dict[int, TokenLogprob]
    """By sampled row, for those that asked."""
    prompt_logprobs: dict[int, list[TokenLogprob]]
    """By row of the batch: one entry for each prompt token *after* the row's query tokens that is still prompt."""
    failed: dict[int, Exception]
    """By row of the batch: rows that alone went wrong (what they ask can't be had, a grammar that broke)."""
    replayed: bool = False
    """Whether a captured step was replayed."""


class PendingStep(Protocol):
    """A step that was launched."""

    def read(self) -> StepOutput:
        """Wait for the step and bring back what it computed; called once. Raises what ``launch`` raises."""


@dataclass(slots=True, frozen=True)
class ReadyStep:
    """A step that was computed at its launch."""

    output: StepOutput

    def read(self) -> StepOutput:
        """What it computed."""
        return self.output
