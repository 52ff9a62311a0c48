"""A runner without a model, which sees whether the bookkeeping around it is right.

It keeps a "cache" of token ids instead of keys and values, writes each step's tokens where the block tables say, reads
every row's context back through them, and fails where it finds another token than the request's own. The next token
is a function of the whole sequence, so a request's output shows whether anything was lost, doubled or mixed up.

Like a device it runs steps in the order of their launch and keeps each slot's tokens to itself, so that a step may be
launched before the one before it is read.
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


def next_token(tokens: Sequence[int], vocab_size: int, period: int | None = None) -> int:
    """With a ``period`` mostly the token that came so many before, so that it can be guessed."""
    chance = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    if period is not None and chance % 4 and len(tokens) >= period:
        return tokens[-period]
    return chance % vocab_size


def expected_output(prompt: Sequence[int], num_tokens: int, vocab_size: int, period: int | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, vocab_size, period))
    return tokens[len(prompt) :]


class Corruption(BaseException):
    """The bookkeeping is wrong. No Exception, so that nobody takes it for a step that failed."""


class ShadowStep:
    """A step that ran at its launch; what went wrong comes out when it is read."""

    def __init__(self, runner: ShadowRunner, output: StepOutput | None, error: BaseException | None = None) -> None:
        self._runner = runner
        self._output = output
        self._error = error

    def read(self) -> StepOutput:
        if self._error is not None:
            self._runner.num_unread_failures -= isinstance(self._error, Exception)
            raise self._error
        output, self._output = self._output, None
        assert output is not None, "a step is read twice"
        return output


class ShadowRunner:
    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_blocks: int,
        max_num_seqs: int = 64,
        vocab_size: int = VOCAB,
        period: int | None = None,
    ) -> None:
        self.layout = layout
        self.period = period
        self.vocab_size = vocab_size
        self.pages = np.full((len(layout.groups), num_blocks * layout.block_size), -1, np.int64)
        self.known: list[list[int]] = [[] for _ in range(max_num_seqs)]
        """The tokens of each slot as the device knows them: what is in flight is there."""
        self.num_prompt_tokens = 0
        self.errors: list[Exception] = []
        """Raised by the next launches, one each."""
        self.late_errors: list[Exception] = []
        """Raised when the next steps are read, one each; what they write is garbage."""
        self.num_unread_failures = 0
        self.smallest_failing_batch = 1
        """Tokens of a step below which it does not fail."""
        self.batches: list[Batch] = []

    def launch(self, batch: Batch) -> ShadowStep:
        self.batches.append(batch)
        fails = batch.num_tokens >= self.smallest_failing_batch
        if self.errors and fails:
            raise self.errors.pop(0)
        for row in batch.admitted:
            request = batch.requests[row]
            self.known[int(batch.slots[row])] = [*request.prompt_ids, *request.output_ids]
        if self.late_errors and fails:
            return self._fail_late(batch, self.late_errors.pop(0))
        try:
            self._write_all(batch, self._tokens(batch))
            for row in range(len(batch.requests)):
                self._verify(batch, row)
        except AssertionError as error:
            # What follows a failed step may read its garbage; its results are void.
            if not self.num_unread_failures:
                return ShadowStep(self, None, Corruption(str(error)))
        tokens = [self._sample(batch, row) for row in np.flatnonzero(batch.sampled).tolist()]
        self.num_prompt_tokens += int(batch.query_lens[batch.num_decodes :].sum())
        return ShadowStep(self, StepOutput(np.array(tokens, np.int32), {}, self._score(batch), {}))

    def _fail_late(self, batch: Batch, error: Exception) -> ShadowStep:
        self._write_all(batch, np.full(batch.num_tokens, -1))
        for slot in batch.slots[batch.sampled].tolist():
            self.known[slot].append(-1)
        self.num_unread_failures += 1
        return ShadowStep(self, None, error)

    def _sample(self, batch: Batch, row: int) -> int:
        """The token behind the row's queries; the device knows it where it follows what it knows, drafts or not."""
        known, stop = self.known[int(batch.slots[row])], int(batch.context_lens[row] + batch.query_lens[row])
        queries = self._drafted(batch, row)
        token = next_token([*known[: stop - len(queries)], *queries], self.vocab_size, self.period)
        if len(known) == stop and known[stop - len(queries) :] == queries:
            known.append(token)
        return token

    def _drafted(self, batch: Batch, row: int) -> list[int]:
        """The drafted tokens of a row's slot up to the row's own."""
        depth = int(batch.depths[row]) if row < len(batch.depths) else 0
        return batch.token_ids[row - depth + 1 : row + 1].tolist()

    def _tokens(self, batch: Batch) -> np.ndarray:
        """The query tokens, those that are carried over from the device."""
        tokens = batch.token_ids.astype(np.int64)
        carried = np.flatnonzero(batch.carried)
        assert (carried < batch.num_decodes).all(), "only decoding rows take their token from the device"
        tokens[carried] = [self.known[slot][-1] for slot in batch.slots[carried].tolist()]
        for row in np.flatnonzero(~batch.carried[: batch.num_decodes]).tolist():
            if row >= len(batch.depths) or not batch.depths[row]:
                known, context = self.known[int(batch.slots[row])], int(batch.context_lens[row])
                assert known[context:] == [tokens[row]], f"{batch.requests[row].request_id} goes on at another place"
        return tokens

    def _score(self, batch: Batch) -> dict[int, list[TokenLogprob]]:
        scored = {}
        for row in range(batch.num_decodes, len(batch.requests)):
            request, context = batch.requests[row], int(batch.context_lens[row])
            if request.params.prompt_logprobs is not None and not request.output_ids:
                following = request.prompt_ids[context + 1 : context + 1 + int(batch.query_lens[row])]
                scored[row] = [TokenLogprob(token, 0.0, 1) for token in following]
        return scored

    def _pages(self, batch: Batch, row: int, group: int, positions: np.ndarray) -> np.ndarray:
        size = self.layout.block_size
        return batch.block_tables[group][row, positions // size].astype(np.int64) * size + positions % size

    def _write_all(self, batch: Batch, tokens: np.ndarray) -> None:
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        for row, start in enumerate(starts.tolist()):
            context, num = int(batch.context_lens[row]), int(batch.query_lens[row])
            positions = np.arange(context, context + num)
            for group in range(len(self.layout.groups)):
                pages = self._pages(batch, row, group, positions)
                assert (pages >= self.layout.block_size).all(), "a query token would be written to the null block"
                self.pages[group, pages] = tokens[start : start + num]

    def _verify(self, batch: Batch, row: int) -> None:
        context, stop = int(batch.context_lens[row]), int(batch.context_lens[row] + batch.query_lens[row])
        drafted = self._drafted(batch, row)
        known = [*self.known[int(batch.slots[row])][: stop - len(drafted)], *drafted]
        assert len(known) >= stop, f"{batch.requests[row].request_id} computes what nobody knows"
        for group in self.layout.groups:
            first = 0 if group.window is None else max(0, context - group.window + 1)
            positions = np.arange(first, stop)
            read = self.pages[group.index, self._pages(batch, row, group.index, positions)]
            np.testing.assert_array_equal(
                read, known[first:stop], err_msg=f"{batch.requests[row].request_id} reads another's tokens"
            )


def shadow_processor(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    budget: int = 32,
    max_num_seqs: int = 8,
    max_model_len: int = 200,
    steps_in_flight: int = 0,
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
    runner = ShadowRunner(layout, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    return ContinuousBatchProcessor(scheduler, runner, steps_in_flight=steps_in_flight), runner
