"""Speculation by prompt lookup: what followed the last tokens when they came before is guessed to follow them again.

A draft costs no model. A step computes it behind the token that is due, a row for each position, and samples every
position as it would be sampled alone: with the random number of its place, under the same parameters. A draft is
accepted as far as it equals what was sampled before it. So a request gets the tokens that it would get without
speculation, one by one, whether greedily or by chance: drafts decide how many of them a step brings, never which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedserve_engine.batch import Batch, Int32Array, StepOutput

LONGEST, SHORTEST = 4, 2
"""Tokens at the end that are looked up, the longest match first: one alone is mostly followed by chance."""

LOOKBACK = 16_384
"""Tokens searched, from the end: bounds the time of a look-up where contexts are long."""


FIRST_REACH = 2
"""Tokens of a request's first draft."""


@dataclass(frozen=True, slots=True)
class NgramDrafter:
    """Drafts up to ``num_tokens`` tokens of a request."""

    num_tokens: int

    def draft(self, known: Int32Array, *, most: int) -> Int32Array:
        """Up to ``most`` tokens that may follow ``known`` [tokens]; empty where its end is new.

        Of the longest match it is the latest. A match that the end itself overlaps goes on periodically.
        """
        known = known[-LOOKBACK:]
        end = _latest_match(known)
        if end is None:
            return known[:0]
        num_tokens = min(most, self.num_tokens)
        following = known[end : end + num_tokens]
        return following if len(following) == num_tokens else np.resize(following, num_tokens)


def _latest_match(known: Int32Array) -> int | None:
    """Where what follows the latest of the longest earlier occurrences of the last tokens begins."""
    if len(known) <= SHORTEST:
        return None
    first = SHORTEST - 1
    hits = known[first:-1] == known[-1]
    for back in range(1, SHORTEST):
        hits &= known[first - back : -1 - back] == known[-1 - back]
    ends = np.flatnonzero(hits) + first
    found = ends
    for back in range(SHORTEST, LONGEST):
        # They rise, and those that lay before ``back`` are gone but for this one.
        if len(ends) and ends[0] < back:
            ends = ends[1:]
        if not len(ends):
            break
        ends = ends[known[ends - back] == known[-1 - back]]
        found = ends if len(ends) else found
    return int(found[-1]) + 1 if len(found) else None


def next_reach(batch: Batch, counts: npt.NDArray[np.bool_]) -> tuple[Int32Array, Int32Array]:
    """The slots that had drafts, and how long their next ones may be; ``counts`` as from ``accepted``.

    Twice what was right: a text that repeats itself is followed with long drafts after a step or two, and one that
    doesn't costs a token for each look-up that finds something.
    """
    firsts = np.flatnonzero(batch.depths == 0)
    right = np.add.reduceat(counts[: batch.num_decodes].astype(np.int32), firsts) - 1
    drafted = np.diff(np.append(firsts, batch.num_decodes)) > 1
    return batch.slots[firsts[drafted]], np.maximum(2 * right[drafted], 1)


def accepted(batch: Batch, output: StepOutput) -> npt.NDArray[np.bool_]:
    """[R] rows that count: all but drafts that were not sampled before them, and those behind such."""
    counts = np.ones(len(batch.requests), np.bool_)
    if not len(batch.depths):
        return counts
    drafted = batch.depths > 0
    sampled = output.token_ids[: batch.num_decodes].copy()
    sampled[[row for row in output.failed if row < batch.num_decodes]] = -1
    missed = drafted.copy()
    missed[1:] &= sampled[:-1] != batch.token_ids[1 : batch.num_decodes]
    misses = np.cumsum(missed)
    group = np.cumsum(~drafted) - 1
    counts[: batch.num_decodes] = misses == misses[~drafted][group]
    return counts
