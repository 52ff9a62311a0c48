"""An engine without a model, for what isn't about models: ready at once, a few megabytes, the engine's HTTP contract.

Standard library only and run as a file, so that twenty of them start in a moment. Its answers are the words of a count,
one for each token, ``TOKEN_SECONDS`` apart; SIGTERM makes it unready and lets running answers end.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_SECONDS = 0.005


class Engine(ThreadingHTTPServer):
    """The server, and how many answers it is giving."""

    # Those that end answer their last request first.
    daemon_threads = False
    block_on_close = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.draining = False
        self.running = 0
        self.lock = threading.Lock()

    def leave(self, *_: object) -> None:
        """Take nothing more; ``serve_forever`` returns, and closing waits for what runs."""
        self.draining = True
        threading.Thread(target=self.shutdown).start()


class Handler(BaseHTTPRequestHandler):
    """One request on a connection of its own."""

    server: Engine

    def do_GET(self) -> None:
        """Health pages, metrics, models."""
        if self.path == "/metrics":
            return self._answer(200, f"pagedserve_requests_running {self.server.running}\n".encode(), "text/plain")
        if self.path == "/v1/models":
            return self._json(200, {"object": "list", "data": [{"id": "light", "object": "model"}]})
        ready = not self.server.draining or self.path == "/health/live"
        self._json(200 if ready else 503, {"status": "ok" if ready else "draining"})

    def do_POST(self) -> None:
        """A completion, whole or streamed."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.draining:
            error = {"message": "the engine is draining", "type": "server_error", "param": None, "code": "draining"}
            return self._json(503, {"error": error})
        with self.server.lock:
            self.server.running += 1
        try:
            self._complete(asked)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: probes would fill the log."""

    def _complete(self, asked: dict[str, Any]) -> None:
        if not asked.get("stream"):
            return self._json(200, _chunk("".join(_words(asked)), "length"))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in _words(asked):
            self._event(json.dumps(_chunk(word, None)))
        self._event(json.dumps(_chunk("", "length")))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._answer(status, json.dumps(body).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _words(asked: dict[str, Any]) -> Iterator[str]:
    pause = threading.Event()
    for number in range(asked.get("max_tokens") or 16):
        pause.wait(TOKEN_SECONDS)
        yield f" {number}"


def _chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "light", "object": "text_completion", "created": 0, "model": "light", "choices": [choice]}


def main() -> None:
    """Serve until SIGTERM."""
    server = Engine(os.environ["HOST"], int(os.environ.get("PORT", "8080")))
    signal.signal(signal.SIGTERM, server.leave)
    with server:
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
