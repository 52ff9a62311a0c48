"""Bodies made from the OpenAPI document that a real server publishes: none makes it fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from models import tiny_chat_model
from processes import Server

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/v1/models/{model}", "/health/live", "/health/ready", "/metrics", "/openapi.json")
BOUNDS = {
    "max_tokens": (4, 2**31 - 1),
    "max_completion_tokens": (4, 2**31 - 1),
    "min_tokens": (2, 2**31 - 1),
    "n": (2, 128),
    "best_of": (2, 128),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # A short context, so that what no field bounds ends soon as well.
    with Server(tiny_chat_model()[1], max_model_len=128, num_blocks=512, request_timeout_seconds=30) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", POSTS)
def test_no_body_makes_the_server_fail(api: Any, path: str, mode: GenerationMode) -> None:
    assert send_many(api[path]["POST"], mode, 60)[400 if mode is GenerationMode.NEGATIVE else 200]


@pytest.mark.parametrize("path", GETS)
def test_answers_are_as_documented(api: Any, path: str) -> None:
    assert send_many(api[path]["GET"], GenerationMode.POSITIVE, 5)


def test_all_is_as_it_was_after_that(server: Server) -> None:
    values = server.wait_until_idle()
    assert values["blocks_free"] == values["blocks"]
    assert server.get("/health/live").status == 200
    assert "Traceback" not in server.log


def send_many(operation: Any, mode: GenerationMode, num_cases: int) -> Counter[int]:
    """How often each status came; every response must be as the document says and never the server's failure."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body = shortened(case.body)
        # That each field is right doesn't make a body right: some that fit the document get 400.
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        assert response.status_code < 500
        statuses[response.status_code] += 1

    send()
    return statuses


def shortened(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with fewer sequences and tokens; what is wrong in it stays wrong."""
    return {
        name: min(value, BOUNDS[name][0])
        if name in BOUNDS and type(value) is int and 0 < value <= BOUNDS[name][1]
        else value
        for name, value in body.items()
    }
