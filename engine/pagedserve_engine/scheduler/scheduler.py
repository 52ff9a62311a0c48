"""Steps in, news out: what the requests' tokens mean once a step has run, whenever that is read.

``schedule`` counts a step as launched: its tokens are computed, and the next token of each row that reaches the end of
what is known is known too, though nobody has read it. So the next step can be scheduled before this one is read.
``commit`` reads: it fills the tokens in and ends requests. Between the two a request may end or lose its slot, which
a row tells by its slot and stay; the results of such rows are dropped, unless the request waits to go on.

A step that failed is answered with ``fail_batch`` or ``retry_batch`` instead. Steps end in the order in which they were
scheduled, but that of a failed step and those scheduled after it the newest may be taken back first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pagedserve_engine.batch import Batch, StepOutput
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.errors import ContextLengthError, PagedServeError, StepFailedError
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, TokenLogprob
from pagedserve_engine.scheduler.budget import BlockReserve
from pagedserve_engine.scheduler.planner import Planner
from pagedserve_engine.scheduler.queues import Queues
from pagedserve_engine.scheduler.table import SequenceTable, SlotArray
from pagedserve_engine.speculation import NgramDrafter, accepted, next_reach

Rows = npt.NDArray[np.intp]


class Scheduler:
    """Admits, splits, preempts and commits; see ``DESIGN`` section 3 for the rules of the two policies."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        policy: str,
        max_batch_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        safety_margin: float,
        eos_token_ids: Sequence[int],
        drafter: NgramDrafter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self._block_size = cache.layout.block_size
        self._has_windows = any(group.window is not None for group in cache.layout.groups)
        self._table = SequenceTable(max_num_seqs, max_model_len=max_model_len, eos_token_ids=eos_token_ids)
        self._queues = Queues(cache, self._table)
        reserve = BlockReserve.of(cache.num_total, safety_margin=safety_margin)
        self._planner = Planner(self._queues, policy=policy, reserve=reserve, drafter=drafter, clock=clock)
        self.num_drafted = 0
        """Drafted tokens that steps computed and that were read, since the start."""
        self.num_accepted = 0
        """Those of them that requests got."""

    # --- the queues -------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._table.running)

    @property
    def num_preemptions(self) -> int:
        """Slots taken back since the start."""
        return self._queues.num_preemptions

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: no request, and no step in flight."""
        return not self._queues.by_id and not self._queues.in_flight

    @property
    def steps_in_flight(self) -> int:
        """Steps scheduled that have not ended."""
        return len(self._queues.in_flight)

    def oldest_arrival(self) -> float | None:
        """Monotonic seconds at which the longest waiting request came, None where none waits."""
        return self._queues.waiting[0].arrival_time if self._queues.waiting else None

    def take_queue_waits(self) -> list[float]:
        """Seconds that the requests scheduled for the first time since the last call had waited."""
        return self._planner.take_queue_waits()

    def add(self, request: RequestState) -> None:
        """Queue ``request``. Raises ContextLengthError where it cannot fit even alone."""
        longest = len(request.prompt_ids) + request.max_tokens
        if longest > self.max_model_len:
            raise ContextLengthError(
                f"prompt and output may take {longest} tokens together and this engine holds {self.max_model_len}: "
                f"send a shorter prompt or ask for at most {self.max_model_len - len(request.prompt_ids)} tokens",
                param="max_tokens",
            )
        assert request.request_id not in self._queues.by_id, f"{request.request_id} is queued already"
        self._queues.by_id[request.request_id] = request
        self._queues.waiting.append(request)

    def cancel(self, request_id: str) -> GenerationOutput | None:
        """End a request wherever it stands and free its blocks; None where it has ended already."""
        request = self._queues.by_id.get(request_id)
        return None if request is None else self._finish(request, FinishReason.CANCELLED)

    def fail_all(self, error: PagedServeError) -> list[GenerationOutput]:
        """End every request with ``error``."""
        return [self._fail(request, error) for request in list(self._queues.by_id.values())]

    # --- a step's two ends ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, which counts as launched; None where nothing can run before a step in flight has ended."""
        batch = self._planner.plan(self.max_batch_tokens)
        if batch is not None:
            self._table.launch(batch.slots, batch.query_lens, batch.sampled)
            self._queues.in_flight.append(batch)
            self._trim(batch.slots)
        return batch

    def _trim(self, slots: SlotArray) -> None:
        """Give back what only this step still reads: a sequence that fills the pool needs it for the next one."""
        due = self.cache.trim_due(slots, self._table.computed[slots])
        for slot in slots[due].tolist():
            self.cache.trim(slot, int(self._table.computed[slot]))

    def commit(self, batch: Batch, output: StepOutput) -> list[GenerationOutput]:
        """Take in what the oldest step in flight computed; returns the news of every request that has any."""
        oldest = self._queues.in_flight.popleft()
        assert oldest is batch, "steps are committed in the order of their launch"
        live = self._queues.live(batch)
        for row, entries in output.prompt_logprobs.items():
            batch.requests[row].prompt_logprobs.extend(entries)
        counts = accepted(batch, output)
        told: dict[str, GenerationOutput] = {}
        rows = np.flatnonzero(batch.sampled)
        places = np.arange(len(rows))
        if len(batch.depths):
            first = np.ones(len(rows), np.bool_)
            first[: batch.num_decodes] = batch.depths == 0
            rows, places = rows[first], places[first]
        here = live[rows]
        self._read(batch, output, rows[here], places[here], told)
        if not here.all():
            self._read_waiting(batch, output, rows[~here], places[~here], told)
        if len(batch.depths):
            self._read_drafts(batch, output, counts, told)
        outputs = list(told.values())
        for row, error in output.failed.items():
            if not counts[row]:
                continue
            if live[row]:
                # Whatever went wrong may stand in its blocks: those who ask the same again must not find them.
                self.cache.discard(int(batch.slots[row]), 0)
            if not batch.requests[row].finished:
                outputs.append(self._fail(batch.requests[row], _step_error(error)))
        self._seal_read(batch.slots[rows[here]])
        return outputs

    def fail_batch(self, batch: Batch, error: PagedServeError) -> list[GenerationOutput]:
        """End the requests of a step that failed; what it should have written is forgotten."""
        self._forget_writes(batch)
        return [self._fail(request, error) for request in batch.requests if not request.finished]

    def retry_batch(self, batch: Batch, *, context_holds: bool = True) -> None:
        """Take the requests of a step that failed back into the queue, to be computed again.

        Unless ``context_holds``, what an earlier step should have written for them is forgotten too.
        """
        slots = np.unique(batch.slots[self._queues.live(batch)])
        self._forget_writes(batch, context_holds=context_holds)
        for slot in sorted(slots.tolist(), key=lambda slot: -self._table.request(slot).arrival_time):
            self._queues.preempt(slot)

    def _forget_writes(self, batch: Batch, *, context_holds: bool = True) -> None:
        self._queues.in_flight.remove(batch)
        live = self._queues.live(batch)
        contexts = batch.context_lens[live] if context_holds else np.zeros(int(live.sum()), np.int32)
        for slot, context in zip(batch.slots[live].tolist(), contexts.tolist(), strict=True):
            self.cache.discard(slot, context // self._block_size)
        if self._has_windows or not live.all():
            # What left a window, or was held by those that have left, is anywhere in the cache by now.
            self.cache.evict_cached()

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self, batch: Batch, output: StepOutput, rows: Rows, at: Rows, told: dict[str, GenerationOutput]) -> None:
        """Tell the news of ``rows`` whose requests run; ``at`` are their places among the sampled ones."""
        token_ids = output.token_ids[at]
        stops, full = self._table.read(batch.slots[rows], token_ids)
        over = (stops | full).tolist()
        requests, failed, logprobs = batch.requests, output.failed, output.logprobs
        for index, (row, token) in enumerate(zip(rows.tolist(), token_ids.tolist(), strict=True)):
            if failed and row in failed:
                continue
            request = requests[row]
            news = self._tell(told, request, token, logprobs.get(int(at[index])) if logprobs else None)
            if over[index]:
                self._end(news, request, stopped=bool(stops[index]))

    def _read_waiting(
        self, batch: Batch, output: StepOutput, rows: Rows, at: Rows, told: dict[str, GenerationOutput]
    ) -> None:
        """Tell the news of ``rows`` whose requests have left their slots: those that were preempted get their token."""
        for row, place in zip(rows.tolist(), at.tolist(), strict=True):
            request, token = batch.requests[row], int(output.token_ids[place])
            if request.finished or row in output.failed:
                continue
            news = self._tell(told, request, token, output.logprobs.get(place))
            stopped = self._table.stops_at(request, token)
            if stopped or len(request.output_ids) >= request.max_tokens:
                self._end(news, request, stopped=stopped)

    def _read_drafts(
        self, batch: Batch, output: StepOutput, counts: npt.NDArray[np.bool_], told: dict[str, GenerationOutput]
    ) -> None:
        """Read what stands behind accepted drafts, one depth after the other, until the requests end.

        The step has computed an accepted draft and sampled the token behind it: it counts as launched only now.
        """
        self.num_drafted += int((batch.depths > 0).sum())
        slots, lengths = next_reach(batch, counts)
        self._table.reach[slots] = lengths
        for depth in range(1, int(batch.depths.max()) + 1):
            rows = np.flatnonzero(counts[: batch.num_decodes] & (batch.depths == depth))
            rows = rows[self._queues.live(batch)[rows]]
            slots = batch.slots[rows]
            once = np.ones(len(rows), np.int32)
            self._table.launch(slots, once, once > 0)
            self._seal_full(slots, self._table.computed[slots])
            self._read(batch, output, rows, rows, told)
            self.num_accepted += len(rows)

    def _tell(
        self, told: dict[str, GenerationOutput], request: RequestState, token: int, logprob: TokenLogprob | None
    ) -> GenerationOutput:
        """Add a token to the request's news."""
        news = told.get(request.request_id)
        if news is None:
            news = told[request.request_id] = GenerationOutput(request.request_id)
            if not request.output_ids:
                news.num_cached_tokens = request.num_cached_tokens
                if request.params.prompt_logprobs is not None:
                    news.prompt_logprobs = [None, *request.prompt_logprobs]
        news.token_ids.append(token)
        if logprob is not None:
            news.logprobs = [*(news.logprobs or ()), logprob]
        request.output_ids.append(token)
        return news

    def _end(self, news: GenerationOutput, request: RequestState, *, stopped: bool) -> None:
        news.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        news.stop_token_id = news.token_ids[-1] if stopped else None
        self._finish(request, news.finish_reason)

    def _seal_read(self, slots: SlotArray) -> None:
        """Seal the blocks that the tokens just read fill, where the step that writes these is launched."""
        table = self._table
        read = table.known[slots] - table.unread[slots]
        launched = table.computed[slots] >= read
        self._seal_full(slots[launched], read[launched])

    def _seal_full(self, slots: SlotArray, num_tokens: SlotArray) -> None:
        """Seal the blocks that the last of ``num_tokens`` tokens of each slot fills."""
        fills = num_tokens % self._block_size == 0
        for slot, stop in zip(slots[fills].tolist(), num_tokens[fills].tolist(), strict=True):
            if self._table.requests[slot] is not None:
                self._queues.seal(slot, stop - 1, stop)

    def _finish(self, request: RequestState, reason: FinishReason) -> GenerationOutput:
        self._queues.finish(request)
        return GenerationOutput(request.request_id, finish_reason=reason)

    def _fail(self, request: RequestState, error: PagedServeError) -> GenerationOutput:
        news = self._finish(request, FinishReason.ERROR)
        news.error = error
        return news

    def check(self) -> None:
        """Prove the bookkeeping: every request in exactly one place, and the cache's own invariants."""
        self._queues.check()


def _step_error(error: Exception) -> PagedServeError:
    if isinstance(error, PagedServeError):
        return error
    return StepFailedError(f"the token could not be chosen: {error}")
