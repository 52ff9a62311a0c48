"""No body, however odd, makes the server fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_engine import FakeEngine
from pagedserve_engine.server.containers import Either, ListOf
from pagedserve_engine.server.fields import Choice, Kind
from pagedserve_engine.server.objects import Object, Tagged
from pagedserve_engine.server.openapi import BODIES
from serving import drive

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e300])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def near(kind: Kind) -> st.SearchStrategy[Any]:
    """Values that are right in parts: known names with odd values."""
    if isinstance(kind, Object):
        return st.fixed_dictionaries({}, optional={field.name: near(field.kind) for field in kind.fields}) | ANYTHING
    if isinstance(kind, Tagged):
        options = [near(option).map(lambda value, tag=tag: _tag(kind.tag, tag, value)) for tag, option in kind.options]
        return st.one_of(options) | ANYTHING
    if isinstance(kind, Either):
        return st.one_of([near(one) for one in kind.kinds])
    if isinstance(kind, ListOf):
        return st.lists(near(kind.item), max_size=2) | ANYTHING
    if isinstance(kind, Choice):
        return st.sampled_from(kind.options) | SCALARS
    return ANYTHING


def _tag(name: str, tag: str, value: Any) -> Any:
    return {name: tag, **value} if isinstance(value, dict) else value


REQUIRED = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Bodies that are right but for up to two fields, and anything at all."""
    fields = BODIES[path].fields
    odd = st.lists(st.sampled_from(fields), max_size=2, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({field.name: near(field.kind) for field in chosen})
    )
    return odd.map(lambda fields: {**REQUIRED[path], **fields}) | ANYTHING


@pytest.mark.parametrize("path", BODIES)
def test_odd_json_never_makes_the_server_fail(path: str) -> None:
    statuses = set()

    async def scenario(client: TestClient) -> None:
        loop = asyncio.get_running_loop()

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(body=bodies(path))
        def send(body: Any) -> None:
            posted = asyncio.run_coroutine_threadsafe(post(json.dumps(body).encode()), loop)
            posted.result(30)

        async def post(data: bytes) -> None:
            async with client.post(path, data=data) as response:
                text = await response.text()
                assert response.status in (200, 400, 404), text
                assert '"server_error"' not in text, text
                statuses.add(response.status)

        await asyncio.to_thread(send)

    drive(scenario, FakeEngine(answer="ok", tokens_per_output=2))
    assert {200, 400} <= statuses


def test_odd_bytes_never_make_the_server_fail() -> None:
    async def scenario(client: TestClient) -> None:
        deep = b'{"prompt": "a", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}"
        twice = b'{"prompt": "a", "prompt": "b"}'
        surrogate = b'{"prompt": "\\ud83d"}'
        key = b'{"prompt": "a", "' + b"k" * 100_000 + b'": 1}'
        for data in (
            b"",
            b"\x00",
            b"\xff\xfe",
            deep,
            b"[" * 100_000,
            surrogate,
            key,
            b'{"prompt": "a", "seed": 1e308}',
        ):
            async with client.post("/v1/completions", data=data) as response:
                assert response.status == 400
                assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
        async with client.post("/v1/completions", data=twice) as response:
            assert response.status == 200

    drive(scenario)
