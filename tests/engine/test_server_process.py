"""A server process's life: signals, loading, death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "serve_fake.py"
SECONDS = 60


@contextmanager
def process(*flags: str, **options: object) -> Iterator[tuple[subprocess.Popen[str], int | None]]:
    """The process and its port, None where it never listened."""
    command = [sys.executable, str(SCRIPT), json.dumps(options), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running, _port(running)
        finally:
            running.kill()


def _port(running: subprocess.Popen[str]) -> int | None:
    assert running.stderr is not None
    for line in running.stderr:
        if "listening on" in line:
            return int(line.rsplit(":", 1)[1].split('"')[0])
    return None


@contextmanager
def stream(port: int | None) -> Iterator[HTTPResponse]:
    """The response of a streaming completion."""
    with closing(HTTPConnection("127.0.0.1", port or 0, timeout=SECONDS)) as connection:
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "Hi", "stream": True}))
        with connection.getresponse() as response:
            yield response


def get(port: int | None, path: str) -> int:
    with closing(HTTPConnection("127.0.0.1", port or 0, timeout=SECONDS)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def test_a_signal_lets_streams_end_and_leaves_with_zero() -> None:
    with process(hold_after=3, release_on_drain=True) as (running, port), stream(port) as response:
        assert response.readline().startswith(b"data: ")
        running.send_signal(signal.SIGTERM)
        body = response.read()
        assert body.endswith(b"data: [DONE]\n\n")
        assert running.wait(SECONDS) == 0


def test_while_draining_probes_and_refusals_are_answered_and_a_second_signal_ends_it() -> None:
    with process(hold_after=3) as (running, port), stream(port) as response:
        assert response.readline().startswith(b"data: ")
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        assert any("draining" in line for line in running.stderr)
        assert get(port, "/health/live") == 200
        assert get(port, "/health/ready") == 503
        with stream(port) as refused:
            assert refused.status == 503
            assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
        running.send_signal(signal.SIGTERM)
        assert running.wait(SECONDS) == 128 + signal.SIGTERM


def test_a_signal_while_loading_does_not_wait_for_the_model() -> None:
    with process(loads_in_thread=True) as (running, port):
        assert get(port, "/health/live") == 200
        assert get(port, "/health/ready") == 503
        running.send_signal(signal.SIGINT)
        assert running.wait(SECONDS) == 0


def test_a_model_that_cannot_be_loaded_ends_the_process() -> None:
    with process(load_error="no such model") as (running, _):
        assert running.wait(SECONDS) == 1
        assert running.stderr is not None
        assert running.stderr.read().endswith("load: no such model\n")


def test_a_dead_core_answers_its_requests_and_ends_the_process() -> None:
    with process(dies=True, hold_after=0) as (running, port), stream(port) as response:
        assert b"the device failed" in response.read()
        assert running.wait(SECONDS) == 1
        assert running.stderr is not None
        assert "dead: the device failed" in running.stderr.read()
