"""The engine as the server sees it: what it takes, what its streams bring, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import (
    CancelledRequestError,
    ContextLengthError,
    DeviceFailedError,
    DrainingError,
    EngineDeadError,
    InvalidParameterError,
    ModelLoadError,
    NotReadyError,
    QueueFullError,
)
from pagedserve_engine.request import FinishReason, GrammarSpec
from shadow_engine import ShadowEngine, answer, ask, make_shadow, read, shadow_engine, text_of, until

Scenario = Callable[[ShadowEngine], Awaitable[None]]


def drive(scenario: Scenario, config: EngineConfig | None = None, *, held: bool = False, **options: object) -> None:
    """Run ``scenario`` on a fresh engine; ``held`` makes its steps wait to be let."""

    async def run() -> None:
        async with shadow_engine(config, **options) as shadow:
            shadow.steps.held = held
            await scenario(shadow)

    asyncio.run(run())


async def all_free(shadow: ShadowEngine) -> None:
    """Wait until the core holds nothing any more."""
    await until(
        lambda: (
            shadow.sample("blocks_free") == shadow.sample("blocks")
            and shadow.sample("requests_running") == shadow.sample("requests_waiting") == 0
        ),
        "an empty core",
    )
    shadow.processor.scheduler.check()


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_brings_the_whole_text_and_its_end():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("Hello", max_tokens=12)
        outputs = await read(stream)
        assert "".join(output.text for output in outputs) == answer("Hello", 12)
        assert sum(len(output.token_ids) for output in outputs) == 12
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert (stream.ended, stream.num_tokens) == (True, 12)
        await all_free(shadow)

    drive(scenario)


def test_a_slow_reader_gets_what_came_meanwhile_as_one_output_and_loses_nothing():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("Hello", max_tokens=20)
        await until(lambda: stream.ended, "the stream's end")
        [output] = await read(stream)
        assert (output.text, len(output.token_ids)) == (answer("Hello", 20), 20)
        assert output.finish_reason is FinishReason.LENGTH

    drive(scenario)


def test_reading_on_after_the_end_ends_again():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("Hello")
        await read(stream)
        assert await read(stream) == []

    drive(scenario)


def test_a_stop_string_ends_the_stream_and_the_core_stops_working_on_it():
    async def scenario(shadow: ShadowEngine) -> None:
        text = answer("Hello", 150)
        stop = text[20:23]
        [stream] = shadow.submit("Hello", max_tokens=150, stop=[stop])
        outputs = await read(stream)
        assert "".join(output.text for output in outputs) == text[: text.index(stop)]
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)
        await all_free(shadow)
        # The core hears of the stop string before its next step, or one later where that has begun already.
        assert len(shadow.runner.batches) <= 25
        assert shadow.outcomes() == {"stop": 1}

    async def in_lockstep(shadow: ShadowEngine) -> None:
        """No step begins before the loop has had the news of the last, so that the core can't run ahead."""
        scene = asyncio.create_task(scenario(shadow))
        while not scene.done():
            await asyncio.sleep(0.001)
            if shadow.steps.entered.acquire(blocking=False):
                await asyncio.sleep(0)
                shadow.steps.let(1)
        await scene

    drive(in_lockstep, held=True)


def test_cancelling_the_reading_task_loses_nothing():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("Hello", max_tokens=6)
        impatient = asyncio.create_task(anext(stream))
        await shadow.entered()
        impatient.cancel()
        assert isinstance((await asyncio.gather(impatient, return_exceptions=True))[0], asyncio.CancelledError)
        shadow.steps.release()
        assert await text_of(stream) == answer("Hello", 6)

    drive(scenario, held=True)


def test_a_reader_whose_stream_is_closed_under_its_hands_stops_waiting():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("Hello")
        reading = asyncio.create_task(read(stream))
        await shadow.entered()
        stream.close()
        with pytest.raises(CancelledRequestError):
            await reading

    drive(scenario, held=True)


# --- leaving early ----------------------------------------------------------------------------------------------------


