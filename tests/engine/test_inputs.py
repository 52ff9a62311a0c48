"""What a step's inputs say of the blocks that it begins."""

from __future__ import annotations

import numpy as np

from pagedserve_engine.batch import Batch
from pagedserve_engine.inputs import begun_blocks
from pagedserve_engine.request import RequestState, SamplingParams


def batch_of(rows: list[tuple[int, int]], *tables: list[list[int]]) -> Batch:
    """Rows of (context, query) lengths with their block tables, a table for each group."""
    request = RequestState.create("r", [0], SamplingParams(max_tokens=1), arrival_time=0.0, max_model_len=2)
    contexts, queries = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Batch(
        requests=[request] * len(rows),
        slots=np.arange(len(rows), dtype=np.int32),
        stays=np.zeros(len(rows), np.int32),
        query_lens=queries,
        context_lens=contexts,
        token_ids=np.zeros(queries.sum(), np.int32),
        carried=np.zeros(len(rows), np.bool_),
        sampled=np.ones(len(rows), np.bool_),
        block_tables=tuple(np.array(table, np.int32) for table in tables),
        num_decodes=0,
        admitted=(),
    )


def test_a_block_is_begun_where_its_first_page_is_written_and_its_last_is_not():
    rows = {
        "a decode at a block's first page": ((4, 1), [11, 12, 0], [12]),
        "a decode in its middle": ((5, 1), [21, 22, 0], []),
        "a decode that fills it": ((7, 1), [31, 32, 0], []),
        "a prompt that ends inside its second block": ((0, 6), [41, 42, 0], [42]),
        "a prompt that fills its blocks": ((0, 8), [51, 52, 0], []),
        "a chunk that goes on in a block and begins one": ((3, 6), [61, 62, 63], [63]),
        "a chunk that stays in its block": ((1, 2), [71, 0, 0], []),
    }
    for sentence, (lengths, table, begun) in rows.items():
        assert begun_blocks(batch_of([lengths], [table]), block_size=4).tolist() == begun, sentence


def test_blocks_are_begun_in_every_group():
    batch = batch_of([(0, 5), (6, 1), (4, 1)], [[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [0, 12]])
    assert sorted(begun_blocks(batch, block_size=4).tolist()) == [2, 6, 8, 12]
