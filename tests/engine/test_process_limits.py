"""A real server process with tools, API keys and a queue of one: what it grants and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from models import tiny_chat_model
from oracle import Oracle
from processes import Server

TEMPLATE = Path(__file__).parents[1] / "support" / "hermes.jinja"
ASK: Any = {"model": "tools", "messages": [{"role": "user", "content": "What is the weather?"}]}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}


TOOLS: Any = [
    tool("get_weather", city={"enum": ["Paris", "Rome"]}, metric={"type": "boolean"}),
    tool("get_time", zone={"enum": ["UTC", "CET"]}),
]
NAMED: Any = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# operators\nalpha\n\nbeta\n")
    return path


@pytest.fixture(scope="module")
def server(keys: Path) -> Iterator[Server]:
    with Server(
        tiny_chat_model()[1],
        served_model_name="tools",
        chat_template=TEMPLATE,
        api_key_file=keys,
        max_num_seqs=1,
        max_queue=1,
        max_request_bytes=65536,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client(api_key="alpha") as client:
        yield client


def check_call(name: str, arguments: str) -> None:
    """Whether the call is one of ``TOOLS`` with what it takes."""
    value = json.loads(arguments)
    if name == "get_weather":
        assert set(value) == {"city", "metric"}
        assert value["city"] in ("Paris", "Rome")
        assert isinstance(value["metric"], bool)
    else:
        assert (name, set(value)) == ("get_time", {"zone"})
        assert value["zone"] in ("UTC", "CET")


# --- tools --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("seed", range(4))
def test_a_demanded_call_always_parses(client: OpenAI, choice: Any, seed: int) -> None:
    asked: Any = {**ASK, "tools": TOOLS, "tool_choice": choice, "seed": seed, "max_completion_tokens": 400}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "get_time"
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [call.function.arguments for call in streamed.message.tool_calls] == [call.function.arguments]
    assert streamed.message.tool_calls[0].function.name == call.function.name


def test_a_demanded_call_of_several_tools_may_be_any_of_them(client: OpenAI) -> None:
    def name(seed: int) -> str:
        answer = client.chat.completions.create(
            **ASK, tools=TOOLS, tool_choice="required", seed=seed, temperature=2, max_completion_tokens=400
        )
        called: str = answer.choices[0].message.tool_calls[0].function.name
        return called

    assert {name(seed) for seed in range(12)} == {"get_weather", "get_time"}


def test_where_the_model_decides_its_text_comes_through(client: OpenAI) -> None:
    oracle = Oracle(tiny_chat_model()[1])
    template = TEMPLATE.read_text()
    for choice, tools in (("auto", TOOLS), ("none", None)):
        prompt_ids = oracle.chat_ids(ASK["messages"], tools=tools, chat_template=template)
        expected = oracle.text(oracle.greedy(prompt_ids, 16))
        asked: Any = {**ASK, "tools": TOOLS, "tool_choice": choice, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**asked)
        assert whole.usage.prompt_tokens == len(prompt_ids)
        assert (whole.choices[0].message.content, whole.choices[0].message.tool_calls) == (expected, None)
        chunks = client.chat.completions.create(stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_round_with_a_tool_s_answer_renders(client: OpenAI) -> None:
    asked: Any = {**ASK, "tools": TOOLS, "max_tokens": 400, "seed": 1}
    message = client.chat.completions.create(**{**asked, "tool_choice": "required"}).choices[0].message
    messages = [*ASK["messages"], message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "ok"}]
    answer = client.chat.completions.create(**{**asked, "messages": messages, "max_tokens": 3})
    assert answer.choices[0].finish_reason == "length"


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_but_by_probes(server: Server) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic alpha"}):
        refused = server.get("/v1/models", **header)
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert refused.error["type"] == "authentication_error"
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert server.get(path).status == 200
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with server.client(api_key="beta") as client:
        assert client.models.list().data[0].id == "tools"


def test_keys_are_read_again_when_their_file_changes(server: Server, keys: Path) -> None:
    keys.write_text("alpha\ngamma\n")

    def status(key: str) -> int:
        return server.get("/v1/models", Authorization=f"Bearer {key}").status

    # The file is looked at once a second; ask until it has been.
    assert any(status("gamma") == 200 for _ in range(20000))
    assert (status("beta"), status("alpha")) == (401, 200)


# --- limits -------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_told_when_to_try_again(server: Server, client: OpenAI) -> None:
    stream = client.completions.create(
        model="tools", prompt="x", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tools", prompt="y", max_tokens=1, n=2)
    error = caught.value
    assert (error.code, error.type) == ("queue_full", "overloaded_error")
    assert 1 <= int(error.response.headers["Retry-After"]) <= 60
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="tools", prompt="z", max_tokens=2)
        stream.close()
        assert waiting.result(60).usage.completion_tokens == 2
    after = server.wait_until_idle()
    assert after["blocks_free"] == after["blocks"]
    assert after["requests_total{outcome=cancelled}"] == 1
    assert after["requests_total{outcome=rejected}"] == 2


def test_more_sequences_than_there_is_room_for_are_never_accepted(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 2"):
        client.completions.create(model="tools", prompt="x", n=3)


def test_a_body_beyond_the_limit_is_refused(server: Server) -> None:
    refused = server.post("/v1/completions", {"prompt": "x" * 70000}, Authorization="Bearer alpha")
    assert refused.status == 413
    assert refused.error["type"] == "invalid_request_error"
    assert "MAX_REQUEST_BYTES" in refused.error["message"]


# --- no chat template ---------------------------------------------------------------------------------------------


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_chat_model()[1], folder)
    (folder / "chat_template.jinja").unlink()
    with Server(folder, num_blocks=64) as server, server.client() as client:
        name = client.models.list().data[0].id
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name, messages=ASK["messages"])
        assert caught.value.code == "no_chat_template"
        assert "CHAT_TEMPLATE" in caught.value.message
        assert client.completions.create(model=name, prompt="x", max_tokens=3).usage.completion_tokens == 3
        assert server.post("/tokenize", {"messages": ASK["messages"]}).status == 400
