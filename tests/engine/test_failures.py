"""When things go wrong: who is told what, who goes on, and how the process ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient
from prometheus_client import CollectorRegistry
from torch.utils.hooks import RemovableHandle

from load_clients import Answer, Question, ask
from models import tiny_chat_model, tiny_model
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import (
    MemoryPlanError,
    OutOfDeviceMemoryError,
    PagedServeError,
    StepFailedError,
)
from pagedserve_engine.frontend import AsyncEngine
from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.model.decoder import FusedDecoder
from pagedserve_engine.processor import MAX_FAILED_STEPS
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, SamplingParams
from serving import Reply, read, serving
from shadow_engine import ShadowEngine, answer, make_shadow, until
from stepping import SteppedEngine

SCRIPT = Path(__file__).parents[1] / "support" / "faulty_serve.py"
SECONDS = 60

Scenario = Callable[[TestClient, ShadowEngine], Awaitable[None]]


def drive(scenario: Scenario, *, max_num_seqs: int = 8, held: bool = False, **options: Any) -> None:
    """Run ``scenario`` with a client of a server around a shadow engine; ``held`` makes steps wait to be let.

    Once with one step at a time, and once with a step in flight.
    """

    async def run(depth: int) -> None:
        shadow = make_shadow(EngineConfig(max_num_seqs=max_num_seqs), steps_in_flight=depth, **options)
        shadow.steps.held = held
        async with serving(shadow.engine) as client:  # type: ignore[arg-type]
            await until(lambda: shadow.engine.ready, "a loaded engine")
            try:
                await scenario(client, shadow)
            finally:
                shadow.steps.release()

    for depth in (0, 1):
        asyncio.run(run(depth))


async def complete(client: TestClient, prompt: str, *, stream: bool = False, max_tokens: int = 8) -> Reply:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    async with client.post("/v1/completions", json=body) as response:
        return await read(response)


async def get(client: TestClient, path: str) -> Reply:
    async with client.get(path) as response:
        return await read(response)


def text(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    said: str = reply.json["choices"][0]["text"]
    return said


async def told(whole: asyncio.Task[Reply], streamed: asyncio.Task[Reply]) -> list[dict[str, Any]]:
    """The error that a whole and a streaming request were answered with; both must have it in its proper form."""
    reply, events = await whole, (await streamed).events
    assert events[-1] != "[DONE]", "a stream that failed must not look complete"
    assert set(reply.error) == {"message", "type", "param", "code"}
    return [{"status": reply.status, **reply.error}, events[-1]["error"]]


# --- a step -----------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_its_requests_with_the_cause_and_no_others():
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        whole = asyncio.create_task(complete(client, "whole"))
        await shadow.entered()
        shadow.steps.let(1)
        streamed = asyncio.create_task(complete(client, "streamed", stream=True))
        while shadow.processor.scheduler.num_running < 2:
            await shadow.one_step()
        waiting = asyncio.create_task(complete(client, "waiting"))
        await until(lambda: shadow.engine._num_submitted == 3)
        shadow.runner.errors.append(RuntimeError("a kernel went wrong"))
        shadow.steps.release()
        as_json, as_event = await told(whole, streamed)
        assert as_json == {"status": 500, **as_event}
        assert (as_event["type"], as_event["code"]) == ("server_error", "step_failed")
        assert "a kernel went wrong" in as_event["message"]
        assert text(await waiting) == answer("waiting")
        assert text(await complete(client, "later")) == answer("later")
        assert (await get(client, "/health/live")).status == 200
        assert shadow.outcomes() == {"error": 2, "length": 2}

    drive(scenario, max_num_seqs=2, held=True)


def test_steps_that_fail_again_and_again_are_a_broken_device():
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        shadow.runner.errors += [RuntimeError(f"failure {n}") for n in range(1, MAX_FAILED_STEPS + 1)]
        for _ in range(MAX_FAILED_STEPS - 1):
            assert (await complete(client, "Hello")).status == 500
        assert (await get(client, "/health/live")).status == 200
        last = await complete(client, "Hello")
        assert (last.status, last.error["code"]) == (503, "engine_dead")
        assert f"{MAX_FAILED_STEPS} steps failed in a row" in last.error["message"]
        assert (await get(client, "/health/live")).status == 503

    drive(scenario)


def test_a_step_that_works_forgives_those_that_failed():
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        for _ in range(2 * MAX_FAILED_STEPS):
            shadow.runner.errors.append(RuntimeError("now and then"))
            assert (await complete(client, "Hello")).status == 500
            assert text(await complete(client, "Hello", max_tokens=2)) == answer("Hello", 2)

    drive(scenario)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_lowers_the_batch_and_loses_nothing():
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        shadow.runner.errors += [OutOfDeviceMemoryError("out of memory") for _ in range(100)]
        shadow.runner.smallest_failing_batch = 6
        prompts = [f"{n} is the prompt of this request" for n in range(8)]
        replies = await asyncio.gather(*(complete(client, prompt, max_tokens=12) for prompt in prompts))
        assert [text(reply) for reply in replies] == [answer(prompt, 12) for prompt in prompts]
        assert len(shadow.runner.errors) < 100
        assert shadow.processor.scheduler.max_batch_tokens < 6
        assert (await get(client, "/health/live")).status == 200
        assert shadow.outcomes() == {"length": 8}

    drive(scenario, num_blocks=128)


def test_out_of_memory_for_one_token_is_the_end_and_everybody_is_told():
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        whole = asyncio.create_task(complete(client, "whole", max_tokens=100))
        await shadow.entered()
        streamed = asyncio.create_task(complete(client, "streamed", stream=True, max_tokens=100))
        waiting = asyncio.create_task(complete(client, "waiting", max_tokens=100))
        await until(lambda: shadow.engine._num_submitted == 3)
        shadow.runner.errors += [OutOfDeviceMemoryError("out of memory") for _ in range(100)]
        shadow.steps.release()
        as_json, as_event = await told(whole, streamed)
        assert as_json == {"status": 503, **as_event}
        assert as_event["code"] == "engine_dead"
        assert "out of device memory even for one token" in as_event["message"]
        assert (await waiting).error == as_event
        await check_dead(client, shadow, "out of device memory")

    drive(scenario, max_num_seqs=2, held=True)


# --- the core ---------------------------------------------------------------------------------------------------------


def test_a_bug_in_the_core_is_its_end_and_everybody_is_told(monkeypatch: pytest.MonkeyPatch):
    async def scenario(client: TestClient, shadow: ShadowEngine) -> None:
        whole = asyncio.create_task(complete(client, "whole", max_tokens=100))
        await shadow.entered()
        streamed = asyncio.create_task(complete(client, "streamed", stream=True, max_tokens=100))
        await until(lambda: shadow.engine._num_submitted == 2)

        def commit(*_: object) -> list[GenerationOutput]:
            raise KeyError("a slot that nobody knows")

        monkeypatch.setattr(shadow.processor.scheduler, "commit", commit)
        shadow.steps.release()
        as_json, as_event = await told(whole, streamed)
        assert as_json == {"status": 503, **as_event}
        assert "a slot that nobody knows" in as_event["message"]
        await check_dead(client, shadow, "a slot that nobody knows")

    drive(scenario, held=True)


async def check_dead(client: TestClient, shadow: ShadowEngine, cause: str) -> None:
    live, ready = await get(client, "/health/live"), await get(client, "/health/ready")
    assert (live.status, live.json["status"], ready.status) == (503, "dead", 503)
    assert cause in live.json["reason"]
    assert shadow.engine.died is not None
    assert shadow.engine.died.done()
    refused = await complete(client, "too late")
    assert (refused.status, refused.error["code"]) == (503, "engine_dead")
    assert cause in refused.error["message"]
    assert (await get(client, "/metrics")).status == 200


# --- numbers that are none --------------------------------------------------------------------------------------------

POISON = 5
"""A token whose embedding is NaN."""


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_request_without_numbers_fails_alone(family: str, temperature: float, depth: int):
    _, folder = tiny_model(family)
    settings = {"num_blocks": 33, "max_batch_tokens": 24, "num_threads": 1, "steps_in_flight": depth}
    prompts = [[10 + n, *range(20, 31 + n)] for n in range(4)]
    params = {"temperature": temperature, "seed": 3, "top_k": 20}

    expected = run(SteppedEngine(folder, **settings), prompts, params)
    poisoned = SteppedEngine(folder, **settings)
    poison(poisoned, float("nan"))

    bad = [[POISON] * 30, [40, 41, POISON, *range(50, 70)]]
    mixed = run(poisoned, [bad[0], *prompts[:2], bad[1], *prompts[2:]], params)
    for wrong in (mixed.pop(3), mixed.pop(0)):
        assert isinstance(wrong, StepFailedError)
        assert "NaN" in wrong.message
    assert mixed == expected
    # Those who come later get blocks that the bad ones have left, and what is in them.
    for _ in range(3):
        assert all(isinstance(wrong, StepFailedError) for wrong in run(poisoned, bad, params))
        assert poisoned.scheduler.cache.evict_cached() > 0
        assert run(poisoned, prompts, params) == expected


def test_a_fault_that_passes_leaves_nothing_to_be_found_again():
    engine = SteppedEngine(tiny_model("llama")[1], num_threads=1)
    prompt, params = [40, 41, POISON, *range(50, 70)], {"temperature": 0.0}
    poisoned = poison(engine, float("nan"))
    assert isinstance(run(engine, [prompt], params)[0], StepFailedError)
    poisoned.remove()
    untouched = SteppedEngine(tiny_model("llama")[1], num_threads=1)
    assert run(engine, [prompt], params) == run(untouched, [prompt], params)


def poison(engine: SteppedEngine, value: float) -> RemovableHandle:
    """Give the token that embedding, until the handle is removed."""
    model = engine.core.runner._model
    embedding = model.embedding if isinstance(model, FusedDecoder) else model.get_input_embeddings()  # type: ignore[operator]

    def replace(_: Any, ids: tuple[torch.Tensor, ...], rows: torch.Tensor) -> torch.Tensor:
        return rows.masked_fill((ids[0] == POISON).unsqueeze(-1), value)

    handle: RemovableHandle = embedding.register_forward_hook(replace)  # type: ignore[union-attr]
    return handle


def run(
    engine: SteppedEngine, prompts: list[list[int]], params: dict[str, Any]
) -> list[list[int] | PagedServeError | None]:
    """The tokens of each prompt, or its error."""
    results: dict[str, list[int] | PagedServeError | None] = {}
    for n, prompt in enumerate(prompts):
        state = RequestState.create(
            str(n),
            prompt,
            SamplingParams(max_tokens=12, ignore_eos=True, **params),
            arrival_time=float(n),
            max_model_len=engine.core.max_model_len,
        )
        results[str(n)] = []
        assert engine.processor.add_request(state) is None
    while not engine.scheduler.idle:
        for output in engine.processor.step()[0]:
            collected = results[output.request_id]
            if output.finish_reason is FinishReason.ERROR:
                results[output.request_id] = output.error
            else:
                assert isinstance(collected, list)
                collected += output.token_ids
    engine.scheduler.check()
    assert engine.scheduler.cache.num_free == engine.scheduler.cache.num_total
    return list(results.values())


# --- what can never fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"num_blocks": 5, "block_size": 16}, {"max_model_len": 64}],
    ids=["the blocks hold less than the model", "a length was given"],
)
def test_what_can_never_fit_is_refused_at_once_with_what_would(settings: dict[str, Any]):
    async def scenario() -> None:
        config = EngineConfig(model=str(tiny_chat_model()[1]), device="cpu", num_threads=1, dtype="float32", **settings)
        engine = AsyncEngine(config, EngineMetrics(CollectorRegistry()))
        async with serving(engine, config) as client:  # type: ignore[arg-type]
            await until(lambda: engine.ready, "a loaded engine")
            assert engine.max_model_len == 64
            long_prompt = await post(client, {"prompt": [7] * 64, "max_tokens": 1})
            assert (long_prompt.status, long_prompt.error["code"]) == (400, "context_length_exceeded")
            assert long_prompt.error["param"] == "prompt"
            assert "send at most 63" in long_prompt.error["message"]
            long_answer = await post(client, {"prompt": [7] * 40, "max_tokens": 25, "stream": True})
            assert (long_answer.status, long_answer.error["param"]) == (400, "max_tokens")
            assert "ask for at most 24" in long_answer.error["message"]
            longest = await post(client, {"prompt": [7] * 40, "max_tokens": 24, "ignore_eos": True})
            assert (longest.status, longest.json["usage"]["total_tokens"]) == (200, 64)

    asyncio.run(scenario())


def test_a_length_that_can_never_fit_is_refused_before_serving():
    async def scenario() -> None:
        config = EngineConfig(
            model=str(tiny_chat_model()[1]), device="cpu", num_blocks=5, block_size=16, max_model_len=65, num_threads=1
        )
        engine = AsyncEngine(config, EngineMetrics(CollectorRegistry()))
        with pytest.raises(MemoryPlanError, match="64 tokens fit: set MAX_MODEL_LEN to at most 64"):
            await engine.start()

    asyncio.run(scenario())


async def post(client: TestClient, body: dict[str, Any]) -> Reply:
    async with client.post("/v1/completions", json=body) as response:
        return await read(response)


# --- the process ------------------------------------------------------------------------------------------------------

ROWS = 3
QUESTION = Question("Tell me of the sea.", 400)


@contextmanager
def faulty_server(fault: str, message_file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A ready server that fails as soon as a step has ``ROWS`` rows, and its port."""
    flags = ["--model", str(tiny_chat_model()[1]), "--host", "127.0.0.1", "--port", "0", "--num-threads", "1"]
    flags += ["--termination-message-path", str(message_file)]
    command = [sys.executable, str(SCRIPT), fault, str(ROWS), "serve", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, _ready_port(process)
        finally:
            process.kill()


def _ready_port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if "listening on" in line:
            port = int(line.rsplit(":", 1)[1])
        elif " serving " in line:
            return port
    raise AssertionError(f"the server ended with {process.wait()}")


async def storm(port: int) -> list[Answer]:
    """The first ``ROWS`` streams, begun one after the other so that all of them are under way when the fault comes."""
    begun = [asyncio.Event() for _ in range(ROWS)]
    streams = []
    for event in begun:
        streams.append(asyncio.create_task(ask(port, QUESTION, on_event=lambda _, event=event: event.set())))
        await asyncio.wait({streams[-1], asyncio.create_task(event.wait())}, return_when=asyncio.FIRST_COMPLETED)
    return await asyncio.gather(*streams)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("memory", "out of device memory even for one token a step: out of memory"),
        ("device", "the device failed: unspecified launch failure"),
        ("bug", "the engine's core died: "),
    ],
)
def test_a_process_whose_core_dies_answers_everybody_and_leaves_the_reason(fault: str, cause: str, tmp_path: Path):
    message_file = tmp_path / "termination-log"
    message_file.touch()
    with faulty_server(fault, message_file) as (process, port):
        for answered in asyncio.run(storm(port)):
            assert not answered.complete
            assert answered.error is not None
            assert answered.error["code"] == "engine_dead"
            assert cause in answered.error["message"]
        assert process.wait(SECONDS) == 1
        [line] = message_file.read_text().splitlines()
        assert cause in line
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == f"pagedserve-engine: {line}"


@pytest.mark.parametrize("fault", ["step", "large_steps"])
def test_a_process_outlives_what_is_not_for_good(fault: str, tmp_path: Path):
    with faulty_server(fault, tmp_path / "absent") as (process, port):
        alone = asyncio.run(ask(port, QUESTION))
        assert alone.complete
        for answered in asyncio.run(storm(port)):
            if fault == "step":
                assert answered.error is not None
                assert answered.error["code"] == "step_failed"
            else:
                assert (answered.complete, answered.text) == (True, alone.text)
        assert asyncio.run(ask(port, QUESTION)).text == alone.text
        process.terminate()
        assert process.wait(SECONDS) == 0
