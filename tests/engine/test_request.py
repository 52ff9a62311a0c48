"""Requests as they enter the core."""

from __future__ import annotations

import math

import pytest

from pagedserve_engine.errors import ContextLengthError, InvalidParameterError
from pagedserve_engine.request import RequestState, RequestStatus, SamplingParams


def create(prompt: list[int], **params: object) -> RequestState:
    return RequestState.create("r", prompt, SamplingParams(**params), arrival_time=0.0, max_model_len=10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
    ],
)
def test_a_number_out_of_range_names_its_field(name: str, value: float) -> None:
    with pytest.raises(InvalidParameterError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_without_a_limit_a_request_may_fill_the_context() -> None:
    assert create([1, 2, 3]).max_tokens == 7


@pytest.mark.parametrize(("prompt", "max_tokens", "cure"), [([1] * 10, 1, "at most 9"), ([1] * 8, 3, "at most 2")])
def test_what_can_never_fit_is_refused_with_what_would(prompt: list[int], max_tokens: int, cure: str) -> None:
    with pytest.raises(ContextLengthError, match=cure):
        create(prompt, max_tokens=max_tokens)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="empty"):
        create([])


def test_requests_without_a_seed_differ_and_a_given_seed_stays() -> None:
    assert create([1]).seed != create([1]).seed
    assert create([1], seed=7).seed == 7


def test_an_ended_request_stays_ended() -> None:
    request = create([1])
    request.move_to(RequestStatus.FINISHED)
    with pytest.raises(AssertionError):
        request.move_to(RequestStatus.RUNNING)