def test_a_client_that_goes_away_frees_its_blocks_before_the_next_step():
    async def scenario(shadow: ShadowEngine) -> None:
        leaving, staying = shadow.submit("Leaving soon", "Staying", max_tokens=30)
        await shadow.entered()
        await shadow.one_step()
        held = shadow.sample("blocks_referenced")
        leaving.close()
        await shadow.one_step()
        # The step that was under way still had both; the one after it, held now, has one.
        assert [len(batch.requests) for batch in shadow.runner.batches] == [2, 2]
        assert shadow.processor.scheduler.num_running == 1
        cache = shadow.processor.scheduler.cache
        assert cache.num_referenced < held
        assert cache.num_referenced == -(-(len("Staying") + 2) // 4)
        shadow.steps.release()
        assert await text_of(staying) == answer("Staying", 30)
        await all_free(shadow)
        assert shadow.outcomes() == {"cancelled": 1, "length": 1}

    drive(scenario, held=True)


def test_one_that_leaves_while_it_waits_never_runs():
    async def scenario(shadow: ShadowEngine) -> None:
        [running] = shadow.submit("running", max_tokens=3)
        await shadow.entered()
        [waiting] = shadow.submit("waiting", max_tokens=3)
        waiting.close()
        shadow.steps.release()
        assert await text_of(running) == answer("running", 3)
        await all_free(shadow)
        assert {request.request_id for batch in shadow.runner.batches for request in batch.requests} == {"running"}

    drive(scenario, EngineConfig(max_num_seqs=1), held=True)


def test_a_stream_closed_twice_counts_once():
    async def scenario(shadow: ShadowEngine) -> None:
        ended, left = shadow.submit("ended", "left", max_tokens=3)
        shadow.steps.release()
        await read(ended)
        await until(lambda: left.ended)
        for _ in range(2):
            ended.close()
            left.close(timed_out=True)
        assert shadow.outcomes() == {"length": 2}, "both had ended before they were closed"
        await all_free(shadow)

    drive(scenario, held=True)


def test_a_stream_that_took_too_long_counts_as_a_timeout():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("slow", max_tokens=100)
        await shadow.entered()
        stream.close(timed_out=True)
        stream.close()
        shadow.steps.release()
        await all_free(shadow)
        assert shadow.outcomes() == {"timeout": 1}

    drive(scenario, held=True)


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_requests_are_taken_all_or_none():
    async def scenario(shadow: ShadowEngine) -> None:
        with pytest.raises(ContextLengthError, match="at most 194"):
            shadow.engine.submit([ask("fits"), ask("but no", max_tokens=195)])
        [stream] = shadow.submit("fits")
        assert await text_of(stream) == answer("fits")
        assert len({request.request_id for batch in shadow.runner.batches for request in batch.requests}) == 1
        assert shadow.outcomes() == {"length": 1, "rejected": 2}

    drive(scenario)


@pytest.mark.parametrize("burst", [1, 3], ids=["one by one", "several at once"])
def test_the_queue_takes_exactly_as_many_as_may_wait(burst: int):
    config = EngineConfig(max_num_seqs=2, max_queue=4)

    async def scenario(shadow: ShadowEngine) -> None:
        # None of them has reached the core when the next one comes: what is on the way counts.
        streams = [stream for n in range(0, 6, burst) for stream in shadow.submit(*(f"s{n + i}" for i in range(burst)))]
        with pytest.raises(QueueFullError, match="4 requests wait and 4 may") as refused:
            shadow.submit("one too many")
        assert refused.value.retry_after is not None
        assert refused.value.retry_after >= 1
        await shadow.entered()
        with pytest.raises(QueueFullError):
            shadow.submit("one too many")
        shadow.steps.release()
        assert [await text_of(stream) for stream in streams] == [answer(f"s{n}") for n in range(6)]
        assert shadow.outcomes() == {"length": 6, "rejected": 2}
        streams = shadow.submit(*(f"t{n}" for n in range(6)))
        assert len([await text_of(stream) for stream in streams]) == 6

    drive(scenario, config, held=True)


def test_more_than_could_ever_wait_together_are_refused_together():
    async def scenario(shadow: ShadowEngine) -> None:
        with pytest.raises(QueueFullError):
            shadow.submit(*(f"s{n}" for n in range(7)))
        streams = shadow.submit(*(f"s{n}" for n in range(6)))
        assert len([await text_of(stream) for stream in streams]) == 6

    drive(scenario, EngineConfig(max_num_seqs=2, max_queue=4))


def test_the_queue_has_room_again_when_those_who_wait_leave():
    async def scenario(shadow: ShadowEngine) -> None:
        shadow.submit("runs", max_tokens=50)
        await shadow.entered()
        waiting = shadow.submit("w0", "w1")
        with pytest.raises(QueueFullError):
            shadow.submit("w2")
        waiting[0].close()
        await shadow.one_step()
        await shadow.one_step()
        shadow.submit("w2")
        with pytest.raises(QueueFullError):
            shadow.submit("w3")

    drive(scenario, EngineConfig(max_num_seqs=1, max_queue=2), held=True)


def test_nothing_is_taken_before_the_model_is_loaded():
    async def run() -> None:
        shadow = make_shadow()
        with pytest.raises(NotReadyError):
            shadow.submit("early")
        with pytest.raises(NotReadyError):
            shadow.engine.name  # noqa: B018
        assert (shadow.engine.ready, shadow.engine.alive, shadow.engine.reason) == (False, True, "loading")
        await shadow.engine.start()
        assert (shadow.engine.ready, shadow.engine.reason) == (True, "")
        await shadow.engine.close()

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_says_so():
    async def run() -> None:
        shadow = make_shadow()

        def fail(_: EngineConfig) -> None:
            raise ModelLoadError("no such model")

        shadow.engine._build = fail  # type: ignore[assignment]
        with pytest.raises(ModelLoadError, match="no such model"):
            await shadow.engine.start()
        await shadow.engine.close()

    asyncio.run(run())


def test_a_grammar_needs_a_tokenizer():
    async def scenario(shadow: ShadowEngine) -> None:
        with pytest.raises(InvalidParameterError, match="no tokenizer"):
            await shadow.engine.compile_grammar(GrammarSpec("regex", "a+"))

    drive(scenario)


# --- draining, closing, dying -----------------------------------------------------------------------------------------


def test_draining_lets_all_finish_and_takes_nothing_new():
    async def scenario(shadow: ShadowEngine) -> None:
        streams = shadow.submit("a", "b", "c", max_tokens=10)
        await shadow.entered()
        draining = asyncio.create_task(shadow.engine.drain(60))
        await asyncio.sleep(0)
        assert (shadow.engine.ready, shadow.engine.alive, shadow.engine.reason) == (False, True, "draining")
        with pytest.raises(DrainingError) as refused:
            shadow.submit("late")
        assert refused.value.retry_after == 1.0
        assert not draining.done()
        shadow.steps.release()
        assert [await text_of(stream) for stream in streams] == [answer(prompt, 10) for prompt in "abc"]
        await draining
        assert shadow.outcomes() == {"length": 3, "rejected": 1}

    drive(scenario, held=True)


def test_what_does_not_finish_in_time_fails_with_the_reason_and_keeps_what_it_had():
    async def scenario(shadow: ShadowEngine) -> None:
        [stream] = shadow.submit("a", max_tokens=50)
        await shadow.entered()
        await shadow.one_step()
        await shadow.engine.drain(0)
        assert (await anext(stream)).text == answer("a", 1)
        with pytest.raises(DrainingError, match="longer"):
            await anext(stream)
        stream.close()
        assert shadow.outcomes() == {"error": 1}

    drive(scenario, held=True)


def test_an_idle_engine_drains_at_once():
    async def scenario(shadow: ShadowEngine) -> None:
        await shadow.engine.drain(0)
        assert shadow.engine.draining

    drive(scenario)


def test_closing_cancels_what_runs_and_what_waits():
    async def scenario(shadow: ShadowEngine) -> None:
        streams = shadow.submit("runs", "waits", max_tokens=50)
        await shadow.entered()
        reading = [asyncio.create_task(read(stream)) for stream in streams]
        closing = asyncio.create_task(shadow.engine.close())
        await until(lambda: shadow.engine.draining)
        shadow.steps.release()
        await closing
        for failure in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(failure, CancelledRequestError)
        assert not shadow.engine.ready

    drive(scenario, EngineConfig(max_num_seqs=1), held=True)


def test_a_dead_core_fails_every_stream_with_the_cause():
    async def scenario(shadow: ShadowEngine) -> None:
        engine = shadow.engine
        streams = shadow.submit("runs", "waits", max_tokens=50)
        await shadow.entered()
        await shadow.one_step()
        shadow.runner.errors.append(DeviceFailedError("the card fell off the bus"))
        late = shadow.submit("late")
        shadow.steps.release()
        for stream in [*streams, *late]:
            with pytest.raises(EngineDeadError, match="fell off the bus"):
                await read(stream)
        assert engine.died is not None
        assert "fell off the bus" in (await engine.died).message
        assert (engine.ready, engine.alive) == (False, False)
        assert "fell off the bus" in engine.reason
        with pytest.raises(EngineDeadError):
            shadow.submit("too late")
        await engine.drain(0)
        assert shadow.outcomes() == {"error": 3, "rejected": 1}

    drive(scenario, EngineConfig(max_num_seqs=1), held=True)


# --- what it counts ---------------------------------------------------------------------------------------------------


def test_every_token_is_counted_once_the_first_apart_from_the_rest():
    async def scenario(shadow: ShadowEngine) -> None:
        streams = shadow.submit("Hello", "World!", max_tokens=9)
        for stream in streams:
            await read(stream)
        await all_free(shadow)
        assert shadow.sample("time_to_first_token_seconds_count") == 2
        assert shadow.sample("inter_token_latency_seconds_count") == 2 * 8
        assert shadow.sample("generated_tokens_total") == 2 * 9
        assert shadow.sample("prompt_tokens_total") == len("Hello") + len("World!")
        assert shadow.sample("request_generated_tokens_sum") == 2 * 9
        assert shadow.sample("request_queue_wait_seconds_count") == 2
        assert shadow.outcomes() == {"length": 2}

    drive(scenario)


def test_the_settings_that_run_are_reported_before_the_first_step():
    async def scenario(shadow: ShadowEngine) -> None:
        assert shadow.sample("num_blocks", kind="actual") == 64
        assert shadow.sample("max_batch_tokens", kind="requested") == 32
        assert shadow.sample("max_model_len", kind="actual") == 200
        assert shadow.sample("blocks_free") == shadow.sample("blocks") == 63

    drive(scenario)
