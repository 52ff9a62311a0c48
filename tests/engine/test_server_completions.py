from __future__ import annotations

import pytest

from fake_engine import FakeEngine
from pagedserve_engine.errors import StepFailedError
from serving import complete


def test_a_completion_is_whole() -> None:
    reply = complete(model="org/fake")
    assert reply.status == 200
    body = reply.json
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "org/fake"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {"index": 0, "text": "Hello world.", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


def test_usage_counts_each_prompt_once_and_every_output() -> None:
    usage = complete(FakeEngine(cached_tokens=2), prompt=["ab", "c"], n=2, max_tokens=5).json["usage"]
    assert usage == {
        "prompt_tokens": 5,
        "completion_tokens": 20,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_sixteen_tokens_are_generated_unless_told_otherwise() -> None:
    choice = complete(FakeEngine(answer="x" * 50)).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


@pytest.mark.parametrize("tokens_per_output", [1, 2, 3, 7, 50])
def test_a_stream_has_the_same_text(tokens_per_output: int) -> None:
    engine = FakeEngine(answer="Grüße, 世界! 🎉", tokens_per_output=tokens_per_output)
    chunks = complete(engine, stream=True, max_tokens=100).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Grüße, 世界! 🎉"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] in ([None, "stop"], ["stop"])
    assert all(chunk["id"] == chunks[0]["id"] and "usage" not in chunk for chunk in chunks)


def test_usage_ends_a_stream_that_asks_for_it() -> None:
    chunks = complete(stream=True, stream_options={"include_usage": True}).chunks
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_several_prompts_stream_interleaved() -> None:
    engine = FakeEngine(answer=lambda request: bytes(request.prompt_ids[1:]).decode() * 3)
    chunks = complete(engine, stream=True, prompt=["a", "b"], n=2).chunks
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "aaa", 1: "aaa", 2: "bbb", 3: "bbb"}
    assert {chunk["choices"][0]["index"] for chunk in chunks[:4]} == {0, 1, 2, 3}


def test_a_stop_string_ends_the_text_and_is_named() -> None:
    choice = complete(stop=["wor", "zzz"]).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello ", "stop", "wor")
    choice = complete(stop="wor", include_stop_str_in_output=True).json["choices"][0]
    assert choice["text"] == "Hello wor"


def test_choices_of_a_seeded_request_differ_in_their_seeds() -> None:
    engine = FakeEngine()
    complete(engine, n=3, seed=2**63 - 1)
    assert [request.params.seed for request in engine.requests] == [2**63 - 1, 2**63, 2**63 + 1]


def test_best_of_returns_the_likeliest() -> None:
    engine = FakeEngine(answer=lambda request: request.request_id[-1])
    engine.mean_logprob = lambda request: -abs(2.0 - int(request.request_id[-1]))
    body = complete(engine, n=2, best_of=4).json
    assert [choice["text"] for choice in body["choices"]] == ["2", "1"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 4


def test_log_probabilities_are_lists_by_position() -> None:
    logprobs = complete(logprobs=2, max_tokens=2).json["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}],
        "text_offset": [0, 1],
    }


def test_streamed_log_probabilities_are_the_whole_ones_in_parts() -> None:
    whole = complete(logprobs=1, echo=True).json["choices"][0]
    parts = [chunk["choices"][0] for chunk in complete(logprobs=1, echo=True, stream=True).chunks]
    assert "".join(part["text"] for part in parts) == whole["text"] == "HiHello world."
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values or name == "text_offset"


def test_an_echo_scores_the_prompt_but_its_first_token() -> None:
    logprobs = complete(echo=True, logprobs=0, prompt="ab", add_special_tokens=False, max_tokens=1).json["choices"][0][
        "logprobs"
    ]
    assert logprobs["tokens"] == ["a", "b", "H"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2]


def test_an_echo_of_token_ids_is_their_text() -> None:
    assert complete(echo=True, prompt=[104, 105], max_tokens=1).json["choices"][0]["text"] == "hiH"


@pytest.mark.parametrize("stream", [False, True])
def test_zero_tokens_return_the_prompt_alone(stream: bool) -> None:
    reply = complete(echo=True, logprobs=0, max_tokens=0, stream=stream)
    body = reply.chunks[0] if stream else reply.json
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert len(choice["logprobs"]["tokens"]) == 3
    if not stream:
        assert body["usage"]["completion_tokens"] == 0


def test_a_token_that_is_half_a_character_is_spelled_in_bytes() -> None:
    logprobs = complete(FakeEngine(answer="é"), logprobs=0).json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_impossible_log_probabilities_are_numbers() -> None:
    engine = FakeEngine()
    engine.mean_logprob = lambda request: float("-inf")
    assert complete(engine, logprobs=0, max_tokens=1).json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_prompt_log_probabilities_come_by_token_id() -> None:
    choice = complete(prompt_logprobs=1, prompt=[65, 66]).json["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"66": {"logprob": -0.5, "rank": 1, "decoded_token": "B"}}]


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_where_asked_for(stream: bool) -> None:
    reply = complete(return_token_ids=True, prompt=[65], max_tokens=2, stream=stream)
    choices = [body["choices"][0] for body in (reply.chunks if stream else [reply.json])]
    assert choices[0]["prompt_token_ids"] == [65]
    assert [token for choice in choices for token in choice["token_ids"]] == list(b"He")


def test_settings_reach_the_engine() -> None:
    engine = FakeEngine()
    complete(engine, cache_salt="tenant", skip_special_tokens=False, stop=["a"], prompt=[1, 2, 3])
    request = engine.requests[0]
    assert (request.salt, request.skip_special_tokens, request.stop) == (b"tenant", False, ("a",))
    assert list(request.prompt_ids) == [1, 2, 3]


def test_every_stream_is_closed() -> None:
    engine = FakeEngine()
    complete(engine, n=3)
    complete(engine, n=3, stream=True)
    assert len(engine.streams) == 6
    assert all(stream.closed for stream in engine.streams)


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_while_streaming_is_the_last_event(n: int) -> None:
    engine = FakeEngine(fail_after=(4, StepFailedError("the step failed")))
    reply = complete(engine, stream=True, n=n)
    assert reply.status == 200
    assert reply.events[-1] == {
        "error": {"message": "the step failed", "type": "server_error", "param": None, "code": "step_failed"}
    }
    assert all(stream.closed for stream in engine.streams)


def test_an_unforeseen_failure_while_streaming_is_told_without_detail() -> None:
    reply = complete(FakeEngine(fail_after=(2, ValueError("secret"))), stream=True)
    assert reply.events[-1]["error"]["type"] == "server_error"
    assert b"secret" not in reply.body


def test_a_failure_of_a_whole_response_has_its_status() -> None:
    engine = FakeEngine(fail_after=(2, StepFailedError("the step failed")))
    reply = complete(engine)
    assert (reply.status, reply.error["code"]) == (500, "step_failed")
    assert engine.streams[0].closed


def test_a_grammar_is_compiled_before_anything_is_queued() -> None:
    engine = FakeEngine()
    reply = complete(engine, response_format={"type": "regex", "pattern": "("})
    assert (reply.status, engine.requests) == (400, [])


def test_a_model_without_tokenizer_takes_token_ids() -> None:
    engine = FakeEngine(has_tokenizer=False)
    assert complete(engine, prompt=[1, 2], logprobs=0, max_tokens=1).json["choices"][0]["logprobs"]["tokens"] == [
        "token_id:72"
    ]
    reply = complete(FakeEngine(has_tokenizer=False))
    assert (reply.status, reply.error["param"]) == (400, "prompt")


def test_more_sequences_than_ever_fit_are_refused_at_once() -> None:
    reply = complete(prompt=["a"] * 1024, n=128)
    assert reply.status == 400
    assert "at most 1280" in reply.error["message"]


def test_a_model_name_cannot_break_a_chunk() -> None:
    reply = complete(stream=True, prompt="\x00", stop=["\x00"])
    assert "".join(chunk["choices"][0]["text"] for chunk in reply.chunks) == "Hello world."
