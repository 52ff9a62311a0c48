"""The processes of ranks: what they are told, how a failure of any of them ends all, and that none outlives rank 0."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rank_entries
from pagedserve_engine import workers
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import DeviceFailedError, ModelLoadError
from pagedserve_engine.rank_process import Entry
from pagedserve_engine.workers import Workers

SUPPORT = Path(rank_entries.__file__).parent


@contextmanager
def started(entry: Entry) -> Iterator[Workers]:
    ranks = Workers(EngineConfig(tensor_parallel_size=2, log_level="error"), entry)
    try:
        yield ranks
    finally:
        ranks.close()
    assert not multiprocessing.active_children()


def connected(ranks: Workers) -> int:
    """The process id of rank 1, once tensors can be put together."""
    _, process = ranks.rank.exchange(None)
    ranks.rank.connect(torch.device("cpu"))
    return int(process)


def wait_until(holds: Callable[[], bool]) -> None:
    reached = threading.Event()
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        reached.wait(0.02)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_put_tensors_together_and_leave_nothing_when_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with started(rank_entries.add_up) as ranks:
        process = connected(ranks)
        # As they come to a whole group of processes: rank 0 decides what they mean.
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
        for _ in range(2):
            with ranks.guard():
                ranks.send(b"once more")
                assert ranks.collective.all_reduce(torch.full((3,), 2.0)).tolist() == [3.0, 3.0, 3.0]
        assert runs(process)
        ranks.check()
        assert list(tmp_path.iterdir())
    assert not runs(process)
    assert not list(tmp_path.iterdir())


def test_a_killed_rank_is_the_cause_of_what_fails_here_and_wakes_who_waits() -> None:
    with started(rank_entries.add_up) as ranks:
        process = connected(ranks)
        woken = threading.Event()
        ranks.on_failure(woken.set)
        os.kill(process, signal.SIGKILL)
        assert woken.wait(30)
        with pytest.raises(DeviceFailedError, match="rank 1 of 2 was killed by SIGKILL"):
            ranks.check()
        with pytest.raises(DeviceFailedError, match="SIGKILL"), ranks.guard():
            raise AssertionError("nothing is begun after a failure")


def test_a_rank_that_dies_under_a_sum_is_named_instead_of_the_sum() -> None:
    with started(rank_entries.add_up) as ranks:
        process = connected(ranks)
        threading.Timer(0.5, os.kill, (process, signal.SIGKILL)).start()
        with pytest.raises(DeviceFailedError, match="rank 1 of 2 was killed by SIGKILL"), ranks.guard():
            ranks.collective.all_reduce(torch.ones(3))


def test_a_rank_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(rank_entries.add_up) as ranks:
        process = connected(ranks)
        monkeypatch.setattr(workers, "STEP_SECONDS", 0.5)
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(DeviceFailedError, match=r"did not end on all 2 ranks within 0\.5 s"), ranks.guard():
            ranks.collective.all_reduce(torch.ones(3))


def test_what_keeps_a_rank_from_starting_is_raised_here() -> None:
    with (
        started(rank_entries.fail_to_load) as ranks,
        pytest.raises(ModelLoadError, match="the weights are gone") as raised,
        ranks.starting(),
    ):
        ranks.rank.exchange(None)
    assert raised.value.param == "model"


def test_a_rank_that_breaks_down_tells_why() -> None:
    with started(rank_entries.break_down) as ranks:
        ranks.rank.exchange(None)
        ranks.send(b"begin")
        woken = threading.Event()
        ranks.on_failure(woken.set)
        assert woken.wait(30)
        with pytest.raises(DeviceFailedError, match="rank 1 of 2 failed: a wire broke"):
            ranks.check()


_LEADER = """
import sys
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.workers import Workers
import rank_entries
if __name__ == "__main__":
    ranks = Workers(EngineConfig(tensor_parallel_size=2), rank_entries.add_up)
    print(ranks.rank.exchange(None)[1], flush=True)
    sys.stdin.read()
"""


def test_no_rank_outlives_a_killed_rank_0(tmp_path: Path) -> None:
    script = tmp_path / "leader.py"
    script.write_text(_LEADER)
    environ = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen(
        [sys.executable, script], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        process = int(leader.stdout.readline())
        assert runs(process)
        leader.kill()
    wait_until(lambda: not runs(process))
