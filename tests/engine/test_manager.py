"""The core's thread, driven as a program without HTTP drives it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pagedserve_engine.errors import (
    CancelledRequestError,
    ContextLengthError,
    DeviceFailedError,
    DrainingError,
    EngineDeadError,
)
from pagedserve_engine.manager import ContinuousBatchingManager, News, collect, run_batch
from pagedserve_engine.request import FinishReason, SamplingParams
from shadow import VOCAB, ShadowRunner, expected_output, shadow_processor


class Gate(ShadowRunner):
    """Runs a step only when told to."""

    def __init__(self, inner: ShadowRunner) -> None:
        self.__dict__.update(inner.__dict__)
        self.open = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def launch(self, batch):  # type: ignore[no-untyped-def]
        self.entered.release()
        self.open.acquire()
        return super().launch(batch)


@pytest.fixture(params=[0, 1], ids=["one step at a time", "a step in flight"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def manager(depth: int) -> Iterator[ContinuousBatchingManager]:
    processor, _ = shadow_processor(steps_in_flight=depth)
    manager = ContinuousBatchingManager(processor)
    manager.start()
    yield manager
    manager.stop(block=True)


def params(max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def test_a_request_is_read_token_by_token_to_its_end(manager: ContinuousBatchingManager) -> None:
    request_id = manager.add_request([1, 2, 3], params())
    outputs = list(manager.request_id_iter(request_id))
    assert [token for output in outputs for token in output.token_ids] == expected_output([1, 2, 3], 6, VOCAB)
    assert [output.finished for output in outputs] == [False] * 5 + [True]


def test_a_batch_comes_back_whole_and_in_order_and_one_bad_prompt_hurts_no_other(
    manager: ContinuousBatchingManager,
) -> None:
    prompts = [[1, 2, 3], [], [4] * 50, [5] * 500, [6]]
    outputs = run_batch(manager, prompts, params(), progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        if len(prompt) in (0, 500):
            assert isinstance(output.error, ContextLengthError)
        else:
            assert output.token_ids == expected_output(prompt, 6, VOCAB)


def test_a_cancelled_request_ends_and_the_others_go_on(manager: ContinuousBatchingManager) -> None:
    doomed, other = manager.add_request([1], params(190)), manager.add_request([2], params())
    manager.cancel(doomed)
    assert collect(manager.request_id_iter(doomed)).finish_reason is FinishReason.CANCELLED
    assert collect(manager.request_id_iter(other)).token_ids == expected_output([2], 6, VOCAB)


def test_stop_with_drain_lets_everything_finish(depth: int) -> None:
    manager = ContinuousBatchingManager(shadow_processor(steps_in_flight=depth)[0])
    manager.start()
    ids = [manager.add_request([n], params(20)) for n in range(1, 5)]
    manager.stop(block=True, drain=True)
    for n, request_id in enumerate(ids, start=1):
        assert collect(manager.request_id_iter(request_id)).token_ids == expected_output([n], 20, VOCAB)
    with pytest.raises(DrainingError):
        manager.add_request([1])


def test_stop_without_drain_answers_every_request(depth: int) -> None:
    processor, runner = shadow_processor(steps_in_flight=depth, max_num_seqs=1)
    gate = Gate(runner)
    processor._runner = gate
    manager = ContinuousBatchingManager(processor)
    manager.start()
    ids = [manager.add_request([n], params(20)) for n in range(1, 4)]
    gate.entered.acquire()
    manager.stop(block=False)
    gate.open.release(100)
    manager.stop(block=True)
    for request_id in ids:
        output = collect(manager.request_id_iter(request_id))
        assert isinstance(output.error, CancelledRequestError)


def test_a_dead_core_fails_every_request_at_once_with_the_cause_and_is_not_alive(depth: int) -> None:
    processor, runner = shadow_processor(steps_in_flight=depth, max_num_seqs=1)
    gate = Gate(runner)
    processor._runner = gate
    manager = ContinuousBatchingManager(processor)
    manager.start()
    assert manager.alive
    ids = [manager.add_request([n], params()) for n in range(1, 4)]
    gate.entered.acquire()
    gate.errors.append(DeviceFailedError("the card fell off the bus"))
    late = manager.add_request([9], params())
    gate.open.release()
    for request_id in [*ids, late]:
        output = collect(manager.request_id_iter(request_id))
        assert isinstance(output.error, EngineDeadError)
        assert "fell off the bus" in output.error.message
    manager.stop(block=True)
    assert not manager.alive
    with pytest.raises(EngineDeadError, match="fell off the bus"):
        manager.add_request([1])


def test_a_bug_in_the_bookkeeping_is_a_dead_core_not_a_silent_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, _ = shadow_processor()

    def broken() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(processor.scheduler, "schedule", broken)
    manager = ContinuousBatchingManager(processor)
    manager.start()
    request_id = manager.add_request([1])
    assert isinstance(collect(manager.request_id_iter(request_id)).error, EngineDeadError)


def test_a_core_that_hangs_in_a_step_is_not_alive() -> None:
    processor, runner = shadow_processor()
    gate = Gate(runner)
    processor._runner = gate
    manager = ContinuousBatchingManager(processor, stall_seconds=0.0)
    manager.start()
    assert manager.alive, "waiting for work is not hanging"
    manager.add_request([1], params(1))
    gate.entered.acquire()
    assert not manager.alive
    gate.open.release(10)
    manager.stop(block=True, drain=True)


def test_idle_cached_blocks_can_be_evicted_by_hand(manager: ContinuousBatchingManager) -> None:
    collect(manager.request_id_iter(manager.add_request(list(range(40)), params())))
    assert manager.evict_cached(3).result() == 3
    assert manager.evict_cached().result() > 0
    assert manager.evict_cached().result() == 0


def test_requests_added_together_share_a_step() -> None:
    processor, runner = shadow_processor()
    news: list[News] = []
    manager = ContinuousBatchingManager(processor, receive=news.append)
    manager.add_requests([manager.build_request(str(n), [n, n], params(1)) for n in range(1, 5)])
    manager.start()
    manager.stop(block=True, drain=True)
    assert len(runner.batches) == 1
    assert sum(len(item.outputs) for item in news) == 4


def test_no_request_is_lost_between_threads_that_add_and_a_core_that_stops(depth: int) -> None:
    manager = ContinuousBatchingManager(shadow_processor(steps_in_flight=depth, max_model_len=50)[0])
    manager.start()
    accepted: list[str] = []

    def add() -> None:
        try:
            while True:
                accepted.append(manager.add_request([3], params(4)))
        except DrainingError:
            pass

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(accepted) < 50:
        pass
    manager.stop(block=True, drain=False)
    for thread in threads:
        thread.join()
    for request_id in accepted:
        assert collect(manager.request_id_iter(request_id)).finished
