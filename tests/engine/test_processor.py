"""The order of launches, reads and commits, and who is told what when one of them fails."""

from __future__ import annotations

import pytest

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.errors import CancelledRequestError, DeviceFailedError, OutOfDeviceMemoryError
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, SamplingParams
from pagedserve_engine.scheduler.scheduler import Scheduler
from shadow import VOCAB, ShadowRunner, expected_output, shadow_processor

Prompts = dict[str, list[int]]
PROMPTS: Prompts = {"one": [1, 2, 3], "two": [4, 5, 6, 7, 8], "three": [9]}


def start(
    depth: int = 1, prompts: Prompts = PROMPTS, *, max_tokens: int = 6, **options: int
) -> tuple[ContinuousBatchProcessor, ShadowRunner]:
    """A processor to which ``prompts`` were added, in their order."""
    processor, runner = shadow_processor(steps_in_flight=depth, **options)
    for arrival, (name, prompt) in enumerate(prompts.items()):
        params = SamplingParams(max_tokens=max_tokens)
        request = RequestState.create(name, prompt, params, arrival_time=float(arrival), max_model_len=200)
        assert processor.add_request(request) is None
    return processor, runner


def drain(processor: ContinuousBatchProcessor) -> list[GenerationOutput]:
    outputs = []
    while not processor.scheduler.idle:
        outputs += processor.step()[0]
        processor.scheduler.check()
    cache = processor.scheduler.cache
    assert cache.num_free == cache.num_total
    return outputs


def tokens(outputs: list[GenerationOutput]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in outputs:
        found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def expected(prompts: Prompts = PROMPTS, num_tokens: int = 6) -> dict[str, list[int]]:
    return {name: expected_output(prompt, num_tokens, VOCAB) for name, prompt in prompts.items()}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_everybody_is_told_everything_however_many_steps_are_in_flight(depth: int) -> None:
    processor, runner = start(depth)
    assert tokens(drain(processor)) == expected()
    assert len(runner.batches) == 6


def test_figures_are_of_the_step_that_was_launched_and_of_the_tokens_that_were_read() -> None:
    processor, _ = start()
    figures = []
    while not processor.scheduler.idle:
        stats = processor.step()[1]
        figures.append((stats.num_tokens, stats.prompt_tokens, stats.generated_tokens))
    assert figures == [(9, 9, 0), (3, 0, 3), (3, 0, 3), (3, 0, 3), (3, 0, 3), (3, 0, 3), (0, 0, 3)]


def test_nothing_lies_between_two_steps_while_one_is_in_flight() -> None:
    gaps = {}
    for depth in (0, 1):
        processor, _ = start(depth)
        gaps[depth] = [processor.step()[1].gap > 0.0 for _ in range(5)]
    # Before the first step the device had nothing to wait for.
    assert gaps == {0: [False, True, True, True, True], 1: [False] * 5}


def test_what_is_in_flight_is_work_until_it_was_read() -> None:
    processor, _ = start()
    processor.step()
    for name in PROMPTS:
        assert processor.cancel(name) is not None
    assert processor.scheduler.cache.num_free == processor.scheduler.cache.num_total
    assert not processor.scheduler.idle
    outputs, stats = processor.step()
    assert (outputs, stats.num_tokens) == ([], 0)
    assert processor.scheduler.idle


def test_all_requests_can_be_failed_with_a_step_in_flight() -> None:
    processor, _ = start()
    processor.step()
    processor.step()
    cause = CancelledRequestError("the engine was stopped")
    ended = processor.fail_all_requests(cause)
    assert {output.request_id: output.error for output in ended} == dict.fromkeys(PROMPTS, cause)
    assert drain(processor) == []


def test_a_launch_that_fails_takes_no_token_from_the_step_before() -> None:
    processor, runner = start()
    outputs = processor.step()[0] + processor.step()[0]
    runner.errors.append(ValueError("boom"))
    failed = processor.step()[0]
    told = tokens(outputs + failed)
    assert told == expected(num_tokens=2)
    assert [output.finish_reason for output in failed[3:]] == [FinishReason.ERROR] * 3
    assert processor.scheduler.idle


def test_a_step_that_fails_when_it_is_read_voids_the_one_behind_it() -> None:
    processor, runner = start(max_num_seqs=3, budget=9)
    processor.step()
    runner.late_errors.append(ValueError("boom"))
    outputs = processor.step()[0]
    # The newcomer takes a slot of the step behind the one that fails.
    assert processor.cancel("one") is not None
    request = RequestState.create("new", [7] * 5, SamplingParams(max_tokens=6), arrival_time=9.0, max_model_len=200)
    processor.add_request(request)
    outputs += processor.step()[0]
    ended = {output.request_id for output in outputs if output.finish_reason is FinishReason.ERROR}
    assert ended == {"two", "three"}
    assert tokens(drain(processor)) == {"new": expected_output([7] * 5, 6, VOCAB)}
    assert request.num_preemptions == 1


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_loses_nothing_whenever_it_shows(late: bool) -> None:
    processor, runner = start()
    outputs = processor.step()[0]
    (runner.late_errors if late else runner.errors).append(OutOfDeviceMemoryError("full"))
    outputs += drain(processor)
    assert tokens(outputs) == expected()
    assert processor.scheduler.max_batch_tokens == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_broken_device_surfaces(late: bool) -> None:
    processor, runner = start()
    processor.step()
    (runner.late_errors if late else runner.errors).append(DeviceFailedError("the card fell off the bus"))
    with pytest.raises(DeviceFailedError, match="fell off"):
        drain(processor)


def test_two_failures_in_flight_are_answered_in_their_order() -> None:
    processor, runner = start(max_num_seqs=3)
    runner.late_errors += [ValueError("first"), ValueError("second")]
    processor.step()
    outputs = processor.step()[0]
    assert {output.request_id for output in outputs if output.error} == set(PROMPTS)
    assert all("first" in str(output.error) for output in outputs)
    assert processor.scheduler.idle


@pytest.mark.parametrize("late", [False, True])
def test_what_left_a_window_in_a_step_that_failed_is_never_found(late: bool) -> None:
    layout = CacheLayout.build(["sliding"], window=5, num_kv_heads=1, head_dim=2, block_size=4, dtype_bytes=4)
    cache = CacheManager(layout, num_blocks=40, max_num_seqs=4, max_model_len=100)
    scheduler = Scheduler(
        cache,
        policy="fifo",
        max_batch_tokens=64,
        max_num_seqs=4,
        max_model_len=100,
        safety_margin=0.0,
        eos_token_ids=(),
    )
    runner = ShadowRunner(layout, num_blocks=40, max_num_seqs=4)
    processor = ContinuousBatchProcessor(scheduler, runner, steps_in_flight=1)
    (runner.late_errors if late else runner.errors).append(ValueError("boom"))
    outputs = []
    for name in ("doomed", "heir"):
        prompt = list(range(1, 31 if name == "doomed" else 18))
        request = RequestState.create(name, prompt, SamplingParams(max_tokens=4), arrival_time=0.0, max_model_len=100)
        processor.add_request(request)
        outputs += drain(processor)
    assert tokens(outputs) == {"doomed": [], "heir": expected_output(list(range(1, 18)), 4, VOCAB)}
