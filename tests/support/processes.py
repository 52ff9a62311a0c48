"""A real server process, as an operator starts it, and the command line beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families

STARTING_SECONDS = 120.0
"""To listen, and then to load; far more than either takes, also where the machine is busy."""
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have OpenAI's shape."""
        document = self.json
        assert set(document) == {"error"}, document
        assert set(document["error"]) == {"message", "type", "param", "code"}, document
        error: dict[str, Any] = document["error"]
        return error


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    status: int
    out: str
    log: str

    @property
    def last_line(self) -> str:
        """The last line of standard error, where the reason stands."""
        return self.log.strip().splitlines()[-1]


def run_engine(*arguments: str, timeout: float = STARTING_SECONDS) -> Ended:
    """Run ``pagedserve-engine`` with ``arguments`` to its end."""
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, env=_environment(), timeout=timeout)
    return Ended(done.returncode, done.stdout, done.stderr)


class Server:
    """``pagedserve-engine serve`` on a free port; entered, it is ready, and left, it is gone.

    Settings are the engine's: ``max_queue=1`` is the flag ``--max-queue 1``. Where it doesn't become ready in time, its
    log is the error.
    """

    def __init__(self, model: Path, **settings: object) -> None:
        settings = {"host": "127.0.0.1", "port": 0, "dtype": "float32", "model": model, **settings}
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self._arguments = ("serve", *flags)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._over = False
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            _command(*self._arguments), stderr=subprocess.PIPE, text=True, env=_environment()
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self.url = self.wait_for_line("listening on ").split("listening on ")[1].strip()
            self.wait_for_line(" serving ")
            answer = self.get("/health/ready")
            assert answer.status == 200, answer
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if error is not None:
            error.add_note(f"the server's log:\n{self.log[-4000:]}")

    @property
    def log(self) -> str:
        """Standard error so far."""
        with self._news:
            return "".join(self._lines)

    def wait_for_line(self, part: str) -> str:
        """The first line of the log with ``part`` in it."""
        with self._news:
            found = self._news.wait_for(
                lambda: self._over or any(part in line for line in self._lines), STARTING_SECONDS
            )
            line = next((line for line in self._lines if part in line), None)
        assert found, f"no line with {part!r} came in time:\n{self.log}"
        assert line is not None, f"the process ended without a line with {part!r}:\n{self.log}"
        return line

    def client(self, **options: Any) -> OpenAI:
        """The official client; close it, or use it as a context."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        # A client of its own keeps proxies of the environment out.
        return OpenAI(base_url=f"{self.url}/v1", http_client=DefaultHttpxClient(trust_env=False), **options)

    def get(self, path: str, **headers: str) -> Answer:
        """GET ``path``."""
        return self._send(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: object, **headers: str) -> Answer:
        """POST ``body`` as JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return self._send(urllib.request.Request(self.url + path, data, headers, method="POST"))

    def metrics(self) -> dict[str, float]:
        """Every sample by its name, without the prefix; labels follow as ``name{label=value}``."""
        text = self.get("/metrics", Accept="text/plain").body.decode()
        return {
            _sample_name(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics once no sequence runs, waits or holds a block."""
        for _ in range(2000):
            values = self.metrics()
            if not values["requests_running"] + values["requests_waiting"] + values["blocks_referenced"]:
                return values
        raise AssertionError(f"the server is still busy: {values}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> Ended:
        """Send the signal and wait for the end."""
        self._process.send_signal(number)
        status = self._process.wait(ENDING_SECONDS)
        self._reader.join(ENDING_SECONDS)
        return Ended(status, "", self.log)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(ENDING_SECONDS)
        self._reader.join(ENDING_SECONDS)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with _OPENER.open(request, timeout=60) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _sample_name(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f"{label}={value}" for label, value in sorted(labels.items()))
    return name.removeprefix("pagedserve_") + (f"{{{inside}}}" if inside else "")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pagedserve_engine", *arguments]


def _environment() -> dict[str, str]:
    """What a fresh shell has; settings of this one's environment would change the test."""
    kept = ("HOME", "PATH", "XDG_CACHE_HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    return {"HF_HUB_OFFLINE": "1", **{name: os.environ[name] for name in kept if name in os.environ}}
