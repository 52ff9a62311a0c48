"""Holds the local cluster of the demo in a process of its own, so that it can outlive the story.

It ends, and leaves nothing, when its standard input does (the demo's own end, however that came), unless it has read
the line ``keep`` from it before; then SIGTERM ends it, which is what `make demo-down` sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from e2e.providers.local import Local
from e2e.providers.provider import Unavailable

_SAID = 1 << 16
ROOT = Path(__file__).parents[1]
STARTING_SECONDS = 180.0
ENDING_SECONDS = 90.0
RUNS = "a demo's cluster runs already: `make demo-down` ends it"


def state_file() -> Path:
    """What is known of the cluster that runs: its kubeconfig, and who holds it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pagedserve" / "demo.json"


@contextmanager
def alone() -> Iterator[None]:
    """One cluster at a time, as long as this is entered or its process lives; raises Unavailable where one runs."""
    state_file().parent.mkdir(parents=True, exist_ok=True)
    with state_file().with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise Unavailable(RUNS) from taken
        yield


def kept() -> dict[str, Any] | None:
    """The cluster that is held now; None where none is."""
    try:
        state: dict[str, Any] = json.loads(state_file().read_text())
        command = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return state if b"e2e.keeper" in command else None


def release(state: dict[str, Any], *, seconds: float = ENDING_SECONDS) -> None:
    """End the cluster, and wait until all of it is gone; raises Unavailable where some of it stays."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while is_held():
        if time.monotonic() > deadline:
            raise Unavailable(_stays(state["pid"]))
        time.sleep(0.1)


def is_held() -> bool:
    """Whether a process holds a cluster, or is about to."""
    try:
        with alone():
            return False
    except Unavailable:
        return True


def _stays(pid: int) -> str:
    return f"the local cluster isn't gone: process {pid} doesn't end"


class Keeper:
    """The process, started and told when to go."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Path:
        """The kubeconfig of the cluster, once it runs; raises Unavailable with the reason where it doesn't."""
        # Its own, as a second demo's says why that one doesn't start.
        with tempfile.TemporaryFile() as told:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "e2e.keeper"],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=told,
                text=True,
                cwd=ROOT,
                # Ctrl-C is for the story, which then ends this in order.
                start_new_session=True,
            )
            deadline = time.monotonic() + STARTING_SECONDS
            while (state := kept()) is None or state["pid"] != self._process.pid:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = os.pread(told.fileno(), _SAID, 0).decode(errors="replace").strip()
                    raise Unavailable(said or f"no cluster after {STARTING_SECONDS:.0f} s")
                time.sleep(0.1)
        return Path(state["kubeconfig"])

    def stop(self, *, keep: bool) -> None:
        """Let it go, or ``keep`` it for `make demo-down`."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        # One that is gone already reads nothing.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as line:
            line.write("keep\n" if keep else "")
        if keep:
            return
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired as stuck:
            raise Unavailable(_stays(self._process.pid)) from stuck


def main() -> int:
    """Hold the cluster until it is time."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    threading.Thread(target=_follow_input, args=(over,), daemon=True).start()
    try:
        with alone():
            _hold(over)
    except Unavailable as error:
        print(error)
        return 1
    return 0


def _hold(over: threading.Event) -> None:
    """The cluster, until it is over; the state file is ours as long as the lock is."""
    try:
        with Local(hurry=1.0, autoscaler_seconds=2.0) as provider:
            provider.add_node(labels={})
            state = {"pid": os.getpid(), "kubeconfig": str(provider.cluster.kubeconfig)}
            scratch = state_file().with_suffix(".new")
            scratch.write_text(json.dumps(state))
            scratch.replace(state_file())
            over.wait()
    finally:
        state_file().unlink(missing_ok=True)


def _follow_input(over: threading.Event) -> None:
    if sys.stdin.readline() != "keep\n":
        over.set()


if __name__ == "__main__":
    sys.exit(main())
