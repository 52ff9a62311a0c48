"""The control plane is built once per lock, whole or not at all; a stand-in for Go compiles in no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.controlplane import build

SCRIPT = Path(build.__file__)
GO = """#!/bin/sh
case "$1" in
env) echo go{version};;
build)
    echo "$@" >> {calls}
    echo "k8s.io/fine" >&2
    [ -z "{failure}" ] || {{ echo "{failure}" >&2; exit 1; }}
    while [ "$1" != -o ]; do shift; done
    mkdir -p "$2"
    for name in server kube-apiserver kube-controller-manager kube-scheduler kubectl kwok; do
        echo "$CGO_ENABLED" > "$2$name"
    done;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own and a Go of its own, which writes down each build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'go'}:{os.environ['PATH']}")
    _put_go(tmp_path)
    return tmp_path / "calls"


def test_the_programs_are_built_once_and_named_as_they_are_known(calls: Path) -> None:
    first, second = _run(), _run()
    assert first.returncode == second.returncode == 0
    home = Path(second.stdout.strip())
    assert sorted(path.name for path in home.iterdir()) == sorted(build.PROGRAMS)
    assert build.built() == home
    assert build.is_complete(home)
    assert len(calls.read_text().splitlines()) == 1
    assert "gitVersion=v1." in calls.read_text()
    assert (home / "etcd").read_text() == "0\n"


def test_two_builders_at_once_build_once(calls: Path) -> None:
    builders = [subprocess.Popen([sys.executable, str(SCRIPT)], stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [builder.wait(60) for builder in builders] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == 1


def test_a_build_that_fails_says_why_and_leaves_nothing(calls: Path, tmp_path: Path) -> None:
    _put_go(tmp_path, failure="no space left")
    done = _run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "go could not build controlplane:"
    assert done.stderr.splitlines()[-1] == "no space left"
    assert [path.name for path in build.cache().iterdir()] == ["build.lock"]


def test_a_changed_lock_is_another_control_plane(tmp_path: Path) -> None:
    module = _copy_module(tmp_path / "controlplane")
    assert build.built(module) == build.built()
    with (module / "go.sum").open("a") as lock:
        lock.write("example.org/other v1.0.0 h1:AAAA=\n")
    assert build.built(module) != build.built()


def test_other_modules_are_built_beside_the_control_plane(calls: Path, tmp_path: Path) -> None:
    other = _copy_module(tmp_path / "other")
    (other / "go.mod").write_text("module example.org/other\n\ngo 1.26.0\n")
    both = _run(str(other), str(build.CONTROL_PLANE))
    first, second = (Path(line) for line in both.stdout.splitlines() if line.startswith("/"))
    assert (first, second) == (build.built(other), build.built())
    assert first.parent.parent.name == "other"
    ran = calls.read_text().splitlines()
    assert ["gitVersion" in command for command in ran] == [False, True]


def test_a_go_that_is_too_old_is_not_used(calls: Path, tmp_path: Path) -> None:
    _put_go(tmp_path, version="1.19.1")
    # The pinned Go is there already, so that nothing is installed.
    _put_go(build.cache().parent, folder=f"go-{build.GO_PINNED}/bin", calls=tmp_path / "other calls")
    assert _run().returncode == 0
    assert not calls.exists()
    assert (tmp_path / "other calls").exists()


def _run(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *modules], capture_output=True, text=True, timeout=60)


def _copy_module(folder: Path) -> Path:
    folder.mkdir()
    for name in ("go.mod", "go.sum"):
        (folder / name).write_bytes((build.CONTROL_PLANE / name).read_bytes())
    return folder


def _put_go(
    top: Path, *, folder: str = "go", version: str = "1.99.0", failure: str = "", calls: Path | None = None
) -> None:
    go = top / folder / "go"
    go.parent.mkdir(parents=True, exist_ok=True)
    go.write_text(GO.format(version=version, failure=failure, calls=f"'{calls or top / 'calls'}'"))
    go.chmod(0o755)
