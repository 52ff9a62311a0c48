"""Which requests run in the next step, and what their tokens mean once it has run.

A request is known tokens of which some are computed; every step brings computed closer to known under one token
budget, and a row that reaches the end gets a next token. There are no phases beyond that: a prefill is a request with
many outstanding tokens, a decode one with a single one, and a preempted request is one whose computed tokens were
taken back. The scheduler owns the queues and the table; the cache manager owns the blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pagedserve_engine.batch import Batch, StepOutput
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.errors import ContextLengthError, PagedServeError, StepFailedError
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, RequestStatus
from pagedserve_engine.scheduler.budget import BlockReserve, StepPlan
from pagedserve_engine.scheduler.policies import POLICIES, Phase
from pagedserve_engine.scheduler.table import SequenceTable


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self._clock = clock
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._queue_waits: list[float] = []
        self._block_size = cache.layout.block_size
        self._reserve = BlockReserve.of(cache.num_total, safety_margin=safety_margin)
        self._table = SequenceTable(max_num_seqs, max_model_len=max_model_len, eos_token_ids=eos_token_ids)
        self._waiting: deque[RequestState] = deque()
        self._by_id: dict[str, RequestState] = {}
        phases: Mapping[Phase, Callable[[StepPlan], None]] = {
            Phase.DECODE: self._plan_decodes,
            Phase.SPLIT_PREFILL: self._plan_split_prefills,
            Phase.NEW: self._plan_new,
        }
        self._phases = [phases[phase] for phase in POLICIES[policy]]

    # --- the queues -------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._table.running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._by_id

    def oldest_arrival(self) -> float | None:
        """Monotonic seconds at which the longest waiting request came, None where none waits."""
        return self._waiting[0].arrival_time if self._waiting else None

    def add(self, request: RequestState) -> None:
        """Queue ``request``. Raises ContextLengthError where it cannot fit even alone."""
        longest = len(request.prompt_ids) + request.max_tokens
        if longest > self.max_model_len:
            raise ContextLengthError(
                f"prompt and output may take {longest} tokens together and this engine holds {self.max_model_len}: "
                f"send a shorter prompt or ask for at most {self.max_model_len - len(request.prompt_ids)} tokens",
                param="max_tokens",
            )
        assert request.request_id not in self._by_id, f"{request.request_id} is queued already"
        self._by_id[request.request_id] = request
        self._waiting.append(request)

    def cancel(self, request_id: str) -> GenerationOutput | None:
        """End a request wherever it stands and free its blocks; None where it has ended already."""
        request = self._by_id.get(request_id)
        return None if request is None else self._finish(request, FinishReason.CANCELLED)

    def fail_all(self, error: PagedServeError) -> list[GenerationOutput]:
        """End every request with ``error``."""
        return [self._fail(request, error) for request in list(self._by_id.values())]

    def fail_batch(self, batch: Batch, error: PagedServeError) -> list[GenerationOutput]:
        """End the requests of a step that failed; what it should have written is forgotten."""
        self._forget_writes(batch)
        return [self._fail(request, error) for request in batch.requests]

    def retry_batch(self, batch: Batch) -> None:
        """Take the requests of a step that failed back into the queue, to be computed again."""
        self._forget_writes(batch)
        for slot in sorted(batch.slots.tolist(), key=lambda slot: -self._table.request(slot).arrival_time):
            self._preempt(slot)

    def _forget_writes(self, batch: Batch) -> None:
        for slot, context in zip(batch.slots.tolist(), batch.context_lens.tolist(), strict=True):
            self.cache.discard(slot, context // self._block_size)

    # --- planning a step --------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, None where nothing can run."""
        plan = StepPlan(self.max_batch_tokens, self._table.max_num_seqs)
        for phase in self._phases:
            phase(plan)
        return None if plan.empty else self._build_batch(plan)

    def _plan_decodes(self, plan: StepPlan) -> None:
        running = self._table.running
        decodes = running[(self._table.outstanding(running) == 1) & ~plan.planned[running]][: plan.tokens_left]
        short = decodes[self._table.known[decodes] > self.cache.capacity[decodes]]
        if len(short):
            # Oldest first: whoever gives way is younger, and has not grown in this step.
            for slot in short.tolist():
                if self._table.requests[slot] is not None:
                    self._grow_or_preempt(slot, int(self._table.known[slot]), plan)
            decodes = decodes[[self._table.requests[slot] is not None for slot in decodes.tolist()]]
        plan.take_decodes(decodes)
        for slot in decodes[self._table.known[decodes] % self._block_size == 0].tolist():
            self._seal(slot, int(self._table.known[slot]))

    def _plan_split_prefills(self, plan: StepPlan) -> None:
        running = self._table.running
        for slot in running[self._table.outstanding(running) > 1].tolist():
            if plan.tokens_left <= 0:
                return
            if self._table.requests[slot] is not None and not plan.planned[slot]:
                self._plan_chunk(slot, plan)

    def _plan_chunk(self, slot: int, plan: StepPlan) -> None:
        computed = int(self._table.computed[slot])
        tokens = min(int(self._table.known[slot]) - computed, plan.tokens_left)
        wants_logits = self._table.request(slot).params.prompt_logprobs is not None
        if wants_logits:
            tokens = min(tokens, plan.prompt_logits_left)
        # A smaller chunk where there are no blocks for all of it; never none while it is alone.
        while tokens and not self._grow_or_evict_younger(slot, computed + tokens, plan):
            tokens //= 2
        if tokens:
            plan.take_chunk(slot, tokens)
            plan.prompt_logits_left -= tokens if wants_logits else 0
            self._seal(slot, computed + tokens)

    def _plan_new(self, plan: StepPlan) -> None:
        while self._waiting and plan.tokens_left > 0 and not self._table.full:
            request = self._waiting[0]
            cached = self._match(request)
            if not self._admits(request, cached, plan):
                return
            self._waiting.popleft()
            request.move_to(RequestStatus.RUNNING)
            self._note_wait(request)
            request.num_cached_tokens = max(request.num_cached_tokens, min(cached, len(request.prompt_ids)))
            slot = self._table.enter(request, computed=cached)
            self.cache.admit(slot, request.block_hashes, cached)
            self._plan_chunk(slot, plan)
            if not plan.planned[slot]:
                self._preempt(slot)
                return
            plan.admitted.add(slot)

    def _note_wait(self, request: RequestState) -> None:
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            self._queue_waits.append(request.first_scheduled_time - request.arrival_time)

    def take_queue_waits(self) -> list[float]:
        """Seconds that the requests scheduled for the first time since the last call had waited."""
        waits, self._queue_waits = self._queue_waits, []
        return waits

    def _match(self, request: RequestState) -> int:
        """Tokens of a waiting request that the cache holds. Prompt log probabilities need every token computed."""
        if request.params.prompt_logprobs is not None or not self.cache.finds_prefixes:
            return 0
        if len(request.block_hashes) < request.num_tokens // self._block_size:
            known = [*request.prompt_ids, *request.output_ids]
            self.cache.hash_blocks(known, request.block_hashes, request.salt)
        return self.cache.match(request.block_hashes, request.num_tokens)

    def _admits(self, request: RequestState, cached: int, plan: StepPlan) -> bool:
        if plan.empty and not len(self._table.running):
            return True
        chunk = min(request.num_tokens - cached, plan.tokens_left)
        needed = min(
            self.cache.can_admit(request.block_hashes, cached, request.num_tokens),
            self.cache.layout.blocks_for(request.num_tokens, chunk),
        )
        return self._reserve.admits(free=self.cache.num_free, needed=needed)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _grow_or_preempt(self, slot: int, tokens: int, plan: StepPlan) -> None:
        """Hold ``tokens`` tokens in ``slot``, or give the slot up where only older ones could make room."""
        if not self._grow_or_evict_younger(slot, tokens, plan):
            self._preempt(slot)

    def _grow_or_evict_younger(self, slot: int, tokens: int, plan: StepPlan) -> bool:
        while not self.cache.grow(slot, tokens):
            running = self._table.running
            youngest = running[~plan.planned[running]][-1] if not plan.planned[running].all() else slot
            if youngest == slot:
                return False
            self._preempt(int(youngest))
        return True

    def _preempt(self, slot: int) -> None:
        """Take a request's blocks and queue it again in its order of arrival; its tokens stay known."""
        request = self._table.request(slot)
        self._leave(slot)
        request.move_to(RequestStatus.WAITING)
        if not request.output_ids:
            request.prompt_logprobs.clear()
        request.num_preemptions += 1
        self.num_preemptions += 1
        place = next((i for i, other in enumerate(self._waiting) if other.arrival_time > request.arrival_time), None)
        self._waiting.append(request) if place is None else self._waiting.insert(place, request)

    def _leave(self, slot: int) -> None:
        self.cache.release(slot)
        self._table.leave(slot)

    def _seal(self, slot: int, tokens: int) -> None:
        """Let others find the blocks that this step fills up to ``tokens`` known tokens."""
        request = self._table.request(slot)
        full = tokens // self._block_size
        start = int(self._table.computed[slot]) // self._block_size
        if full <= start or not self.cache.finds_prefixes:
            return
        if len(request.block_hashes) < full:
            known = self._table.tokens[slot, : full * self._block_size]
            self.cache.hash_blocks(known, request.block_hashes, request.salt)
        self.cache.seal(slot, request.block_hashes, start, full)

    # --- a step's two ends ------------------------------------------------------------------------------------------

    def _build_batch(self, plan: StepPlan) -> Batch:
        table = self._table
        chunk_slots = np.array([slot for slot, _ in plan.chunks], np.int32)
        slots = np.concatenate([plan.decodes, chunk_slots])
        query_lens = np.ones(len(slots), np.int32)
        query_lens[len(plan.decodes) :] = [tokens for _, tokens in plan.chunks]
        context_lens = table.computed[slots]
        ends = context_lens + query_lens
        pieces = [table.tokens[slot, table.computed[slot] : table.computed[slot] + n] for slot, n in plan.chunks]
        num_columns = -(int(ends.max()) // -self._block_size)
        return Batch(
            requests=[table.request(slot) for slot in slots.tolist()],
            slots=slots,
            query_lens=query_lens,
            context_lens=context_lens,
            token_ids=np.concatenate([table.last_token[plan.decodes], *pieces]),
            sampled=ends == table.known[slots],
            block_tables=tuple(blocks[slots, :num_columns] for blocks in self.cache.block_tables),
            num_decodes=len(plan.decodes),
            admitted=tuple(i for i, slot in enumerate(slots.tolist()) if slot in plan.admitted)
            if plan.admitted
            else (),
        )

    def commit(self, batch: Batch, output: StepOutput) -> list[GenerationOutput]:
        """Take in what a step computed; returns the news of every request that has any."""
        table = self._table
        table.computed[batch.slots] += batch.query_lens
        for row, entries in output.prompt_logprobs.items():
            batch.requests[row].prompt_logprobs.extend(entries)
        rows = np.flatnonzero(batch.sampled)
        slots = batch.slots[rows]
        stops, full = table.append(slots, output.token_ids)
        over = (stops | full).tolist()
        outputs: list[GenerationOutput] = []
        for at, (row, token) in enumerate(zip(rows.tolist(), output.token_ids.tolist(), strict=True)):
            request = batch.requests[row]
            if row in output.failed:
                continue
            news = self._news(request, token)
            if at in output.logprobs:
                news.logprobs = [output.logprobs[at]]
            outputs.append(news)
            if over[at]:
                self._end(news, request, stopped=bool(stops[at]))
        for row, error in output.failed.items():
            # Whatever went wrong may stand in its blocks: those who ask the same again must not find them.
            self.cache.discard(int(batch.slots[row]), 0)
            outputs.append(self._fail(batch.requests[row], _step_error(error)))
        self._trim(batch)
        return outputs

    def _news(self, request: RequestState, token: int) -> GenerationOutput:
        news = GenerationOutput(request.request_id, [token])
        if not request.output_ids:
            news.num_cached_tokens = request.num_cached_tokens
            if request.params.prompt_logprobs is not None:
                news.prompt_logprobs = [None, *request.prompt_logprobs]
        request.output_ids.append(token)
        return news

    def _end(self, news: GenerationOutput, request: RequestState, *, stopped: bool) -> None:
        news.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        news.stop_token_id = news.token_ids[-1] if stopped else None
        self._finish(request, news.finish_reason)

    def _trim(self, batch: Batch) -> None:
        due = self.cache.trim_due(batch.slots, self._table.computed[batch.slots])
        for slot in batch.slots[due].tolist():
            if self._table.requests[slot] is not None:
                self.cache.trim(slot, int(self._table.computed[slot]))

    def _finish(self, request: RequestState, reason: FinishReason) -> GenerationOutput:
        if request.status is RequestStatus.RUNNING:
            self._leave(request.slot)
        else:
            self._waiting.remove(request)
        request.move_to(RequestStatus.FINISHED)
        del self._by_id[request.request_id]
        return GenerationOutput(request.request_id, finish_reason=reason)

    def _fail(self, request: RequestState, error: PagedServeError) -> GenerationOutput:
        news = self._finish(request, FinishReason.ERROR)
        news.error = error
        return news

    def check(self) -> None:
        """Prove the bookkeeping: every request in exactly one place, and the cache's own invariants."""
        running = [request.request_id for request in self._table]
        waiting = [request.request_id for request in self._waiting]
        assert sorted(running + waiting) == sorted(self._by_id), "a request is lost or stands in two places"
        assert len(set(running)) == len(running)
        self.cache.check()


def _step_error(error: Exception) -> PagedServeError:
    if isinstance(error, PagedServeError):
        return error
    return StepFailedError(f"the token could not be chosen: {error}")
