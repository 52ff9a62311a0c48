"""Programs of the control plane as processes: logged, never outliving the tests, and explained when they fail."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STARTING_SECONDS = 120.0
"""Far more than a start takes, also where the machine is busy."""
ENDING_SECONDS = 30.0

# The end of its input means that the tests are gone, however they ended: then the program goes, too. (The kernel's own
# signal at a parent's death follows the thread that started the program, and tests restart programs from any thread.)
_GUARD = 'read -r line; kill -KILL "$0"'


class ProgramFailed(Exception):
    """A program ended early or did not become ready; the message ends with its log."""


class Program:
    """One process, started and stopped any number of times with the same arguments; its log grows over all of them."""

    def __init__(self, name: str, command: Sequence[str | Path], *, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = [str(part) for part in command]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> None:
        assert not self.running, f"{self.name} runs already"
        # A session of its own: Ctrl-C at the terminal is for the tests, which then stop their programs in order.
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self._folder), "TMPDIR": str(self._folder)},
            )
        guard = ["/bin/sh", "-c", _GUARD, str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def stop(self, *, kill: bool = False, seconds: float = ENDING_SECONDS) -> None:
        """End the process: by SIGTERM, and by SIGKILL after ``seconds``; by SIGKILL at once with ``kill``."""
        if self._process is None or self._guard is None:
            return
        # The guard first: afterwards the process id may belong to anybody.
        self._guard.kill()
        self._guard.communicate()
        if not kill:
            self._process.terminate()
            self.resume()
        try:
            self._process.wait(0 if kill else seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = self._guard = None

    def pause(self) -> None:
        """Hold the process (SIGSTOP): its connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def await_ready(self, ready: Callable[[], bool], *, seconds: float = STARTING_SECONDS) -> None:
        """Return once ``ready`` is true; raises ProgramFailed where the program ends or ``seconds`` pass first."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise ProgramFailed(f"{self.name} ended while it started; its log ends so:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProgramFailed(f"{self.name} is not ready after {seconds:.0f} s; its log ends so:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, f"{self.name} was not started"
        # Unlike os.kill, it spares whoever got the number of a process that ended.
        self._process.send_signal(number)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
