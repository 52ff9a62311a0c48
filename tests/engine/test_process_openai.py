"""The official client against a real server process: every answer is the model's own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from models import smollm2_folder
from oracle import Oracle
from processes import Server

PROMPT = "The capital of France is"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: Any = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def client(chat_server: Server) -> Iterator[OpenAI]:
    with chat_server.client() as client:
        yield client


def join(chunks: Any, index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def join_chat(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_model_s_own_whole_and_streamed(client: OpenAI, oracle: Oracle) -> None:
    prompt_ids = oracle.ids(PROMPT)
    expected = oracle.text(oracle.greedy(prompt_ids, 40))
    whole = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt_ids), 40)
    assert whole.usage.total_tokens == len(prompt_ids) + 40
    chunks = list(
        client.completions.create(
            prompt=PROMPT, max_tokens=40, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert join(chunks) == expected
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 40)


def test_a_chat_is_the_model_s_own_whole_and_streamed(client: OpenAI, oracle: Oracle) -> None:
    prompt_ids = oracle.chat_ids(QUESTION)
    expected = oracle.text(oracle.greedy(prompt_ids, 40))
    whole = client.chat.completions.create(messages=QUESTION, max_completion_tokens=40, **GREEDY)
    assert whole.choices[0].message.content == expected
    assert whole.usage.prompt_tokens == len(prompt_ids)
    chunks = list(client.chat.completions.create(messages=QUESTION, max_tokens=40, stream=True, **GREEDY))
    assert join_chat(chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_prompts_come_as_text_or_token_ids_one_or_several(client: OpenAI, oracle: Oracle) -> None:
    texts = [PROMPT, "Once upon a time", "1, 2, 3,"]
    ids = [oracle.ids(text) for text in texts]
    expected = [oracle.text(oracle.greedy(prompt, 12)) for prompt in ids]
    for prompts in (texts, ids):
        answer = client.completions.create(prompt=prompts, max_tokens=12, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        chunks = list(client.completions.create(prompt=prompts, max_tokens=12, stream=True, **GREEDY))
        assert [join(chunks, index) for index in range(3)] == expected
    one = client.completions.create(prompt=ids[1], max_tokens=12, **GREEDY)
    assert one.choices[0].text == expected[1]
    # They run together: no prompt's chunks are all before the next one's.
    order = [choice.index for chunk in chunks for choice in chunk.choices]
    assert order != sorted(order)


def test_what_shares_the_batch_changes_nothing(client: OpenAI, oracle: Oracle) -> None:
    prompts = [" ".join(["word"] * n) + f" {n}" for n in (1, 3, 9, 27, 60, 90, 120, 200)]

    def ask(prompt: str) -> str:
        return join(list(client.completions.create(prompt=prompt, max_tokens=30, stream=True, **GREEDY)))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [oracle.text(oracle.greedy(oracle.ids(prompt), 30)) for prompt in prompts]


def test_roles_and_content_parts_reach_the_template(client: OpenAI, oracle: Oracle) -> None:
    def prompt_ids(messages: Any) -> list[int]:
        options: Any = {"return_token_ids": True}
        answer = client.chat.completions.create(messages=messages, max_tokens=1, extra_body=options, **GREEDY)
        ids: list[int] = answer.model_extra["prompt_token_ids"]
        return ids

    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\nthere"}]
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert prompt_ids(plain) == oracle.chat_ids(plain)
    assert prompt_ids(developer) == oracle.chat_ids(plain)
    turns = [*plain, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And?"}]
    assert prompt_ids(turns) == oracle.chat_ids(turns)


def test_log_probabilities_are_the_model_s(client: OpenAI, oracle: Oracle) -> None:
    prompt_ids = oracle.ids(PROMPT)
    output = oracle.greedy(prompt_ids, 8)
    scores = oracle.logprobs([*prompt_ids, *output])[len(prompt_ids) - 1 : -1]
    best = scores.topk(3)
    shown = client.completions.create(
        prompt=PROMPT, max_tokens=8, logprobs=3, extra_body={"return_token_ids": True}, **GREEDY
    ).choices[0]
    assert shown.model_extra["token_ids"] == output
    assert shown.logprobs.token_logprobs == pytest.approx(
        scores.gather(1, best.indices[:, :1])[:, 0].tolist(), abs=1e-4
    )
    for place, values in zip(shown.logprobs.top_logprobs, best.values.tolist(), strict=True):
        assert sorted(place.values(), reverse=True) == pytest.approx(values, abs=1e-4)
    chat_ids = oracle.chat_ids(QUESTION)
    output = oracle.greedy(chat_ids, 8)
    scores = oracle.logprobs([*chat_ids, *output])[len(chat_ids) - 1 : -1]
    content = (
        client.chat.completions.create(messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=2, **GREEDY)
        .choices[0]
        .logprobs.content
    )
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == oracle.text(output)
    for entry, row, token in zip(content, scores, output, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_an_echo_with_log_probabilities_scores_the_prompt(client: OpenAI, oracle: Oracle) -> None:
    prompt_ids = oracle.ids(PROMPT)
    scores = oracle.logprobs(prompt_ids)
    expected = [scores[at, token].item() for at, token in enumerate(prompt_ids[1:])]
    answer = client.completions.create(prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert answer.usage.completion_tokens == 0
    longer = client.completions.create(prompt=PROMPT, max_tokens=4, echo=True, **GREEDY).choices[0].text
    assert longer == PROMPT + oracle.text(oracle.greedy(prompt_ids, 4))


def test_a_repeated_prompt_is_found_in_the_cache(client: OpenAI) -> None:
    def ask(salt: str) -> tuple[str, int, int]:
        answer = client.completions.create(
            prompt="One two three four. " * 40, max_tokens=4, extra_body={"cache_salt": salt}, **GREEDY
        )
        usage = answer.usage
        return answer.choices[0].text, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

    first, second, other = ask("a"), ask("a"), ask("b")
    assert first[0] == second[0] == other[0]
    assert (first[2], other[2]) == (0, 0)
    assert second[2] == (second[1] - 1) // 32 * 32


def test_text_becomes_tokens_and_tokens_text(chat_server: Server, oracle: Oracle) -> None:
    text = "Straße 😀\n\tdef f():"
    tokens = chat_server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert tokens["tokens"] == oracle.ids(text)
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 8192)
    assert chat_server.post("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}
    assert chat_server.post("/tokenize", {"messages": QUESTION}).json["tokens"] == oracle.chat_ids(QUESTION)


def test_the_served_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == 8192
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.models.retrieve("other")


# --- the numbers -------------------------------------------------------------------------------------------------


def test_metrics_tell_what_happened(chat_server: Server, client: OpenAI) -> None:
    before = chat_server.wait_until_idle()
    client.completions.create(prompt=[5, 6, 7, 8], max_tokens=9, extra_body={"cache_salt": "metrics"}, **GREEDY)
    client.completions.create(
        prompt=[5, 6, 7], max_tokens=5, logit_bias={"2": 100}, extra_body={"cache_salt": "metrics"}, **GREEDY
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=[5] * 9000, max_tokens=5, **GREEDY)
    after = chat_server.wait_until_idle()
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    assert moved["prompt_tokens_total"] == 7
    assert moved["generated_tokens_total"] == 10
    assert moved["requests_total{outcome=length}"] == 1
    assert moved["requests_total{outcome=stop}"] == 1
    assert moved["requests_total{outcome=rejected}"] == 1
    assert moved["request_duration_seconds_count"] == 2
    assert moved["time_to_first_token_seconds_count"] == 2
    assert moved["inter_token_latency_seconds_count"] == 8
    assert after["blocks_free"] == after["blocks"] == 2047
    assert after["cache_usage_ratio"] == 0


# --- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_small_model_knows_the_capital_of_france_and_leaves_in_peace() -> None:
    oracle = Oracle(smollm2_folder())
    expected = oracle.text(oracle.greedy(oracle.chat_ids(QUESTION), 24))
    with Server(smollm2_folder(), num_blocks=64) as server:
        with server.client() as client:
            name = client.models.list().data[0].id
            asked: Any = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
            whole = client.chat.completions.create(**asked)
            streamed = join_chat(client.chat.completions.create(stream=True, **asked))
            refused = server.post("/v1/chat/completions", {"messages": QUESTION, "tools": [TOOL]})
        ended = server.stop(signal.SIGTERM)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].message.content == expected == streamed
    assert (refused.status, refused.error["param"]) == (400, "tools")
    assert ended.status == 0
    assert "drained" in ended.log
    assert "Paris" not in ended.log


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
