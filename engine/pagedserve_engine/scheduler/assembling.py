"""From a plan and the tables to the step's own copy of all that it names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedserve_engine.batch import Batch, Int32Array
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.scheduler.budget import StepPlan
from pagedserve_engine.scheduler.table import SequenceTable

_NO_DEPTHS = np.empty(0, np.int32)


def build_batch(plan: StepPlan, table: SequenceTable, cache: CacheManager) -> Batch:
    """The step that ``plan`` describes, which is not empty: decoding rows with their drafts, then chunks."""
    decodes, token_ids, depths = _decoding_rows(plan, table)
    chunk_slots = np.array([slot for slot, _ in plan.chunks], np.int32)
    slots = np.concatenate([decodes, chunk_slots])
    query_lens = np.ones(len(slots), np.int32)
    query_lens[len(decodes) :] = [tokens for _, tokens in plan.chunks]
    context_lens = table.computed[slots]
    sampled = context_lens + query_lens == table.known[slots]
    context_lens[: len(depths)] += depths
    pieces = [table.tokens[slot, table.computed[slot] : table.computed[slot] + n] for slot, n in plan.chunks]
    num_columns = -(int((context_lens + query_lens).max()) // -cache.layout.block_size)
    return Batch(
        requests=table.requests_in(slots.tolist()),
        slots=slots,
        stays=table.stays[slots],
        query_lens=query_lens,
        context_lens=context_lens,
        token_ids=np.concatenate([token_ids, *pieces]),
        carried=table.unread[slots] > 0,
        sampled=sampled,
        block_tables=tuple(blocks[slots, :num_columns] for blocks in cache.block_tables),
        num_decodes=len(decodes),
        admitted=_admitted(plan, slots),
        read_first=bool(len(depths)) or bool((table.read_first[slots] & sampled).any()),
        depths=depths,
    )


def _decoding_rows(plan: StepPlan, table: SequenceTable) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Slots, query tokens and depths of the decoding rows; tokens in flight are 0, depths empty without any draft."""
    decodes = plan.decodes
    token_ids = np.where(table.unread[decodes] > 0, np.int32(0), table.last_token[decodes])
    if not plan.drafts:
        return decodes, token_ids, _NO_DEPTHS
    counts = np.array([1 + len(plan.drafts.get(slot, ())) for slot in decodes.tolist()])
    firsts = np.cumsum(counts) - counts
    depths = np.arange(int(counts.sum()), dtype=np.int32) - np.repeat(firsts, counts).astype(np.int32)
    rows: npt.NDArray[np.int32] = np.repeat(token_ids, counts)
    rows[depths > 0] = np.concatenate([plan.drafts[slot] for slot in decodes.tolist() if slot in plan.drafts])
    return np.repeat(decodes, counts), rows, depths


def _admitted(plan: StepPlan, slots: Int32Array) -> tuple[int, ...]:
    if not plan.admitted:
        return ()
    return tuple(row for row, slot in enumerate(slots.tolist()) if slot in plan.admitted)
