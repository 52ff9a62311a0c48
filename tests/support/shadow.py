"""A runner without a model, which sees whether the bookkeeping around it is right.

It keeps a "cache" of token ids instead of keys and values, writes each step's tokens where the block tables say, reads
every row's context back through them, and fails where it finds another token than the request's own. The next token
is a function of the whole sequence, so a request's output shows whether anything was lost, doubled or mixed up.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from pagedserve_engine.batch import Batch, StepOutput
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.request import TokenLogprob
from pagedserve_engine.scheduler.scheduler import Scheduler

VOCAB = 1000


def next_token(tokens: Sequence[int], vocab_size: int) -> int:
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes()) % vocab_size


def expected_output(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


class ShadowRunner:
    def __init__(self, layout: CacheLayout, *, num_blocks: int, vocab_size: int = VOCAB) -> None:
        self.layout = layout
        self.vocab_size = vocab_size
        self.pages = np.full((len(layout.groups), num_blocks * layout.block_size), -1, np.int64)
        self.num_prompt_tokens = 0
        self.errors: list[Exception] = []
        """Raised by the next steps, one each, after the writes."""
        self.smallest_failing_batch = 1
        """Tokens of a step below which it does not fail."""
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        if self.errors and batch.num_tokens >= self.smallest_failing_batch:
            raise self.errors.pop(0)
        rows = range(len(batch.requests))
        for row in rows:
            self._write(batch, row, int(starts[row]))
        for row in rows:
            self._verify(batch, row)
        tokens = [next_token(self._known(batch, row), self.vocab_size) for row in np.flatnonzero(batch.sampled)]
        self.num_prompt_tokens += int(batch.query_lens[batch.num_decodes :].sum())
        return StepOutput(np.array(tokens, np.int32), {}, self._score(batch), {})

    def _score(self, batch: Batch) -> dict[int, list[TokenLogprob]]:
        scored = {}
        for row in range(batch.num_decodes, len(batch.requests)):
            request, context = batch.requests[row], int(batch.context_lens[row])
            if request.params.prompt_logprobs is not None and not request.output_ids:
                following = request.prompt_ids[context + 1 : context + 1 + int(batch.query_lens[row])]
                scored[row] = [TokenLogprob(token, 0.0, 1) for token in following]
        return scored

    def _known(self, batch: Batch, row: int) -> list[int]:
        request = batch.requests[row]
        return [*request.prompt_ids, *request.output_ids]

    def _pages(self, batch: Batch, row: int, group: int, positions: np.ndarray) -> np.ndarray:
        size = self.layout.block_size
        return batch.block_tables[group][row, positions // size].astype(np.int64) * size + positions % size

    def _write(self, batch: Batch, row: int, start: int) -> None:
        context, num = int(batch.context_lens[row]), int(batch.query_lens[row])
        positions = np.arange(context, context + num)
        for group in range(len(self.layout.groups)):
            pages = self._pages(batch, row, group, positions)
            assert (pages >= self.layout.block_size).all(), "a query token would be written to the null block"
            self.pages[group, pages] = batch.token_ids[start : start + num]

    def _verify(self, batch: Batch, row: int) -> None:
        context, stop = int(batch.context_lens[row]), int(batch.context_lens[row] + batch.query_lens[row])
        known = np.array(self._known(batch, row)[:stop])
        for group in self.layout.groups:
            first = 0 if group.window is None else max(0, context - group.window + 1)
            positions = np.arange(first, stop)
            read = self.pages[group.index, self._pages(batch, row, group.index, positions)]
            np.testing.assert_array_equal(
                read, known[first:], err_msg=f"{batch.requests[row].request_id} reads another's tokens"
            )


def shadow_processor(
    *, num_blocks: int = 64, block_size: int = 4, budget: int = 32, max_num_seqs: int = 8, max_model_len: int = 200
) -> tuple[ContinuousBatchProcessor, ShadowRunner]:
    """A processor of one full layer group on a shadow runner, without end tokens."""
    layout = CacheLayout.build(["full"], window=None, num_kv_heads=1, head_dim=2, block_size=block_size, dtype_bytes=4)
    cache = CacheManager(layout, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    scheduler = Scheduler(
        cache,
        policy="fifo",
        max_batch_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        safety_margin=0.1,
        eos_token_ids=(),
    )
    runner = ShadowRunner(layout, num_blocks=num_blocks)
    return ContinuousBatchProcessor(scheduler, runner), runner
