"""An engine without a model whose load a test steers: its ``/metrics`` are the real engine's instruments.

Run as a file, as the image of an engine on the node stand-in. ``POST /steer`` takes the fields of Load as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.stats import StepStats

PORT = 8080
BLOCKS = 101
"""A hundred to use and the null block."""


@dataclass(frozen=True)
class Load:
    """What the engine pretends: ``cache`` is the share of referenced blocks, ``hangs`` leaves /metrics unanswered."""

    waiting: int = 0
    running: int = 0
    queue_wait: float = 0.0
    cache: float = 0.0
    hangs: bool = False
    ready: bool = True


class Engine(ThreadingHTTPServer):
    """The server and its instruments; nothing moves but by steering."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.registry = CollectorRegistry()
        self.load = Load()
        self.scrapes = 0
        self.freed = threading.Event()
        self._metrics = EngineMetrics(self.registry, clock=lambda: 0.0)
        self.steer({})

    def steer(self, changes: dict[str, Any]) -> None:
        self.load = replace(self.load, **changes)
        if not self.load.hangs:
            self.freed.set()
            self.freed = threading.Event()
        used = round(self.load.cache * (BLOCKS - 1))
        self._metrics.observe_step(
            replace(
                StepStats.idle(num_blocks=BLOCKS),
                num_running=self.load.running,
                # The age of the oldest counts only where one waits.
                num_waiting=max(self.load.waiting, int(self.load.queue_wait > 0)),
                oldest_waiting_age=self.load.queue_wait,
                blocks_referenced=used,
                blocks_free=BLOCKS - 1 - used,
            )
        )


class Handler(BaseHTTPRequestHandler):
    """One request on a connection of its own."""

    server: Engine

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.server.scrapes += 1
            if self.server.load.hangs:
                self.server.freed.wait()
            return self._answer(200, generate_latest(self.server.registry))
        good = self.path != "/health/ready" or self.server.load.ready
        self._answer(200 if good else 503, b"{}")

    def do_POST(self) -> None:
        self.server.steer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(200, b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: probes would fill the log."""

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    engine = Engine(os.environ.get("HOST", "127.0.0.1"), PORT)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=engine.shutdown).start())
    engine.serve_forever(0.05)


if __name__ == "__main__":
    main()
