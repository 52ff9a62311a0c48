"""A group's process as the parent sees it: started early, told to go, listened to, and ended when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from benchmarks.processes import ROOT

GRACE_SECONDS = 8.0
"""After its own deadline a process may still finish the row that it is at."""


class NoDevice(Exception):
    """There is no device to measure; the message says what torch sees."""


class GroupProcess:
    """Runs one group; a context manager that leaves nothing running."""

    def __init__(self, group: str, *, device: str, scale: str, folder: Path, logs: Path) -> None:
        order = {"group": group, "device": device, "scale": scale, "folder": str(folder)}
        logs.mkdir(parents=True, exist_ok=True)
        self._log = (logs / f"{group}.log").open("w")
        self._group = group
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.ending = "not measured: the process ended before"
        """Why rows that did not come are missing."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(order)],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, name=f"listen-{group}", daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, seconds: float, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Let it go and yield its messages as they come. Raises NoDevice."""
        go = json.dumps({"seconds": seconds, "limits": limits}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            assert self._child.stdin is not None
            self._child.stdin.write(go)
            self._child.stdin.flush()
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.ending = f"not measured: {self._group} had {seconds:.0f} s"
                return
            if not line:
                self._say_how_it_ended()
                return
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise NoDevice(message["error"])
            yield message

    def close(self) -> None:
        """End the process and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(3)
        # What the group has started is gone as well: the pipe has ended.
        self._listener.join(3)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        if not self._listener.is_alive():
            self._child.stdout.close()
        self._log.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _say_how_it_ended(self) -> None:
        status = self._child.wait()
        if status == 0:
            return
        last = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-12:]
        print(f"  {self._group} ended with status {status}:", *last, sep="\n    ", flush=True)
        self.ending = f"not measured: the process ended with status {status}: {last[-1][:120] if last else ''}"


def environment(folder: Path) -> dict[str, str]:
    """The package from this tree, compiled artefacts in ``folder``, and no network."""
    path = [str(ROOT), str(ROOT / "engine"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
