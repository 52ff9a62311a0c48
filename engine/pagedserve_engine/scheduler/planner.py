"""Which requests share the next step, under one token budget and the blocks that there are.

A request is known tokens of which some are computed; every step brings computed closer to known. There are no phases
beyond that: a prefill is a request with many outstanding tokens, a decode one with a single one, and a preempted
request is one whose computed tokens were taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pagedserve_engine.batch import Batch
from pagedserve_engine.request import RequestState
from pagedserve_engine.scheduler.assembling import build_batch
from pagedserve_engine.scheduler.budget import BlockReserve, StepPlan
from pagedserve_engine.scheduler.policies import POLICIES, Phase
from pagedserve_engine.scheduler.queues import Queues
from pagedserve_engine.speculation import NgramDrafter


class Planner:
    """Fills a step, phase by phase in the order of ``policy``; ``reserve`` is kept from requests that are new.

    What they leave of the step goes to drafts, if there is a ``drafter``.
    """

    def __init__(
        self,
        queues: Queues,
        *,
        policy: str,
        reserve: BlockReserve,
        drafter: NgramDrafter | None,
        clock: Callable[[], float],
    ) -> None:
        self._queues = queues
        self._cache = queues.cache
        self._table = queues.table
        self._block_size = queues.cache.layout.block_size
        self._reserve = reserve
        self._drafter = drafter
        self._clock = clock
        self._queue_waits: list[float] = []
        phases: Mapping[Phase, Callable[[StepPlan], None]] = {
            Phase.DECODE: self._plan_decodes,
            Phase.SPLIT_PREFILL: self._plan_split_prefills,
            Phase.NEW: self._plan_new,
        }
        self._phases = [phases[phase] for phase in POLICIES[policy]]

    def plan(self, max_batch_tokens: int) -> Batch | None:
        """The next step of up to ``max_batch_tokens`` query tokens, None where nothing can run."""
        plan = StepPlan(max_batch_tokens, self._table.max_num_seqs)
        for phase in self._phases:
            phase(plan)
        if self._drafter is not None and len(plan.decodes):
            self._plan_drafts(plan, self._drafter)
        return None if plan.empty else build_batch(plan, self._table, self._cache)

    def take_queue_waits(self) -> list[float]:
        """Seconds that the requests scheduled for the first time since the last call had waited."""
        waits, self._queue_waits = self._queue_waits, []
        return waits

    # --- phases -----------------------------------------------------------------------------------------------------

    def _plan_decodes(self, plan: StepPlan) -> None:
        table = self._table
        running = table.running
        # At full length a request only waits for its last token.
        due = (table.outstanding(running) == 1) & (table.known[running] < table.limit[running]) & ~plan.planned[running]
        decodes = running[due][: plan.tokens_left]
        short = decodes[table.known[decodes] > self._cache.capacity[decodes]]
        if len(short):
            # Oldest first: whoever gives way is younger, and has not grown in this step.
            for slot in short.tolist():
                if table.requests[slot] is not None:
                    self._grow_or_preempt(slot, int(table.known[slot]), plan)
            decodes = decodes[[table.requests[slot] is not None for slot in decodes.tolist()]]
        plan.take_decodes(decodes)
        # A block whose last token is still in flight has no hash yet: it is sealed when the token is read.
        fills = (table.known[decodes] % self._block_size == 0) & (table.unread[decodes] == 0)
        for slot in decodes[fills].tolist():
            self._queues.seal(slot, int(table.known[slot]) - 1, int(table.known[slot]))

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
            self._queues.seal(slot, computed, computed + tokens)

    def _plan_new(self, plan: StepPlan) -> None:
        waiting = self._queues.waiting
        while waiting and plan.tokens_left > 0 and not self._table.full:
            request = waiting[0]
            if request.num_preemptions and self._queues.in_step(request):
                return
            cached = self._match(request)
            if not self._admits(request, cached, plan):
                return
            self._note_wait(request)
            request.num_cached_tokens = max(request.num_cached_tokens, min(cached, len(request.prompt_ids)))
            slot = self._queues.enter(request, computed=cached)
            self._plan_chunk(slot, plan)
            if not plan.planned[slot]:
                self._queues.preempt(slot)
                return
            plan.admitted.add(slot)

    def _note_wait(self, request: RequestState) -> None:
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            self._queue_waits.append(request.first_scheduled_time - request.arrival_time)

    def _match(self, request: RequestState) -> int:
        """Tokens of a waiting request that the cache holds. Prompt log probabilities need every token computed."""
        if request.params.prompt_logprobs is not None or not self._cache.finds_prefixes:
            return 0
        if len(request.block_hashes) < request.num_tokens // self._block_size:
            known = [*request.prompt_ids, *request.output_ids]
            self._cache.hash_blocks(known, request.block_hashes, request.salt)
        return self._cache.match(request.block_hashes, request.num_tokens)

    def _admits(self, request: RequestState, cached: int, plan: StepPlan) -> bool:
        if plan.empty and not len(self._table.running):
            return True
        chunk = min(request.num_tokens - cached, plan.tokens_left)
        needed = min(
            self._cache.can_admit(request.block_hashes, cached, request.num_tokens),
            self._cache.layout.blocks_for(request.num_tokens, chunk),
        )
        return self._reserve.admits(free=self._cache.num_free, needed=needed)

    def _plan_drafts(self, plan: StepPlan, drafter: NgramDrafter) -> None:
        """Guess what follows the decoding rows, with rows and tokens that are left over and blocks that nobody misses.

        A row whose last token is in flight has nothing to look up.
        """
        table = self._table
        left = min(plan.rows_left, plan.tokens_left)
        able = plan.decodes[table.draftable[plan.decodes] & (table.unread[plan.decodes] == 0)]
        for slot in able.tolist():
            known = int(table.known[slot])
            # The step brings one token more than it accepts.
            most = min(left, int(table.reach[slot]), int(table.limit[slot]) - known - 1)
            if most <= 0:
                continue
            draft = drafter.draft(table.tokens[slot, :known], most=most)
            draft = draft[: self._spare_room(slot, known + len(draft)) - known]
            if len(draft):
                plan.take_draft(slot, draft)
                left -= len(draft)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _grow_or_preempt(self, slot: int, tokens: int, plan: StepPlan) -> None:
        """Hold ``tokens`` tokens in ``slot``, or give the slot up where only older ones could make room."""
        if not self._grow_or_evict_younger(slot, tokens, plan):
            self._queues.preempt(slot)

    def _spare_room(self, slot: int, tokens: int) -> int:
        """Tokens that ``slot`` can hold, having grown up to ``tokens`` if that leaves the reserve alone."""
        lacking = -(-tokens // self._block_size) - int(self._cache.capacity[slot]) // self._block_size
        if lacking > 0 and self._reserve.admits(
            free=self._cache.num_free, needed=lacking * len(self._cache.block_tables)
        ):
            self._cache.grow(slot, tokens)
        return int(self._cache.capacity[slot])

    def _grow_or_evict_younger(self, slot: int, tokens: int, plan: StepPlan) -> bool:
        while not self._cache.grow(slot, tokens):
            running = self._table.running
            youngest = running[~plan.planned[running]][-1] if not plan.planned[running].all() else slot
            if youngest == slot:
                return False
            self._queues.preempt(int(youngest))
        return True
