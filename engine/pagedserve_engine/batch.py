"""What one step runs, as plain data: the scheduler fills it, the runner reads it, nobody changes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedserve_engine.request import RequestState, TokenLogprob

Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True, frozen=True)
class Batch:
    """One step's rows; R rows, T query tokens, G layer groups.

    Decoding rows come first, so that a uniform decode batch is a prefix.
    """

    requests: list[RequestState]
    """R requests, in row order."""
    slots: Int32Array
    """[R] row of each request in the scheduler's tables; stable while a request runs."""
    query_lens: Int32Array
    """[R] tokens of each row that this step computes, ≥ 1."""
    context_lens: Int32Array
    """[R] tokens of each row that the cache holds before this step."""
    token_ids: Int32Array
    """[T] the query tokens, row after row."""
    sampled: npt.NDArray[np.bool_]
    """[R] rows whose last query token gets a next token: they reach the end of what is known."""
    block_tables: tuple[Int32Array, ...]
    """G arrays [R, blocks] of block ids by position; 0, the null block, outside a sliding window."""
    num_decodes: int
    """The first so many rows have one query token and are sampled."""
    admitted: tuple[int, ...]
    """Rows whose request entered its slot with this step."""

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
