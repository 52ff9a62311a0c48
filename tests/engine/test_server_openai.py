"""The official client against the server, as users send it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from aiohttp.test_utils import TestClient
from openai import AsyncOpenAI
from pydantic import BaseModel

from fake_engine import FakeEngine
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import QueueFullError, StepFailedError
from serving import drive

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
SAMPLING: Any = {
    "temperature": 0.7,
    "top_p": 0.9,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {"65": 1},
    "seed": 1,
    "n": 2,
    "stop": ["zzz"],
    "user": "me",
    "max_tokens": 12,
}
EXTENSIONS = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [3],
    "ignore_eos": True,
    "min_tokens": 1,
    "cache_salt": "a",
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "return_token_ids": True,
}


def with_client(talk: Callable[[AsyncOpenAI], Awaitable[Any]], engine: FakeEngine | None = None, **config: Any) -> Any:
    async def scenario(server: TestClient) -> Any:
        async with AsyncOpenAI(base_url=f"{server.make_url('/v1')}", api_key="key", max_retries=0) as client:
            return await talk(client)

    return drive(scenario, engine, EngineConfig(**config))


def test_every_completion_parameter_is_taken() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        return await client.completions.create(
            model="org/fake", prompt="Hi", best_of=3, echo=True, logprobs=2, extra_body=EXTENSIONS, **SAMPLING
        )

    answer = with_client(talk)
    assert [choice.text for choice in answer.choices] == ["HiHello world."] * 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == 15


def test_every_chat_parameter_is_taken() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="org/fake",
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=2,
            max_completion_tokens=12,
            store=True,
            metadata={"a": "b"},
            service_tier="auto",
            parallel_tool_calls=True,
            safety_identifier="x",
            prompt_cache_key="x",
            verbosity="low",
            reasoning_effort="low",
            modalities=["text"],
            prediction={"type": "content", "content": "x"},
            extra_body=EXTENSIONS,
            **SAMPLING,
        )

    answer = with_client(talk)
    assert [choice.message.content for choice in answer.choices] == ["Hello world."] * 2
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "I"


def test_completions_stream() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        stream = await client.completions.create(
            model="org/fake", prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    chunks = with_client(talk)
    assert (
        "".join(chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].index == 1)
        == "Hello world."
    )
    assert chunks[-1].usage.completion_tokens == 24


def test_chats_stream() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(
            model="org/fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    chunks = with_client(talk)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello world."
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_the_client_s_own_stream_helper_puts_tool_calls_together() -> None:
    engine = FakeEngine(answer='{"name": "add", "arguments": {"a": 1}}')

    async def talk(client: AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(
            model="org/fake", messages=MESSAGES, tools=TOOLS, tool_choice="required"
        ) as stream:
            return await stream.get_final_completion()

    [choice] = with_client(talk, engine).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.arguments == '{"a": 1}'


def test_a_tool_conversation_goes_round() -> None:
    def answer(request: Any) -> str:
        return "It is 3." if b"<tool>3" in bytes(request.prompt_ids) else '{"name": "add", "arguments": {"a": 1}}'

    async def talk(client: AsyncOpenAI) -> Any:
        first = await client.chat.completions.create(model="org/fake", messages=MESSAGES, tools=TOOLS)
        message = first.choices[0].message
        again = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}]
        second = await client.chat.completions.create(model="org/fake", messages=again, tools=TOOLS)
        dumped = [*MESSAGES, message.model_dump(), again[-1]]
        third = await client.chat.completions.create(model="org/fake", messages=dumped, tools=TOOLS)
        return second.choices[0].message.content, third.choices[0].message.content

    assert with_client(talk, FakeEngine(answer=answer)) == ("It is 3.", "It is 3.")


def test_structured_output_is_parsed_into_a_model() -> None:
    class City(BaseModel):
        name: str

    engine = FakeEngine(answer='{"name": "Paris"}')

    async def talk(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(model="org/fake", messages=MESSAGES, response_format=City)

    assert with_client(talk, engine).choices[0].message.parsed == City(name="Paris")
    assert engine.requests[0].params.grammar.kind == "json_schema"


def test_models_are_listed() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        return [model.id async for model in client.models.list()], (await client.models.retrieve("org/fake")).id

    assert with_client(talk) == (["org/fake"], "org/fake")


ERRORS: dict[str, tuple[type[openai.APIStatusError], FakeEngine | None, dict[str, Any]]] = {
    "bad value": (openai.BadRequestError, None, {"temperature": 3}),
    "unknown model": (openai.NotFoundError, None, {"model": "gpt"}),
    "full queue": (openai.RateLimitError, FakeEngine(refusal=QueueFullError("full", retry_after=1)), {}),
    "failed step": (openai.InternalServerError, FakeEngine(fail_after=(0, StepFailedError("x"))), {}),
}


@pytest.mark.parametrize(("kind", "engine", "body"), ERRORS.values(), ids=ERRORS)
def test_errors_are_the_client_s_own(
    kind: type[openai.APIStatusError], engine: FakeEngine | None, body: dict[str, Any]
) -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**{"model": "org/fake", "messages": MESSAGES, **body})
        return caught.value

    error = with_client(talk, engine)
    assert error.message
    assert error.param == ("temperature" if "temperature" in body else "model" if "model" in body else None)


def test_an_error_while_streaming_reaches_the_client() -> None:
    async def talk(client: AsyncOpenAI) -> Any:
        stream = await client.completions.create(model="org/fake", prompt="Hi", stream=True)
        with pytest.raises(openai.APIError, match="the step failed"):
            async for _ in stream:
                pass

    with_client(talk, FakeEngine(fail_after=(3, StepFailedError("the step failed"))))


def test_a_wrong_key_is_an_authentication_error(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("other")

    async def talk(client: AsyncOpenAI) -> Any:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()

    with_client(talk, api_key_file=tmp_path / "keys")


def test_closing_the_client_s_stream_ends_the_sequence() -> None:
    engine = FakeEngine(hold_after=3)

    async def talk(client: AsyncOpenAI) -> Any:
        stream = await client.completions.create(model="org/fake", prompt="Hi", stream=True)
        async for _ in stream:
            break
        await stream.close()
        await asyncio.wait_for(engine.all_closed.wait(), 5)

    with_client(talk, engine)
