"""The operator's killer goes on where a turn finds nothing, and isn't silent where it can't go on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from e2e.installation import Installation
from e2e.killer import Killer
from e2e.providers.kind_plan import NOTHING_RUNS, KindPlan
from e2e.providers.provider import Provider, Unavailable

from control_client import ApiError

JSON = dict[str, Any]


class Target:
    """A provider and its operator: each kill ends as ``ends`` says, then well."""

    namespace = "system"

    def __init__(self, *ends: Exception) -> None:
        self.over = threading.Event()
        self._ends: Iterator[Exception] = iter(ends)

    def pods(self) -> list[JSON]:
        return [{"metadata": {"name": "first"}}]

    def leader(self) -> str | None:
        return None

    def kill(self, namespace: str, pod: str) -> None:
        end = next(self._ends, None)
        if end is None:
            self.over.set()
            return
        raise end


def killer(target: Target) -> Killer:
    return Killer(cast(Provider, target), cast(Installation, target), seconds=0.001)


def test_a_turn_that_finds_nothing_is_followed_by_others() -> None:
    gone = LookupError("nothing runs in it")
    target = Target(ProcessLookupError(), ConnectionResetError(), ApiError(503, {}), gone)
    with killer(target) as running:
        assert target.over.wait(60)
    assert running.kills
    assert set(running.kills) == {"first"}
    assert running.missed is gone


def test_what_ends_the_killer_is_raised() -> None:
    running = killer(Target(Unavailable("the node is gone")))
    with pytest.raises(Unavailable, match="the node is gone"):
        churn(running)


def churn(running: Killer) -> None:
    """As a scenario does that waits for kills; ends by what ends the killer."""
    with running:
        while True:
            running.check()
            time.sleep(0.001)


CRICTL = """#!/bin/sh
case "$1" in
ps) cat ids;;
inspect) [ $# = 6 ] && cat "pid-$6";;
esac
"""


def kill_on_node(folder: Path) -> int:
    """The exit status of what a node is told, with a crictl that knows the containers in the file ``ids``."""
    (folder / "crictl").write_text(CRICTL)
    (folder / "crictl").chmod(0o755)
    command = KindPlan().kill_pod("node", "system", "operator-0").command
    assert command[:3] == ("docker", "exec", "node")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command[3:], cwd=folder, env=environment).returncode


def test_on_kind_each_container_of_a_pod_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as one, subprocess.Popen(["sleep", "60"]) as two:
        (tmp_path / "ids").write_text("aa\nbb\n")
        (tmp_path / "pid-aa").write_text(f"{one.pid}\n")
        (tmp_path / "pid-bb").write_text(f"{two.pid}\n")
        assert kill_on_node(tmp_path) == 0
        assert (one.wait(), two.wait()) == (-signal.SIGKILL, -signal.SIGKILL)


def test_on_kind_a_pod_that_waits_for_its_restart_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "ids").touch()
    assert kill_on_node(tmp_path) == NOTHING_RUNS
