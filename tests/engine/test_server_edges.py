"""What isn't a plain answer: errors, limits, keys, health, clients that leave, draining."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from fake_engine import FakeEngine
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import (
    ConfigError,
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    PagedServeError,
    QueueFullError,
)
from pagedserve_engine.server.app import create_app
from serving import Reply, call, chat, complete, drive, read

BODY = {"prompt": "Hi"}


def assert_error(reply: Reply, status: int, code: str | None) -> None:
    assert reply.status == status
    assert reply.headers["Content-Type"].startswith("application/json")
    assert set(reply.json) == {"error"}
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["code"] == code


REFUSALS: dict[str, tuple[PagedServeError, int, str | None]] = {
    "queue full": (QueueFullError("full", retry_after=2.4), 429, "3"),
    "draining": (DrainingError("leaving", retry_after=1.0), 503, "1"),
    "dead": (EngineDeadError("the core died"), 503, None),
    "too long": (ContextLengthError("too long", param="prompt"), 400, None),
}


@pytest.mark.parametrize(("refusal", "status", "retry_after"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("send", [complete, chat])
def test_what_the_engine_refuses_has_its_status(
    send: Any, stream: bool, refusal: PagedServeError, status: int, retry_after: str | None
) -> None:
    reply = send(FakeEngine(refusal=refusal), stream=stream)
    assert_error(reply, status, refusal.code)
    assert reply.headers.get("Retry-After") == retry_after
    assert reply.error["param"] == refusal.param
    assert (reply.headers.get("Connection") == "close") == (refusal.code == "draining")


def test_an_unknown_route_is_not_found() -> None:
    assert_error(call("GET", "/v2/nothing"), 404, None)


def test_a_known_route_names_the_methods_that_it_takes() -> None:
    reply = call("GET", "/v1/completions")
    assert_error(reply, 405, None)
    assert reply.headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_json_is_refused(path: str) -> None:
    assert_error(call("POST", path, data=b"{"), 400, "invalid_value")


def test_an_unknown_model_is_not_found() -> None:
    for reply in (complete(model="gpt"), chat(model="gpt"), call("GET", "/v1/models/gpt")):
        assert_error(reply, 404, "model_not_found")
        assert "'org/fake'" in reply.error["message"]


def test_a_body_may_have_a_size_and_no_more() -> None:
    config = EngineConfig(max_request_bytes=1024)
    assert complete(config=config, prompt="x" * 900).status == 200
    reply = complete(config=config, prompt="x" * 2000)
    assert_error(reply, 413, None)
    assert "1024 bytes" in reply.error["message"]


def test_a_compressed_body_counts_by_what_it_holds() -> None:
    data = gzip.compress(json.dumps({"prompt": "x" * 100_000}).encode())
    config = EngineConfig(max_request_bytes=2048)
    assert_error(
        call("POST", "/v1/completions", config=config, data=data, headers={"Content-Encoding": "gzip"}), 413, None
    )


def test_a_body_that_breaks_its_encoding_is_refused() -> None:
    reply = call("POST", "/v1/completions", data=b"nonsense", headers={"Content-Encoding": "gzip"})
    assert_error(reply, 400, "invalid_value")


def test_an_unforeseen_failure_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    reply = complete(FakeEngine(fail_after=(0, ValueError("the prompt was: secret"))))
    assert_error(reply, 500, None)
    assert b"secret" not in reply.body
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_runs_too_long_is_ended(stream: bool) -> None:
    engine = FakeEngine(hold_after=2)
    reply = complete(engine, EngineConfig(request_timeout_seconds=0.05), stream=stream)
    error = reply.events[-1]["error"] if stream else reply.error
    assert (reply.status, error["code"]) == (200 if stream else 504, "request_timeout")
    assert engine.streams[0].closed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_ends_its_sequences(stream: bool, n: int) -> None:
    engine = FakeEngine(hold_after=4)

    async def scenario(client: TestClient) -> None:
        sending = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": stream, "n": n}))
        await asyncio.wait_for(engine.submitted.wait(), 5)
        if stream:
            response = await sending
            await response.content.readany()
            response.close()
        else:
            sending.cancel()
        await asyncio.wait_for(engine.all_closed.wait(), 5)

    drive(scenario, engine)
    assert len(engine.streams) == n


def test_a_client_that_stops_reading_does_not_hold_its_handler_for_ever() -> None:
    engine = FakeEngine(answer="x" * 200_000, tokens_per_output=50_000)
    config = EngineConfig(request_timeout_seconds=0.3)

    async def scenario(client: TestClient) -> None:
        body = json.dumps(
            {"prompt": "Hi", "stream": True, "max_tokens": 4000, "n": 128, "return_token_ids": True}
        ).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        _reader, writer = await asyncio.open_connection(client.host, client.port, limit=1024)
        writer.write(head + body)
        await asyncio.wait_for(engine.submitted.wait(), 5)
        await asyncio.wait_for(engine.all_closed.wait(), 10)
        writer.close()

    drive(scenario, engine, config)


def test_requests_wait_for_the_model_but_probes_are_answered() -> None:
    engine = FakeEngine(loads=False)

    async def scenario(client: TestClient) -> None:
        live, ready = await client.get("/health/live"), await client.get("/health/ready")
        assert (live.status, await live.json()) == (200, {"status": "loading", "reason": "loading"})
        assert ready.status == 503
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/chat/completions", {}),
            ("/tokenize", BODY),
            ("/detokenize", {}),
        ):
            reply = await read(await client.post(path, json=body))
            assert_error(reply, 503, "not_ready")
            assert reply.headers["Retry-After"] == "5"
        assert_error(await read(await client.get("/v1/models")), 503, "not_ready")
        assert (await client.get("/metrics")).status == 200

    drive(scenario, engine)


def test_health_follows_the_engine() -> None:
    engine = FakeEngine()

    async def scenario(client: TestClient) -> None:
        async def statuses() -> tuple[int, int, str]:
            live, ready = await client.get("/health/live"), await client.get("/health/ready")
            return live.status, ready.status, (await ready.json())["status"]

        assert await statuses() == (200, 200, "ok")
        engine.draining = True
        assert await statuses() == (200, 503, "draining")
        engine.draining, engine.alive = False, False
        assert await statuses() == (503, 503, "dead")

    drive(scenario, engine)


def test_the_application_starts_and_closes_its_engine() -> None:
    engine = FakeEngine()
    complete(engine)
    assert engine.events == ["start", "close"]


def test_a_request_keeps_the_id_that_it_brings() -> None:
    for given, kept in (("abc-1.2:3_4", True), ("a b", False), ("x" * 129, False), ("", False)):
        for path in ("/v1/models", "/nothing", "/v1/completions"):
            reply = call("GET", path, headers={"X-Request-Id": given})
            assert (reply.headers["X-Request-Id"] == given) is kept
            assert reply.headers["X-Request-Id"]
    assert complete(stream=True).headers["X-Request-Id"]


def test_metrics_count_responses_by_route_not_by_path() -> None:
    async def scenario(client: TestClient) -> str:
        for path in ("/v1/models", "/made/up/1", "/made/up/2", "/v1/models/a"):
            await client.get(path)
        return await (await client.get("/metrics")).text()

    text = drive(scenario)
    assert 'pagedserve_http_responses_total{route="unknown",status="4xx"} 2.0' in text
    assert 'pagedserve_http_responses_total{route="/v1/models",status="2xx"} 1.0' in text
    assert "made" not in text


def test_metrics_come_in_the_format_asked_for() -> None:
    reply = call("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
    assert reply.body.endswith(b"# EOF\n")


def test_a_key_is_asked_for_but_by_probes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nalpha\nbeta\n")

    async def scenario(client: TestClient) -> None:
        for key, status in (("alpha", 200), ("beta", 200), ("gamma", 401), ("# ours", 401), ("", 401)):
            reply = await read(await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}))
            assert reply.status == status
        reply = await read(await client.get("/v1/models"))
        assert_error(reply, 401, "invalid_api_key")
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        for open_path in ("/health/live", "/health/ready", "/metrics"):
            assert (await client.get(open_path)).status == 200
        for closed in ("/openapi.json", "/nothing", "/health", "/metrics/x"):
            assert (await client.get(closed)).status == 401

    drive(scenario, config=EngineConfig(api_key_file=path))


def test_a_server_without_its_keys_does_not_start(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry

    config = EngineConfig(api_key_file=tmp_path / "missing")
    with pytest.raises(ConfigError, match="API_KEY_FILE"):
        create_app(config, FakeEngine(config), CollectorRegistry())


def test_a_request_is_one_log_line_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagedserve_engine")
    complete(prompt="a secret", stream=True)
    [record] = [record for record in caplog.records if record.getMessage() == "request"]
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["route"] == "/v1/completions"
    assert (fields["status"], fields["prompt_tokens"], fields["output_tokens"]) == (200, 9, 12)
    assert fields["duration_seconds"] >= fields["ttft_seconds"] >= 0
    assert "secret" not in repr(fields)


def test_a_failed_request_is_logged_by_its_code(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagedserve_engine")
    complete(temperature=9)
    [record] = [record for record in caplog.records if record.getMessage() == "request"]
    assert record.fields["error"] == "invalid_value"  # type: ignore[attr-defined]


def test_probes_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagedserve_engine")
    call("GET", "/health/live")
    assert caplog.records == []


def test_tokenize_and_detokenize_are_inverse() -> None:
    tokens = call("POST", "/tokenize", json={"prompt": "Grüße", "add_special_tokens": False}).json
    assert tokens["count"] == len(tokens["tokens"]) == 7
    assert tokens["max_model_len"] == 4096
    assert call("POST", "/detokenize", json={"tokens": tokens["tokens"]}).json == {"prompt": "Grüße"}


def test_tokenize_takes_a_conversation() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
    assert "".join(call("POST", "/tokenize", json=body).json["token_strs"]) == "<user>a"


def test_the_model_is_listed() -> None:
    [model] = call("GET", "/v1/models").json["data"]
    assert model["id"] == "org/fake"
    assert call("GET", "/v1/models/org/fake").json == model
