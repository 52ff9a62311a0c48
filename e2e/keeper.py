"""Holds the local cluster of the demo in a process of its own, so that it can outlive the story.

It ends, and leaves nothing, when its standard input does (the demo's own end, however that came), unless it has read
the line ``keep`` from it before; then SIGTERM ends it, which is what `make demo-down` sends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from e2e.providers.local import Local
from e2e.providers.provider import Unavailable

ROOT = Path(__file__).parents[1]
STARTING_SECONDS = 180.0
ENDING_SECONDS = 90.0


def state_file() -> Path:
    """What is known of the cluster that runs: its kubeconfig, and who holds it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pagedserve" / "demo.json"


def kept() -> dict[str, Any] | None:
    """The cluster that is held now; None where none is."""
    try:
        state: dict[str, Any] = json.loads(state_file().read_text())
        command = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return state if b"e2e.keeper" in command else None


def release(state: dict[str, Any]) -> None:
    """End the cluster, and wait until all of it is gone."""
    os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + ENDING_SECONDS
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.1)


class Keeper:
    """The process, started and told when to go."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Path:
        """The kubeconfig of the cluster, once it runs; raises Unavailable with the reason where it doesn't."""
        state_file().parent.mkdir(parents=True, exist_ok=True)
        log = state_file().with_suffix(".log")
        with log.open("w") as told:
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
                raise Unavailable(log.read_text().strip() or f"no cluster after {STARTING_SECONDS:.0f} s")
            time.sleep(0.1)
        return Path(state["kubeconfig"])

    def stop(self, *, keep: bool) -> None:
        """Let it go, or ``keep`` it for `make demo-down`."""
        if self._process is None or self._process.poll() is not None:
            return
        assert self._process.stdin is not None
        if keep:
            self._process.stdin.write("keep\n")
        self._process.stdin.close()
        if not keep:
            self._process.wait(ENDING_SECONDS)


def main() -> int:
    """Hold the cluster until it is time."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    threading.Thread(target=_follow_input, args=(over,), daemon=True).start()
    try:
        with Local(hurry=1.0) as provider:
            provider.add_node(labels={})
            state = {"pid": os.getpid(), "kubeconfig": str(provider.cluster.kubeconfig)}
            scratch = state_file().with_suffix(".new")
            scratch.write_text(json.dumps(state))
            scratch.replace(state_file())
            over.wait()
    except Unavailable as error:
        print(error)
        return 1
    finally:
        state_file().unlink(missing_ok=True)
    return 0


def _follow_input(over: threading.Event) -> None:
    if sys.stdin.readline() != "keep\n":
        over.set()


if __name__ == "__main__":
    sys.exit(main())
