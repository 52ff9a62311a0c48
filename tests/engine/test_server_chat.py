from __future__ import annotations

import json
from typing import Any

import pytest

from fake_engine import FakeEngine, FakeTokenizer
from serving import Reply, chat

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "sub"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
DEMANDED = '{"name": "add", "arguments": {"a": {"b": "}\\""}}}'


def merged(reply: Reply) -> dict[str, Any]:
    """A streamed message put together as clients do."""
    message: dict[str, Any] = {"content": "", "tool_calls": [], "finish_reason": None}
    for chunk in reply.chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append(
                        {"id": call["id"], "type": call["type"], "function": {**call["function"]}}
                    )
                else:
                    message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_an_answer_is_whole() -> None:
    body = chat().json
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


def test_a_stream_opens_with_the_role_and_ends_with_the_reason() -> None:
    chunks = chat(stream=True, stream_options={"include_usage": True}).chunks
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert merged(chat(stream=True))["content"] == "Hello world."


def test_choices_stream_beside_each_other() -> None:
    chunks = [chunk["choices"][0] for chunk in chat(stream=True, n=3).chunks]
    for index in range(3):
        own = [choice for choice in chunks if choice["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello world."


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_come_by_token(stream: bool) -> None:
    reply = chat(logprobs=True, top_logprobs=1, max_tokens=2, stream=stream)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in reply.chunks]
        content = [entry for part in parts if part for entry in part["content"]]
    else:
        content = reply.json["choices"][0]["logprobs"]["content"]
    top = {"token": "H", "logprob": -0.5, "bytes": [72]}
    assert content[0] == {**top, "top_logprobs": [top]}
    assert len(content) == 2


def test_the_conversation_reaches_the_template() -> None:
    tokenizer = FakeTokenizer()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Ho"},
    ]
    chat(FakeEngine(tokenizer=tokenizer), messages=messages, continue_final_message=True, chat_template_kwargs={"x": 1})
    assert tokenizer.chats == [
        {
            "messages": messages,
            "tools": None,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "template_kwargs": {"x": 1},
        }
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_output", [1, 5, 500])
@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (CALL, ""),
        ("Let me see.\n\n" + CALL, "Let me see."),
        ('{"name": "add", "parameters": {"a": 1}}', ""),
        ('{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}', ""),
    ],
)
def test_a_call_is_found_in_the_output(answer: str, content: str, tokens_per_output: int, stream: bool) -> None:
    reply = chat(FakeEngine(answer=answer, tokens_per_output=tokens_per_output), tools=TOOLS, stream=stream)
    if stream:
        message = merged(reply)
        reason = message["finish_reason"]
    else:
        message, reason = reply.json["choices"][0]["message"], reply.json["choices"][0]["finish_reason"]
    assert (message["content"] or "") == content
    assert reason == "tool_calls"
    [call] = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 1}


def test_several_calls_have_indexes() -> None:
    answer = CALL + "\n" + CALL.replace("add", "sub") + "\n"
    message = merged(chat(FakeEngine(answer=answer), tools=TOOLS, stream=True))
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "sub"]
    assert message["content"] == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        "Just text.",
        "  indented { text }  ",
        CALL.replace("add", "unknown"),
        "<tool_call>no json</tool_call> after",
        "<tool_call>never closed",
        '{"name": "add"',
        '{"name": "unknown", "parameters": {}}',
        '{"name": ["add"]}',
        '{"a": 1}',
        "a < b and <tool",
        "trailing space \n",
    ],
)
def test_what_is_no_call_stays_text_to_the_letter(answer: str, stream: bool) -> None:
    reply = chat(FakeEngine(answer=answer), tools=TOOLS, stream=stream)
    if stream:
        message = merged(reply)
    else:
        message = {**reply.json["choices"][0]["message"], "finish_reason": reply.json["choices"][0]["finish_reason"]}
    assert message["content"] == answer
    assert not message.get("tool_calls")
    assert message["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_output", [1, 4, 500])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_demanded_call_is_constrained_and_parsed(choice: Any, tokens_per_output: int, stream: bool) -> None:
    engine = FakeEngine(answer=DEMANDED + " \n", tokens_per_output=tokens_per_output)
    reply = chat(engine, tools=TOOLS, tool_choice=choice, stream=stream)
    assert engine.grammars == [engine.requests[0].params.grammar]
    message = merged(reply) if stream else reply.json["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": {"b": "}\\""}}'}
    assert not message["content"]


def test_the_arguments_of_a_demanded_call_stream_as_they_come() -> None:
    chunks = chat(FakeEngine(answer=DEMANDED), tools=TOOLS, tool_choice="required", stream=True).chunks
    parts = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in chunks]
    assert len([part for part in parts if part]) > 10


def test_a_demanded_call_that_is_cut_off_keeps_its_parts() -> None:
    reply = chat(FakeEngine(answer=DEMANDED), tools=TOOLS, tool_choice="required", max_tokens=37)
    choice = reply.json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": {"'


def test_tools_need_a_template_that_knows_them() -> None:
    engine = FakeEngine(tokenizer=FakeTokenizer(supports_tools=False))
    reply = chat(engine, tools=TOOLS)
    assert (reply.status, reply.error["param"]) == (400, "tools")
    assert chat(engine, tools=TOOLS, tool_choice="none").status == 200


def test_tool_log_probabilities_are_complete() -> None:
    reply = chat(FakeEngine(answer="Hm. " + CALL), tools=TOOLS, stream=True, logprobs=True)
    tokens = [
        entry["token"]
        for chunk in reply.chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert "".join(tokens) == "Hm. " + CALL


def test_prompt_token_ids_and_log_probabilities_stand_beside_the_choices() -> None:
    body = chat(return_token_ids=True, prompt_logprobs=0).json
    assert bytes(body["prompt_token_ids"]) == b"<user>Hi"
    assert len(body["prompt_logprobs"]) == 8
    assert bytes(body["choices"][0]["token_ids"]) == b"Hello world."
