"""The scheduler with a runner that reads back what the cache should hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedserve_engine.errors import ContextLengthError, DeviceFailedError, OutOfDeviceMemoryError
from pagedserve_engine.request import FinishReason, GrammarSpec
from scheduling import Engine, prompt
from shadow import VOCAB, expected_output

MakeEngine = Callable[..., Engine]


@pytest.fixture(params=[0, 1, 2], ids=["one at a time", "one in flight", "two in flight"])
def make(request: pytest.FixtureRequest) -> MakeEngine:
    """Engine with so many steps in flight."""
    return functools.partial(Engine, steps_in_flight=request.param)


@pytest.mark.parametrize("policy", ["fifo", "prefill_first"])
def test_every_request_gets_its_own_sequence_whatever_runs_beside_it(make: MakeEngine, policy: str) -> None:
    engine = make(policy=policy)
    ids = [engine.add(prompt(n, n), max_tokens=9) for n in (1, 3, 4, 5, 17, 40)]
    engine.run()
    for request_id in ids:
        engine.assert_exact(request_id)
    assert engine.cache.num_free == engine.cache.num_total


def test_a_prompt_longer_than_the_budget_is_split_and_decoding_goes_on_beside_it(make: MakeEngine) -> None:
    engine = make(budget=8, num_blocks=64)
    short = engine.add(prompt(3), max_tokens=20)
    engine.step()
    long = engine.add(prompt(40, 5), max_tokens=2)
    for _ in range(5):
        engine.step()
        assert engine.runner.batches[-1].requests == [engine.requests[short], engine.requests[long]]
    engine.run()
    engine.assert_exact(long)
    assert max(batch.num_tokens for batch in engine.runner.batches) <= 8


def test_prefill_first_finishes_a_split_prefill_before_it_decodes(make: MakeEngine) -> None:
    engine = make(budget=8, num_blocks=64, policy="prefill_first")
    short = engine.add(prompt(3), max_tokens=20)
    engine.step()
    engine.add(prompt(40, 5), max_tokens=2)
    engine.step()
    prefilled = engine.runner.num_prompt_tokens
    engine.step()
    assert engine.runner.num_prompt_tokens == prefilled + 8
    assert engine.runner.batches[-1].num_decodes == 0
    engine.run()
    engine.assert_exact(short)


def test_out_of_blocks_the_youngest_gives_way_and_loses_nothing(make: MakeEngine) -> None:
    engine = make(num_blocks=13, block_size=4, budget=64)
    ids = [engine.add(prompt(8, n * 100), max_tokens=24) for n in range(4)]
    engine.run()
    assert engine.scheduler.num_preemptions > 0
    assert engine.requests[ids[0]].num_preemptions == 0
    for request_id in ids:
        engine.assert_exact(request_id)


def test_below_the_safety_margin_nothing_new_is_admitted_while_something_runs(make: MakeEngine) -> None:
    engine = make(num_blocks=11, block_size=4, budget=64, safety_margin=0.5)
    engine.add(prompt(12), max_tokens=4)
    engine.step()
    engine.add(prompt(12, 50), max_tokens=4)
    engine.step()
    assert engine.scheduler.num_running == 1
    engine.run()


def test_a_lone_prompt_larger_than_what_the_margin_leaves_still_runs(make: MakeEngine) -> None:
    engine = make(num_blocks=11, block_size=4, budget=64, safety_margin=0.9)
    request_id = engine.add(prompt(36), max_tokens=4)
    engine.run()
    engine.assert_exact(request_id)


def test_a_lone_sequence_may_fill_the_whole_pool_with_any_layout(make: MakeEngine) -> None:
    for layers, window in ((("full",), None), (("sliding",) * 5 + ("full",), 6), (("sliding",), 5)):
        engine = make(layer_types=layers, window=window, num_blocks=40, block_size=4, budget=64)
        request_id = engine.add(prompt(engine.max_model_len - 4), max_tokens=4)
        engine.run()
        engine.assert_exact(request_id)


def test_what_can_never_fit_is_refused_at_once_and_says_what_would(make: MakeEngine) -> None:
    engine = make(num_blocks=11, block_size=4)
    with pytest.raises(ContextLengthError, match="at most 39"):
        engine.add(prompt(40), max_tokens=1)
    with pytest.raises(ContextLengthError, match="ask for at most 10"):
        engine.add(prompt(30), max_tokens=11)


def test_requests_submitted_together_share_a_prefix_that_is_still_being_computed(make: MakeEngine) -> None:
    engine = make(num_blocks=1000, block_size=32, budget=256, max_num_seqs=32, max_model_len=1200)
    shared = prompt(1000)
    ids = [engine.add([*shared, *prompt(32, 300 + n)], max_tokens=4) for n in range(32)]
    engine.run()
    assert engine.runner.num_prompt_tokens <= 1000 + 32 * 64
    for request_id in ids:
        engine.assert_exact(request_id)


def test_no_request_starves(make: MakeEngine) -> None:
    """A request waits at most until those that came before it have ended, however many come after."""
    engine = make(num_blocks=12, block_size=4, budget=8, safety_margin=0.3, max_num_seqs=3)
    for n in range(3):
        engine.add(prompt(6, n * 50), max_tokens=6)
    victim = engine.add(prompt(30), max_tokens=8)
    steps = 0
    while engine.reason(victim) is None:
        engine.step()
        steps += 1
        if steps % 2 == 0 and len(engine.requests) < 200:
            engine.add(prompt(6, steps), max_tokens=6)
        # Alone, each of the four needs at most ceil(prompt / budget) + max_tokens steps; together they need no more
        # than the sum, and a preemption adds at most another prefill for each.
        assert steps <= 2 * (3 * (1 + 6) + (4 + 8))
    engine.assert_exact(victim)
    engine.run()


@pytest.mark.parametrize("steps", range(8))
def test_a_request_can_be_cancelled_at_any_moment(make: MakeEngine, steps: int) -> None:
    engine = make(budget=8)
    doomed = engine.add(prompt(20), max_tokens=6)
    other = engine.add(prompt(9, 3), max_tokens=6)
    for _ in range(steps):
        engine.step()
    engine.cancel(doomed)
    assert engine.reason(doomed) is FinishReason.CANCELLED
    engine.run()
    engine.assert_exact(other)
    assert engine.cache.num_free == engine.cache.num_total


def test_a_stop_token_ends_a_request_and_is_named(make: MakeEngine) -> None:
    engine = make()
    third = expected_output(prompt(5), 3, VOCAB)[2]
    request_id = engine.add(prompt(5), max_tokens=8, stop_token_ids=(third,))
    engine.run()
    last = engine.news[request_id][-1]
    assert (len(engine.tokens(request_id)), last.finish_reason, last.stop_token_id) == (3, FinishReason.STOP, third)


def test_an_end_token_is_ignored_on_request(make: MakeEngine) -> None:
    third = expected_output(prompt(5), 3, VOCAB)[2]
    engine = make(eos=(third,))
    ends, goes_on = engine.add(prompt(5), ignore_eos=False), engine.add(prompt(5), ignore_eos=True)
    engine.run()
    assert engine.reason(ends) is FinishReason.STOP
    engine.assert_exact(goes_on)


def test_prompt_logprobs_come_once_whatever_is_split_or_cached(make: MakeEngine) -> None:
    engine = make(budget=8, num_blocks=64)
    engine.add(prompt(30), max_tokens=2)
    engine.run()
    request_id = engine.add(prompt(30), max_tokens=2, prompt_logprobs=0)
    engine.run()
    scored = [output.prompt_logprobs for output in engine.news[request_id] if output.prompt_logprobs is not None]
    assert len(scored) == 1
    assert [entry.token_id for entry in scored[0][1:] if entry] == prompt(30)[1:]


def test_a_failed_step_ends_its_requests_and_no_other(make: MakeEngine) -> None:
    engine = make(budget=8, max_num_seqs=1)
    doomed, other = engine.add(prompt(8)), engine.add(prompt(8))
    engine.runner.errors.append(ValueError("boom"))
    engine.step()
    assert engine.reason(doomed) is FinishReason.ERROR
    assert "boom" in str(engine.news[doomed][-1].error)
    engine.run()
    engine.assert_exact(other)


def test_out_of_memory_lowers_the_batch_and_loses_nothing(make: MakeEngine) -> None:
    engine = make(budget=16)
    ids = [engine.add(prompt(12, n), max_tokens=5) for n in range(3)]
    engine.runner.errors.extend([OutOfDeviceMemoryError("full"), OutOfDeviceMemoryError("full")])
    engine.run()
    assert engine.scheduler.max_batch_tokens == 4
    for request_id in ids:
        engine.assert_exact(request_id)


def test_out_of_memory_for_a_single_token_is_the_device_s_end(make: MakeEngine) -> None:
    engine = make(budget=1)
    engine.add([1])
    engine.runner.errors.append(OutOfDeviceMemoryError("full"))
    with pytest.raises(DeviceFailedError, match="one token"):
        engine.step()


def test_a_failure_that_shows_when_the_next_step_is_launched_ends_its_own_requests_and_no_other() -> None:
    engine = Engine(budget=16, steps_in_flight=1, max_num_seqs=4)
    doomed = [engine.add(prompt(8, n), max_tokens=6) for n in range(2)]
    engine.runner.late_errors.append(ValueError("boom"))
    engine.step()
    # It finds the doomed one's prompt in the cache, where nothing was written.
    heir = engine.add([*prompt(8), 7], max_tokens=6)
    engine.step()
    assert [engine.reason(request_id) for request_id in doomed] == [FinishReason.ERROR] * 2
    assert engine.requests[heir].num_cached_tokens == 8
    engine.run()
    engine.assert_exact(heir)
    assert engine.cache.num_free == engine.cache.num_total


def test_the_next_step_is_launched_before_the_one_before_is_read() -> None:
    engine = Engine(steps_in_flight=1)
    request_id = engine.add(prompt(5), max_tokens=4)
    told = []
    while not engine.scheduler.idle:
        engine.step()
        told.append((len(engine.runner.batches), len(engine.tokens(request_id))))
    # The fourth step is the last: at full length nothing more is launched.
    assert told == [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)]
    assert [batch.carried.tolist() for batch in engine.runner.batches] == [[False], [True], [True], [True]]


def test_a_request_that_stopped_has_one_wasted_row_and_says_nothing_of_it() -> None:
    engine = Engine(steps_in_flight=1)
    third = expected_output(prompt(5), 3, VOCAB)[2]
    request_id = engine.add(prompt(5), max_tokens=8, stop_token_ids=(third,))
    other = engine.add(prompt(7), max_tokens=8)
    while engine.reason(request_id) is None:
        engine.step()
    assert engine.requests[request_id] in engine.runner.batches[-1].requests
    engine.run()
    assert engine.tokens(request_id) == expected_output(prompt(5), 3, VOCAB)
    engine.assert_exact(other)


def test_a_slot_may_have_a_new_owner_while_a_step_still_names_the_old_one() -> None:
    engine = Engine(steps_in_flight=1, max_num_seqs=1)
    old, new = engine.add(prompt(5), max_tokens=9), engine.add(prompt(6, 3), max_tokens=4)
    engine.step()
    engine.step()
    engine.cancel(old)
    engine.step()
    assert engine.runner.batches[-1].requests == [engine.requests[new]]
    engine.run()
    engine.assert_exact(new)
    assert engine.tokens(old) == expected_output(prompt(5), 1, VOCAB)


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    engine = Engine(steps_in_flight=1, num_blocks=9, block_size=4, budget=64)
    older, younger = engine.add(prompt(12), max_tokens=16), engine.add(prompt(11, 50), max_tokens=16)
    while not engine.scheduler.num_preemptions:
        before = len(engine.tokens(younger))
        engine.step()
    # The step that it was in is read after it lost its slot.
    assert engine.requests[younger].slot == -1
    assert len(engine.tokens(younger)) == before + 1
    engine.run()
    engine.assert_exact(older)
    engine.assert_exact(younger)


def test_a_generated_block_is_found_again_while_its_step_is_in_flight() -> None:
    engine = Engine(steps_in_flight=1, block_size=4, num_blocks=64)
    first = engine.add(prompt(6), max_tokens=12)
    while len(engine.tokens(first)) < 6:
        engine.step()
    known = [*prompt(6), *engine.tokens(first)]
    follower = engine.add([*known, 5], max_tokens=3)
    engine.run()
    assert engine.requests[follower].num_cached_tokens == 12
    engine.assert_exact(follower)


def test_a_step_with_a_grammar_is_read_before_the_next_one_is_launched() -> None:
    engine = Engine(steps_in_flight=1, budget=8)
    followed = engine.add(prompt(12), max_tokens=3, grammar=GrammarSpec("regex", "x"))
    plain = engine.add(prompt(3, 9), max_tokens=9)
    told = []
    while engine.reason(followed) is None:
        engine.step()
        told.append(len(engine.tokens(followed)))
    # Its first chunk samples nothing, so that nobody must wait for it.
    assert told == [0, 1, 2, 3]
    assert engine.scheduler.steps_in_flight == 0
    engine.step()
    assert engine.scheduler.steps_in_flight == 1
    engine.run()
    engine.assert_exact(plain)


Layout = tuple[tuple[str, ...], int | None]


@settings(max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, failures and evictions, on small caches of every layout."""

    @initialize(
        layout=st.sampled_from(
            [(("full",) * 2, None), (("sliding",), 5), (("sliding", "sliding", "full"), 6), (("sliding", "full"), 3)]
        ),
        block_size=st.sampled_from([1, 2, 4, 8]),
        num_blocks=st.integers(16, 40),
        budget=st.integers(1, 40),
        policy=st.sampled_from(["fifo", "prefill_first"]),
        margin=st.sampled_from([0.0, 0.2, 0.6]),
        prefix_cache=st.booleans(),
        max_num_seqs=st.integers(1, 6),
        steps_in_flight=st.integers(0, 2),
        drafted=st.sampled_from([0, 1, 4]),
        period=st.sampled_from([None, 2, 5]),
    )
    def build(self, layout: Layout, budget: int, policy: str, margin: float, **options: Any) -> None:
        self.budget = budget
        self.engine = Engine(
            layer_types=layout[0],
            window=layout[1],
            budget=budget,
            policy=policy,
            safety_margin=margin,
            **options,
        )

    @rule(family=st.integers(0, 2), length=st.integers(1, 60), max_tokens=st.integers(1, 12))
    def arrive(self, family: int, length: int, max_tokens: int) -> None:
        length = min(length, self.engine.max_model_len - 1)
        self.engine.add(prompt(length, family), min(max_tokens, self.engine.max_model_len - length))

    @rule(steps=st.integers(1, 5))
    def work(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.engine.requests:
            self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @rule(data=st.data(), out_of_memory=st.booleans(), late=st.booleans(), length=st.integers(0, 40))
    def fail(self, data: st.DataObject, out_of_memory: bool, late: bool, length: int) -> None:
        """A step fails, at its launch or when it is read; in between requests come and go."""
        runner = self.engine.runner
        # One token that does not fit, or many failures in a row, would be the end of the device.
        runner.smallest_failing_batch = 2 if out_of_memory else 1
        errors = [OutOfDeviceMemoryError("full") if out_of_memory else ValueError("boom")]
        runner.errors, runner.late_errors = ([], errors) if late else (errors, [])
        self.engine.step()
        runner.errors, runner.late_errors = [], []
        if length:
            self.cancel(data)
            self.arrive(length % 3, length, 2)
        self.engine.step()
        self.engine.add([1], 1)
        self.engine.run()
        self.engine.scheduler.max_batch_tokens = self.budget

    @rule(count=st.none() | st.integers(1, 5))
    def evict(self, count: int | None) -> None:
        self.engine.cache.evict_cached(count)

    @invariant()
    def bookkeeping_adds_up(self) -> None:
        self.engine.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run(max_steps=20000)
        assert self.engine.cache.num_free == self.engine.cache.num_total
        for request_id in self.engine.requests:
            if self.engine.reason(request_id) is FinishReason.LENGTH:
                self.engine.assert_exact(request_id)
            else:
                tokens = self.engine.tokens(request_id)
                assert tokens == self.engine.expect(request_id)[: len(tokens)]
                assert self.engine.reason(request_id) in (FinishReason.CANCELLED, FinishReason.ERROR)


TestScheduler = SchedulerMachine.TestCase
