"""Starts engines as processes of their own, watches the time, and ends them by their own process group."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.adapters import Settings
from benchmarks.workloads import Request

ROOT = Path(__file__).parents[1]


class RunFailed(Exception):
    """An engine did not do what was asked; the message says what it said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How to start an engine: which adapter, in which environment."""

    name: str
    python: Path = Path(sys.executable)
    environment: dict[str, str] = field(default_factory=dict)


def environment_for(engine: Engine, threads: int) -> dict[str, str]:
    """The same threads for everybody, idle ones asleep rather than spinning, and no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **engine.environment,
    }


class Process:
    """A child with its own group, its output in a file; a context manager that leaves nothing running."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], *, piped: bool = False) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log")  # noqa: SIM115
        pipe = subprocess.PIPE if piped else None
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(15)
        self.signal(signal.SIGKILL)
        self.child.wait()
        self._log.close()

    def signal(self, number: int) -> None:
        """Send to the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def last_words(self, lines: int = 12) -> str:
        """The end of what the child printed."""
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-lines:])


class Worker:
    """An offline engine; stopped while it has nothing to do, so that no idle loop of a peer costs another time."""

    def __init__(self, engine: Engine, settings: Settings, *, limit_seconds: float) -> None:
        self.engine = engine
        command = [str(engine.python), "-m", "benchmarks.worker", engine.name, json.dumps(dataclasses.asdict(settings))]
        self.process = Process(command, environment_for(engine, settings.threads), piped=True)
        try:
            ready = self._answer(limit_seconds)
        except BaseException:
            self.close()
            raise
        self.load_seconds: float = ready["seconds"]
        self.versions: dict[str, str] = ready["versions"]
        self.process.signal(signal.SIGSTOP)

    def run(self, requests: list[Request], *, limit_seconds: float) -> dict[str, Any]:
        """Time the requests: ``seconds``, ``output_lens``, ``prompt_tokens_computed``. Raises RunFailed."""
        self.process.signal(signal.SIGCONT)
        line = json.dumps([dataclasses.asdict(request) for request in requests])
        try:
            assert self.process.child.stdin is not None
            self.process.child.stdin.write(line.encode() + b"\n")
            self.process.child.stdin.flush()
            return self._answer(limit_seconds)
        except BrokenPipeError as error:
            raise RunFailed(f"{self.engine.name} ended: {self.process.last_words()}") from error
        finally:
            self.process.signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the engine's processes."""
        self.process.__exit__()

    def _answer(self, limit_seconds: float) -> dict[str, Any]:
        line = _read_line(self.process.child, limit_seconds)
        if line is None:
            raise RunFailed(f"{self.engine.name} took longer than {limit_seconds:.0f} s")
        if not line:
            raise RunFailed(f"{self.engine.name} ended: {self.process.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunFailed(f"{self.engine.name}: {answer['error']}")
        return answer


def _read_line(child: subprocess.Popen[bytes], limit_seconds: float) -> bytes | None:
    """A line, an empty one at the end of the output, None when the time is over."""
    assert child.stdout is not None
    deadline, received = time.monotonic() + limit_seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(child.stdout.fileno(), 1 << 20)
            if not chunk:
                return b""
            received += chunk
    return received


@contextlib.contextmanager
def workers(
    engines: Sequence[Engine], settings: Settings, *, limit_seconds: float
) -> Iterator[dict[str, Worker | str]]:
    """Each engine loaded, or the reason why it is not; all are ended on the way out."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Worker | str] = {}
        for engine in engines:
            try:
                worker = Worker(engine, settings, limit_seconds=limit_seconds)
                stack.callback(worker.close)
                started[engine.name] = worker
                print(f"  {engine.name}: loaded in {worker.load_seconds:.1f} s", flush=True)
            except RunFailed as error:
                started[engine.name] = str(error)
                print(f"  {engine.name}: not compared: {error}", flush=True)
        yield started
