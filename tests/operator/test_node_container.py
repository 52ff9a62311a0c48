"""A container of the node stand-in never outlives the tests, and neither does what it started."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

from node_container import Container, Launch

PARENT = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"


def test_the_guard_takes_a_containers_children_along(tmp_path: Path) -> None:
    launch = Launch(command=[sys.executable, "-c", PARENT], environment={"PATH": "/usr/bin:/bin"})
    container = Container(
        spec={"name": "engine", "image": "engine"},
        address="127.0.0.1",
        folder=tmp_path,
        prepare=lambda: launch,
        restarts_on=lambda _: False,
        grace=1,
        backoff=1,
        hurry=1,
    )
    container.tick(0)
    try:
        child = first_line(container.log)
        # As where the tests are gone: nobody holds the guard's input any more.
        assert container._guard.stdin is not None
        container._guard.stdin.close()
        assert container._guard.wait(30) == 0
        await_end(int(child))
    finally:
        container.kill()


def first_line(log: Path) -> str:
    deadline = time.monotonic() + 30
    while not (told := log.read_text()).endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return told


def await_end(pid: int) -> None:
    """Until nothing of the process is left but its exit status, which may be nobody's to read."""
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
