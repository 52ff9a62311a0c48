"""Every sampling parameter through a real server process, held to its definition on the model's own scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from pydantic import BaseModel

from naive_sampling import penalise
from oracle import Oracle, Row
from pagedserve_engine.request import SamplingParams
from processes import Server

PROMPT = "Numbers, in order:"
END = 2


@pytest.fixture(scope="module")
def client(chat_server: Server) -> Iterator[OpenAI]:
    with chat_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def prompt_ids(oracle: Oracle) -> list[int]:
    return oracle.ids(PROMPT)


@pytest.fixture(scope="module")
def greedy(oracle: Oracle, prompt_ids: list[int]) -> list[int]:
    return oracle.greedy(prompt_ids, 24)


def complete(client: OpenAI, **body: Any) -> Any:
    """The first choice; extensions of the API among ``body`` travel as such."""
    return choices(client, **body)[0]


def choices(client: OpenAI, **body: Any) -> Any:
    body = {"return_token_ids": True, "max_tokens": 24, **body}
    return client.completions.create(model="tiny", prompt=PROMPT, extra_body=body).choices


def ids(choice: Any) -> list[int]:
    token_ids: list[int] = choice.model_extra["token_ids"]
    return token_ids


# --- how tokens are drawn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}, {"top_p": 1e-6}, {"min_p": 1}])
def test_what_leaves_the_likeliest_token_alone_is_greedy(
    client: OpenAI, greedy: list[int], body: dict[str, Any]
) -> None:
    assert ids(complete(client, **body)) == greedy


@pytest.mark.parametrize("body", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}], ids=str)
def test_filters_keep_to_the_likeliest_tokens(
    client: OpenAI, oracle: Oracle, prompt_ids: list[int], greedy: list[int], body: dict[str, Any]
) -> None:
    output = ids(complete(client, temperature=2, seed=1, **body))
    assert output != greedy
    weights = oracle.logprobs([*prompt_ids, *output])[len(prompt_ids) - 1 : -1].div(2).softmax(-1)
    for row, token in zip(weights, output, strict=True):
        above = row[row > row[token]]
        assert len(above) < body.get("top_k", 49152)
        assert above.sum() < body.get("top_p", 1) + 1e-4
        assert row[token] > row.max() * body.get("min_p", 0) - 1e-6


def test_a_seed_gives_the_same_output_alone_and_in_company(client: OpenAI, greedy: list[int]) -> None:
    def ask(seed: int | None) -> list[int]:
        return ids(complete(client, temperature=1.5, **({} if seed is None else {"seed": seed})))

    alone = ask(7)
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(ask, [1, 2, 3, 4, 7, 5, 6, None, None]))
    assert together[4] == alone != greedy
    assert len({tuple(output) for output in together}) == 9


def test_choices_of_a_seed_are_those_of_the_seeds_after_it(client: OpenAI) -> None:
    several = [ids(choice) for choice in choices(client, n=3, seed=40, temperature=1)]
    assert several == [ids(complete(client, seed=seed, temperature=1)) for seed in (40, 41, 42)]


def test_the_best_of_several_have_the_highest_mean_log_probability(client: OpenAI) -> None:
    every = choices(client, n=5, seed=3, logprobs=0)
    ranked = sorted(every, key=lambda choice: -float(np.mean(choice.logprobs.token_logprobs)))
    best = choices(client, n=2, best_of=5, seed=3)
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best] == [0, 1]


def test_a_bias_forces_and_forbids(client: OpenAI, oracle: Oracle, greedy: list[int]) -> None:
    assert ids(complete(client, logit_bias={"1000": 100}, max_tokens=5)) == [1000] * 5
    assert ids(complete(client, logit_bias={str(greedy[0]): -100}, temperature=0))[0] != greedy[0]


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_are_what_they_are_defined_to_be(
    client: OpenAI, oracle: Oracle, prompt_ids: list[int], name: str
) -> None:
    # Raised as far, only these few tokens are ever the likeliest, and greedy output would repeat one of them.
    params = SamplingParams(logit_bias=dict.fromkeys(range(1000, 1006), 40.0), **{name: 1.7})

    def adjust(scores: Row, output: Sequence[int]) -> Row:
        return penalise(scores, params, prompt_ids, output)

    plain = ids(complete(client, temperature=0, logit_bias=params.logit_bias, max_tokens=16))
    penalised = ids(complete(client, temperature=0, logit_bias=params.logit_bias, max_tokens=16, **{name: 1.7}))
    assert penalised != plain
    assert penalised == oracle.greedy_with(prompt_ids, 16, adjust)


# --- where outputs end --------------------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_ends_the_output(client: OpenAI, oracle: Oracle, greedy: list[int]) -> None:
    text = oracle.text(greedy)
    first, second = oracle.text(greedy[8:9]), oracle.text(greedy[9:10])
    stop = first[-1] + second[:2]
    expected = text[: text.index(stop)]
    choice = complete(client, temperature=0, stop=["never found", stop])
    assert (choice.text, choice.finish_reason, choice.model_extra["stop_reason"]) == (expected, "stop", stop)
    kept = complete(client, temperature=0, stop=stop, include_stop_str_in_output=True)
    assert kept.text == expected + stop
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=24, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_stop_token_ends_the_output(client: OpenAI, oracle: Oracle, greedy: list[int]) -> None:
    at = next(at for at in range(4, 24) if greedy[at] not in greedy[:at])
    choice = complete(client, temperature=0, stop_token_ids=[greedy[at]])
    assert choice.text == oracle.text(greedy[:at])
    assert (choice.finish_reason, choice.model_extra["stop_reason"]) == ("stop", greedy[at])
    kept = complete(client, temperature=0, stop_token_ids=[greedy[at]], include_stop_str_in_output=True)
    assert kept.text == oracle.text(greedy[: at + 1])


def test_no_output_ends_before_its_minimum(
    client: OpenAI, oracle: Oracle, prompt_ids: list[int], greedy: list[int]
) -> None:
    def without_ends(scores: Row, output: Sequence[int]) -> Row:
        scores[[greedy[2], END]] = -np.inf
        return scores

    choice = complete(client, temperature=0, stop_token_ids=[greedy[2]], min_tokens=8, max_tokens=8)
    assert ids(choice) == oracle.greedy_with(prompt_ids, 8, without_ends)
    forced = complete(client, logit_bias={str(END): 100}, min_tokens=6)
    assert len(ids(forced)) == 7
    assert ids(forced)[6] == END
    stop = oracle.text(greedy[2:3])
    assert len(ids(complete(client, temperature=0, stop=stop, min_tokens=8))) >= 8


def test_the_end_token_ends_the_output_unless_it_is_ignored(client: OpenAI) -> None:
    ended = complete(client, logit_bias={str(END): 100})
    assert (ended.text, ended.finish_reason) == ("", "stop")
    ignored = complete(client, logit_bias={str(END): 100}, ignore_eos=True, max_tokens=3)
    assert (ids(ignored), ignored.text, ignored.finish_reason) == ([END] * 3, "", "length")
    spelled = complete(client, logit_bias={str(END): 100}, ignore_eos=True, max_tokens=3, skip_special_tokens=False)
    assert spelled.text == "<|im_end|>" * 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_is_as_long_as_it_may(client: OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], extra_body={name: 7, "ignore_eos": True}
    )
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (7, "length")


# --- what outputs conform to --------------------------------------------------------------------------------------


class Order(BaseModel):
    size: bool
    colour: bool


SCHEMA = Order.model_json_schema() | {"additionalProperties": False}
PATTERN = r"(red|green) [0-9]{3}-[a-f]{2}"
STRUCTURED: dict[str, dict[str, Any]] = {
    "response_format": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
    },
    "guided_json": {"guided_json": SCHEMA},
    "structured_outputs": {"structured_outputs": {"json": SCHEMA}},
}


@pytest.mark.parametrize("body", STRUCTURED.values(), ids=STRUCTURED)
@pytest.mark.parametrize("seed", [1, 2])
def test_output_conforms_to_its_schema(client: OpenAI, body: dict[str, Any], seed: int) -> None:
    choice = complete(client, seed=seed, max_tokens=400, **body)
    assert choice.finish_reason == "stop"
    Order.model_validate_json(choice.text)


def test_output_is_any_object_where_an_object_is_asked_for(client: OpenAI, oracle: Oracle) -> None:
    [brace] = oracle.tokenizer.encode("}", add_special_tokens=False)
    choice = complete(client, response_format={"type": "json_object"}, logit_bias={str(brace): 100}, max_tokens=200)
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.text), dict)


@pytest.mark.parametrize(
    "body", [{"response_format": {"type": "regex", "pattern": PATTERN}}, {"guided_regex": PATTERN}], ids=list
)
def test_output_matches_its_pattern(client: OpenAI, body: dict[str, Any]) -> None:
    outputs = {complete(client, seed=seed, max_tokens=40, **body).text for seed in range(4)}
    assert all(re.fullmatch(PATTERN, output) for output in outputs)
    assert len(outputs) > 1


def test_the_client_parses_structured_output_into_a_model(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Order!"}]
    asked: Any = {"model": "tiny", "messages": messages, "seed": 5, "max_tokens": 400}
    whole = client.chat.completions.parse(response_format=Order, **asked).choices[0].message
    assert isinstance(whole.parsed, Order)
    with client.chat.completions.stream(response_format=Order, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == whole.parsed
