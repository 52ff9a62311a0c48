"""What a real server process refuses, and in which words: OpenAI's error object with the field's name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from processes import Server

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
REQUIRED: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "Hi", "max_tokens": 1},
    CHAT: {"messages": HI, "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
CASES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"prompt": None}, "prompt"),
    (COMPLETION, {"prompt": 5}, "prompt"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": ["a", 5]}, "prompt[1]"),
    (COMPLETION, {"prompt": [1, 2, 49152]}, "prompt[2]"),
    (COMPLETION, {"prompt": [1, -2]}, "prompt[1]"),
    (COMPLETION, {"max_tokens": "5"}, "max_tokens"),
    (COMPLETION, {"max_tokens": -1}, "max_tokens"),
    (COMPLETION, {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETION, {"temperature": "hot"}, "temperature"),
    (COMPLETION, {"temperature": -0.1}, "temperature"),
    (COMPLETION, {"top_p": 1.1}, "top_p"),
    (COMPLETION, {"top_k": -2}, "top_k"),
    (COMPLETION, {"min_p": True}, "min_p"),
    (COMPLETION, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETION, {"frequency_penalty": 2.1}, "frequency_penalty"),
    (COMPLETION, {"presence_penalty": []}, "presence_penalty"),
    (COMPLETION, {"logit_bias": {"x": 1}}, "logit_bias.x"),
    (COMPLETION, {"logit_bias": {"99999": 1}}, "logit_bias"),
    (COMPLETION, {"seed": 1.5}, "seed"),
    (COMPLETION, {"n": 0}, "n"),
    (COMPLETION, {"best_of": 1, "n": 2}, "best_of"),
    (COMPLETION, {"stop": [""]}, "stop[0]"),
    (COMPLETION, {"stop": 5}, "stop"),
    (COMPLETION, {"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    (COMPLETION, {"min_tokens": 9}, "min_tokens"),
    (COMPLETION, {"logprobs": 21}, "logprobs"),
    (COMPLETION, {"stream": "yes"}, "stream"),
    (COMPLETION, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETION, {"suffix": "x"}, "suffix"),
    (COMPLETION, {"temprature": 1}, "temprature"),
    (COMPLETION, {"guided_regex": "(["}, "guided_regex"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        "response_format",
    ),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("/tokenize", {"prompt": 5}, "prompt"),
    ("/detokenize", {"tokens": [49152]}, "tokens[0]"),
]


@pytest.mark.parametrize(("path", "body", "param"), CASES, ids=[f"{json.dumps(case[1])[:60]}" for case in CASES])
def test_a_wrong_field_is_named(chat_server: Server, path: str, body: dict[str, Any], param: str) -> None:
    refused = chat_server.post(path, {**REQUIRED[path], **body})
    assert refused.status == 400, refused.body
    assert (refused.error["param"], refused.error["type"]) == (param, "invalid_request_error")
    assert refused.error["message"]
    assert refused.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'"text"', b'{"prompt": NaN}'])
def test_what_is_no_object_is_refused(chat_server: Server, body: bytes) -> None:
    refused = chat_server.post(COMPLETION, body)
    assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")


def test_the_client_gets_its_own_exceptions(chat_server: Server) -> None:
    with chat_server.client() as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt=[7] * 8192, max_tokens=1)
        with pytest.raises(openai.BadRequestError) as longer:
            client.completions.create(model="tiny", prompt=[7] * 8000, max_tokens=500)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert (long.value.code, long.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert "8192" in long.value.message
    assert longer.value.code == "context_length_exceeded"
    assert "192" in longer.value.message


def test_unknown_routes_and_methods_have_error_objects_too(chat_server: Server) -> None:
    assert (chat_server.get("/v1/nothing").status, chat_server.get("/v1/nothing").error["param"]) == (404, None)
    wrong = chat_server.get(COMPLETION)
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    assert wrong.error["type"] == "invalid_request_error"


def test_a_request_keeps_its_own_id(chat_server: Server) -> None:
    answer = chat_server.post("/tokenize", {"prompt": "x"}, **{"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert len(chat_server.get("/v1/models").headers["X-Request-Id"]) == 32
