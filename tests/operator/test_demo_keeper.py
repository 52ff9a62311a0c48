"""The demo's local cluster is held once, and whoever ends it says what is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.demo import main
from e2e.keeper import RUNS, Keeper, alone, kept, release, state_file
from e2e.providers.provider import Unavailable
from e2e.stage import CLUSTER, kind_folder

from fake_kind import FakeKind


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def test_a_second_keeper_says_that_one_runs_and_leaves_its_state() -> None:
    with alone():
        state_file().write_text(json.dumps({"pid": 1, "kubeconfig": "elsewhere"}))
        second = Keeper()
        with pytest.raises(Unavailable, match=RUNS):
            second.start()
        second.stop(keep=False)
        assert json.loads(state_file().read_text())["kubeconfig"] == "elsewhere"
        with pytest.raises(Unavailable, match=RUNS), alone():
            pass
    with alone():
        assert kept() is None, "process 1 is no keeper"


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKind:
    fake = FakeKind(tmp_path / "programs")
    monkeypatch.setenv("PATH", str(fake.folder), prepend=os.pathsep)
    return fake


def test_down_says_that_nothing_runs_where_nothing_does(kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    kind.add("somebody-elses")
    assert main(["down"]) == 0
    assert capsys.readouterr().out == "No demo runs\n"
    assert kind.clusters == ["somebody-elses"]


def test_down_deletes_the_demos_kind_cluster_alone(kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    kind.add("somebody-elses")
    kind.add(CLUSTER)
    kind_folder().mkdir(parents=True)
    assert main(["down"]) == 0
    assert not kind_folder().exists()
    assert capsys.readouterr().out == "The kind cluster is gone\n"
    assert kind.clusters == ["somebody-elses"]


def test_down_fails_in_one_line_where_the_cluster_stays(kind: FakeKind, capsys: pytest.CaptureFixture[str]) -> None:
    kind.add(CLUSTER)
    kind.tell("kind", "delete", "echo no permission >&2; exit 1")
    assert main(["down"]) == 1
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    assert line.startswith("demo-down failed: delete the cluster")
    assert line.endswith("no permission")


def test_release_fails_where_the_keeper_stays() -> None:
    stubborn = [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); input()"]
    with alone(), subprocess.Popen(stubborn, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Unavailable, match=f"isn't gone: process {process.pid}"):
            release({"pid": process.pid}, seconds=0)
        process.kill()
