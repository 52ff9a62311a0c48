"""One container as a local process: started, probed, restarted and ended as a kubelet does it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from node_probes import Watch
from node_spec import JSON, NotYet, probe_of

# The end of its input means that the tests are gone, however they ended: then the container goes with all its children.
_GUARD = 'read -r line; kill -s KILL -- "-$0"'
_LOG_TAIL = 2048
_LATER = ("livenessProbe", "readinessProbe")


def now() -> str:
    """This moment as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to run, with which environment."""

    command: Sequence[str]
    environment: Mapping[str, str]


@dataclass(eq=False, kw_only=True)
class Container:
    """A container of a pod at ``address``; ``tick`` moves it on. ``prepare`` raises NotYet while it can't be made.

    Back-off starts with ``backoff`` seconds at the second restart and doubles up to eight times that.
    """

    spec: JSON
    address: str
    folder: Path
    prepare: Callable[[], Launch]
    restarts_on: Callable[[int], bool]
    grace: float
    backoff: float
    hurry: float
    restarts: int = 0
    waiting: JSON = field(default_factory=lambda: {"reason": "ContainerCreating"})
    terminated: JSON | None = None
    last: JSON | None = None
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log"
        self.message_file = self.folder / "termination-log"
        self._next_start = 0.0
        self._watches: dict[str, Watch] = {}
        self._kill_at: float | None = None
        self._term_at: float | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def done(self) -> bool:
        """Whether it has ended for good."""
        return self.terminated is not None and not self.running

    @property
    def started(self) -> bool:
        return self.running and self._passing("startupProbe", otherwise=True)

    @property
    def ready(self) -> bool:
        return self.started and self._passing("readinessProbe", otherwise=True)

    @property
    def pid(self) -> int | None:
        """The process that stands for it, while it runs."""
        return self._process.pid if self._process else None

    def tick(self, moment: float) -> None:
        """Start it if it is time, look whether it has ended, probe it, and bring its end about once that was asked."""
        if self._process is None:
            if self.terminated is None and moment >= self._next_start:
                self._start(moment)
            return
        if self._process.poll() is not None:
            return self._ended(moment)
        if self._kill_at is not None:
            return self._hurry_end(moment)
        self._probe(moment)

    def leave(self, moment: float, grace: float) -> None:
        """End it for good: its preStop sleep, SIGTERM, and SIGKILL when ``grace`` seconds are over."""
        self.restarts_on = lambda _: False
        if self._process is None:
            self.terminated = self.terminated or self.last or {"exitCode": 137, "reason": "ContainerStatusUnknown"}
        self._ask_to_end(moment, grace)

    def kill(self) -> None:
        """End it now, with its children."""
        if self._process is not None:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            self._free()

    def status(self) -> JSON:
        """Its entry in the pod's status."""
        if self._process is not None:
            state: JSON = {"running": {"startedAt": self._started_at}}
        elif self.terminated is not None:
            state = {"terminated": self.terminated}
        else:
            state = {"waiting": self.waiting}
        return {
            "name": self.spec["name"],
            "image": self.spec["image"],
            "imageID": "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": state,
            "lastState": {"terminated": self.last} if self.last else {},
        }

    def _start(self, moment: float) -> None:
        try:
            launch = self.prepare()
        except NotYet as missing:
            self.waiting = {"reason": missing.reason, "message": str(missing)}
            return
        self.message_file.write_text("")
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    list(launch.command),
                    env=dict(launch.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                self.waiting = {"reason": "RunContainerError", "message": str(error)}
                self._next_start = moment + self.backoff
                return
        guard = ["/bin/sh", "-c", _GUARD, str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self._started_at = now()
        probes = {name: probe_of(self.spec, name, hurry=self.hurry) for name in ("startupProbe", *_LATER)}
        self._watches = {name: Watch(probe, moment + probe.initial_delay) for name, probe in probes.items() if probe}

    def _probe(self, moment: float) -> None:
        startup = self._watches.get("startupProbe")
        if startup is not None and not startup.passing:
            startup.ask(self.address, moment)
            if startup.passing is False:
                self._ask_to_end(moment, self.grace)
            return
        for name in _LATER:
            if name in self._watches:
                self._watches[name].ask(self.address, moment)
        if not self._passing("livenessProbe", otherwise=True, unknown=True):
            self._ask_to_end(moment, self.grace)

    def _ask_to_end(self, moment: float, grace: float) -> None:
        handler = self.spec.get("lifecycle", {}).get("preStop", {})
        pause = min(handler.get("sleep", {}).get("seconds", 0), grace)
        self._kill_at = moment + grace
        self._term_at = moment + pause

    def _hurry_end(self, moment: float) -> None:
        assert self._process is not None
        assert self._kill_at is not None
        # The readiness that endpoints see is probed to the end.
        if self.started and "readinessProbe" in self._watches:
            self._watches["readinessProbe"].ask(self.address, moment)
        if self._term_at is not None and moment >= self._term_at:
            self._term_at = None
            self._process.terminate()
        if moment >= self._kill_at:
            self._process.kill()

    def _ended(self, moment: float) -> None:
        assert self._process is not None
        code = self._process.returncode
        code = 128 - code if code < 0 else code
        ended = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "startedAt": self._started_at,
            "finishedAt": now(),
        }
        if message := self._message(code):
            ended["message"] = message
        self._signal_group(signal.SIGKILL)
        self._free()
        self._kill_at = self._term_at = None
        if not self.restarts_on(code):
            self.terminated = ended
            return
        self.last = ended
        pause = 0.0 if self.restarts == 0 else self.backoff * min(2 ** (self.restarts - 1), 8)
        self.restarts += 1
        self._next_start = moment + pause
        name = self.spec["name"]
        self.waiting = {
            "reason": "CrashLoopBackOff",
            "message": f"back-off {pause:g}s restarting failed container={name}",
        }

    def _message(self, code: int) -> str:
        message = self.message_file.read_text(errors="replace")[-4096:]
        if not message and code and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = self.log.read_text(errors="replace")[-_LOG_TAIL:]
        return message

    def _passing(self, name: str, *, otherwise: bool, unknown: bool = False) -> bool:
        watch = self._watches.get(name)
        if watch is None:
            return otherwise
        return unknown if watch.passing is None else watch.passing

    def _signal_group(self, number: int) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _free(self) -> None:
        self._guard.kill()
        self._guard.communicate()
        self._process = None
        self._watches = {}
