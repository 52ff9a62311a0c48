from __future__ import annotations

import json
from typing import Any

import pytest

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.request import GrammarSpec
from pagedserve_engine.server.openapi import BODIES
from pagedserve_engine.server.schema import parse_chat, parse_completion, parse_detokenize, parse_tokenize
from pagedserve_engine.server.tables import CHAT, COMPLETION

VOCAB = 1000
USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def completion(**body: Any) -> Any:
    return parse_completion(json.dumps({"prompt": "Hi", **body}).encode(), VOCAB)


def chat(**body: Any) -> Any:
    return parse_chat(json.dumps({"messages": USER, **body}).encode(), VOCAB)


def refusal(parse: Any, **body: Any) -> InvalidParameterError:
    with pytest.raises(InvalidParameterError) as caught:
        parse(**body)
    return caught.value


PARAMETERS = {
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "min_tokens": ({"min_tokens": 3}, {"min_tokens": 3}),
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "greedy": ({"temperature": 0}, {"temperature": 0.0}),
    "top_p": ({"top_p": 0.9}, {"top_p": 0.9}),
    "top_p zero is the likeliest token": ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
    "top_k": ({"top_k": 5}, {"top_k": 5}),
    "top_k off": ({"top_k": -1}, {"top_k": 0}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "repetition_penalty": ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    "frequency_penalty": ({"frequency_penalty": -1}, {"frequency_penalty": -1.0}),
    "presence_penalty": ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    "logit_bias": ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
    "seed": ({"seed": 3}, {"seed": 3}),
    "negative seed": ({"seed": -1}, {"seed": 2**64 - 1}),
    "stop_token_ids": ({"stop_token_ids": [5, 6]}, {"stop_token_ids": (5, 6)}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "prompt_logprobs": ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
    "whole floats are whole numbers": ({"max_tokens": 7.0}, {"max_tokens": 7}),
    "json_object": ({"response_format": {"type": "json_object"}}, {"grammar": GrammarSpec("json_object", "")}),
    "text": ({"response_format": {"type": "text"}}, {"grammar": None}),
    "regex": ({"response_format": {"type": "regex", "pattern": "a+"}}, {"grammar": GrammarSpec("regex", "a+")}),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        {"grammar": GrammarSpec("json_schema", '{"type":"object"}')},
    ),
    "guided_json as text": (
        {"guided_json": '{"type": "object"}'},
        {"grammar": GrammarSpec("json_schema", '{"type":"object"}')},
    ),
    "guided_regex": ({"guided_regex": "a"}, {"grammar": GrammarSpec("regex", "a")}),
    "structured_outputs": ({"structured_outputs": {"regex": "a"}}, {"grammar": GrammarSpec("regex", "a")}),
}


@pytest.mark.parametrize(("body", "expected"), PARAMETERS.values(), ids=PARAMETERS)
@pytest.mark.parametrize("parse", [completion, chat])
def test_a_parameter_reaches_sampling(parse: Any, body: dict[str, Any], expected: dict[str, Any]) -> None:
    params = parse(**body).generation.params
    assert {name: getattr(params, name) for name in expected} == expected


BAD = {
    "unknown": ({"tempreature": 1}, "tempreature"),
    "unknown inside": ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    "text for a number": ({"temperature": "hot"}, "temperature"),
    "boolean for a number": ({"temperature": True}, "temperature"),
    "number for a boolean": ({"stream": 1}, "stream"),
    "fraction for a whole number": ({"seed": 1.5}, "seed"),
    "too large": ({"temperature": 2.1}, "temperature"),
    "too small": ({"max_tokens": -1}, "max_tokens"),
    "huge": ({"max_tokens": 10**30}, "max_tokens"),
    "zero penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "empty stop": ({"stop": ""}, "stop"),
    "empty stop in a list": ({"stop": ["a", ""]}, "stop[1]"),
    "stop of the wrong type": ({"stop": [1]}, "stop[0]"),
    "bias for text": ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    "bias for a digit that isn't ASCII": ({"logit_bias": {"٣": 1}}, "logit_bias.٣"),
    "bias too large": ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    "bias outside the vocabulary": ({"logit_bias": {"1000": 1}}, "logit_bias"),
    "stop token outside the vocabulary": ({"stop_token_ids": [1, 1000]}, "stop_token_ids[1]"),
    "min above max": ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    "no choice": ({"n": 0}, "n"),
    "too many choices": ({"n": 129}, "n"),
    "options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "streamed prompt logprobs": ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "format without schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "two constraints": ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    "schema that isn't JSON": ({"guided_json": "{"}, "guided_json"),
    "schema too deep": ({"guided_json": json.loads("[" * 70 + "]" * 70)}, "guided_json"),
    "deep metadata": ({"metadata": {"a": json.loads("[" * 70 + "]" * 70)}}, "metadata"),
}


@pytest.mark.parametrize(("body", "param"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("parse", [completion, chat])
def test_a_bad_field_is_named(parse: Any, body: dict[str, Any], param: str) -> None:
    error = refusal(parse, **body)
    assert error.param == param
    assert error.status == 400


BAD_COMPLETION = {
    "no prompt": ({"prompt": None}, "prompt"),
    "prompt of the wrong type": ({"prompt": 5}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "mixed prompts": ({"prompt": ["a", [1]]}, "prompt[1]"),
    "mixed tokens": ({"prompt": [1, "a"]}, "prompt[1]"),
    "boolean token": ({"prompt": [1, True]}, "prompt[1]"),
    "negative token": ({"prompt": [[1], [-1]]}, "prompt[1][0]"),
    "token outside the vocabulary": ({"prompt": [1, 1000]}, "prompt[1]"),
    "token outside the vocabulary in a list": ({"prompt": [[1], [1, 1000]]}, "prompt[1][1]"),
    "too many prompts": ({"prompt": ["a"] * 1025}, "prompt"),
    "best_of below n": ({"n": 3, "best_of": 2}, "best_of"),
    "streamed best_of": ({"best_of": 2, "stream": True}, "best_of"),
    "too many logprobs": ({"logprobs": 21}, "logprobs"),
    "suffix": ({"suffix": "x"}, "suffix"),
}


@pytest.mark.parametrize(("body", "param"), BAD_COMPLETION.values(), ids=BAD_COMPLETION)
def test_a_bad_completion_field_is_named(body: dict[str, Any], param: str) -> None:
    assert refusal(completion, **body).param == param


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


BAD_CHAT = {
    "no messages": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "unknown role": ({"messages": [{"role": "pope", "content": "a"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "wrong content": (user(3), "messages[0].content"),
    "image": (user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    "part without text": (user([{"type": "text"}]), "messages[0].content[0].text"),
    "unknown field": ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood"),
    "arguments that aren't JSON": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "numeric logprobs": ({"logprobs": 2}, "logprobs"),
    "choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "choice of an unknown tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        "tool_choice.function.name",
    ),
    "tool name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    "tool twice": ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    "tools and a format": ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    "functions": ({"functions": [{}]}, "functions"),
    "both ends of a turn": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "special tokens": ({"add_special_tokens": True}, "add_special_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
}


@pytest.mark.parametrize(("body", "param"), BAD_CHAT.values(), ids=BAD_CHAT)
def test_a_bad_chat_field_is_named(body: dict[str, Any], param: str) -> None:
    assert refusal(chat, **body).param == param


NOT_JSON = [
    b"",
    b"{",
    b"nope",
    b'{"prompt": NaN}',
    b'{"prompt": 1e999}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 5000,
]


@pytest.mark.parametrize("body", NOT_JSON)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidParameterError, match="valid JSON"):
        parse_completion(body, VOCAB)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"a"', b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidParameterError, match="the body is"):
        parse_completion(body, VOCAB)


def test_null_means_absent_for_every_optional_field() -> None:
    absent = {field.name: None for field in COMPLETION.fields if not field.required}
    assert completion(**absent) == completion()
    absent = {field.name: None for field in CHAT.fields if not field.required}
    assert chat(**absent) == chat()


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])]
)
def test_prompts_come_in_four_shapes(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


def test_a_message_names_the_field_the_value_and_what_is_allowed() -> None:
    assert refusal(completion, temperature=3).message == "temperature is 3: give a number from 0 to 2"


def test_a_message_never_repeats_a_large_value() -> None:
    assert len(refusal(completion, model="x" * 10_000).message) < 200
    assert len(refusal(completion, **{"y" * 10_000: 1}).message) < 1500


def test_best_of_asks_the_engine_for_log_probabilities() -> None:
    assert completion(n=2, best_of=4).generation.params.logprobs == 0
    assert completion(n=2, best_of=2).generation.params.logprobs is None


def test_an_echo_with_log_probabilities_scores_the_prompt() -> None:
    params = completion(echo=True, logprobs=3, prompt_logprobs=1).generation.params
    assert params.prompt_logprobs == 3


def test_zero_tokens_score_the_prompt() -> None:
    asked = completion(max_tokens=0, echo=True)
    assert asked.prompt_only
    assert asked.generation.params.max_tokens == 1


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_completion_tokens=5, max_tokens=9).generation.params.max_tokens == 5
    assert chat(max_tokens=9).generation.params.max_tokens == 9
    assert chat().generation.params.max_tokens is None


def test_call_arguments_reach_the_template_as_objects() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}]
    plain = chat(messages=messages).template.messages[0]
    assert plain["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert set(plain) == {"role", "content", "tool_calls"}


def test_tools_are_hidden_from_the_template_when_none_may_be_called() -> None:
    assert chat(tools=[TOOL], tool_choice="none").template.tools is None
    assert chat(tools=[TOOL]).template.tools == [TOOL]


def test_a_demanded_call_is_constrained_to_the_named_tool() -> None:
    other = {"type": "function", "function": {"name": "sub"}}
    named = chat(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "sub"}})
    schema = json.loads(named.generation.params.grammar.source)
    assert schema["properties"]["name"] == {"const": "sub"}
    required = chat(tools=[TOOL, other], tool_choice="required")
    schema = json.loads(required.generation.params.grammar.source)
    assert [option["properties"]["name"]["const"] for option in schema["anyOf"]] == ["add", "sub"]


def test_references_in_tool_parameters_point_to_where_they_lie() -> None:
    parameters = {"$defs": {"x": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    schema = json.loads(chat(tools=[tool], tool_choice="required").generation.params.grammar.source)
    assert schema["$defs"]["arguments0"]["properties"]["a"] == {"$ref": "#/$defs/arguments0/$defs/x"}


def test_tokenize_takes_a_prompt_or_messages() -> None:
    assert parse_tokenize(b'{"prompt": "a", "add_special_tokens": false}').add_special_tokens is False
    assert parse_tokenize(json.dumps({"messages": USER}).encode()).template is not None
    for body in (b"{}", json.dumps({"messages": USER, "prompt": "a"}).encode()):
        with pytest.raises(InvalidParameterError):
            parse_tokenize(body)


def test_detokenize_checks_the_vocabulary() -> None:
    assert parse_detokenize(b'{"tokens": [1, 2]}', VOCAB).tokens == [1, 2]
    with pytest.raises(InvalidParameterError):
        parse_detokenize(b'{"tokens": [1000]}', VOCAB)


def test_every_field_has_a_sentence() -> None:
    assert [field.name for table in BODIES.values() for field in table.fields if not field.help] == []
