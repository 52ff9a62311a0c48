"""The project's images as containers, where Docker or podman and the images are there."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VERSION = tomllib.loads((Path(__file__).parents[2] / "engine/pyproject.toml").read_text())["project"]["version"]
ENGINES = os.environ.get("ENGINE_IMAGE", f"pagedserve/engine:{VERSION} pagedserve/engine:{VERSION}-cpu").split()
"""For CUDA, which runs on processors too, and for processors alone; each is tested where it is."""
OPERATOR = os.environ.get("OPERATOR_IMAGE", f"pagedserve/operator:{VERSION}")
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
"""What the pods' security context asks for."""
SECONDS = 180.0
"""To start, to load and to leave; far more than it takes."""


@dataclass(frozen=True)
class Container:
    """One that was started; it is removed by who started it."""

    program: str
    identity: str

    @property
    def logs(self) -> str:
        done = subprocess.run([self.program, "logs", self.identity], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    @property
    def is_running(self) -> bool:
        return bool(_inspect(self.program, "container", self.identity)["State"]["Running"])

    def await_log(self, text: str) -> str:
        """The logs, once they hold ``text``."""
        deadline = time.monotonic() + SECONDS
        while text not in (logs := self.logs):
            assert self.is_running, logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.1)
        return logs

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        command = [self.program, "exec", self.identity, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)

    def signal(self, name: str) -> None:
        """Send the first process a signal."""
        subprocess.run([self.program, "kill", "--signal", name, self.identity], capture_output=True, check=True)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        command = [self.program, "wait", self.identity]
        return int(subprocess.run(command, capture_output=True, timeout=SECONDS, check=True).stdout)


@dataclass(frozen=True)
class Image:
    """One that is there."""

    program: str
    name: str

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """How it says that it is run."""
        found: dict[str, Any] = _inspect(self.program, "image", self.name)["Config"]
        return found

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return int(_inspect(self.program, "image", self.name)["Size"])

    def run(self, *words: str, options: tuple[str, ...] = (), text: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end, as the pods would."""
        command = [
            self.program,
            "run",
            "--rm",
            "--interactive",
            "--network",
            "none",
            *HARDENED,
            *options,
            self.name,
            *words,
        ]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)

    def shell(self, script: str) -> str:
        """What a shell inside prints."""
        done = self.run("-c", script, options=("--entrypoint", "/bin/sh"))
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def started(self, *words: str, options: tuple[str, ...] = ()) -> Iterator[Container]:
        """A container on this machine's network, removed at the end."""
        command = [self.program, "run", "--detach", "--network", "host", *HARDENED, *options, self.name, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        container = Container(self.program, done.stdout.strip())
        try:
            yield container
        finally:
            removal = [self.program, "rm", "--force", "--volumes", container.identity]
            subprocess.run(removal, capture_output=True, check=True)


def image(name: str) -> Image:
    """The image of that name; skips where containers or the image are missing."""
    program = _program()
    if program is None:
        pytest.skip("neither Docker's daemon nor podman answers")
    if subprocess.run([program, "image", "inspect", name], capture_output=True, check=False).returncode:
        pytest.skip(f"there is no image {name}: `make images` builds it")
    return Image(program, name)


@functools.cache
def _program() -> str | None:
    for name, probe in (("docker", ("version", "--format", "{{.Server.Version}}")), ("podman", ("version",))):
        if shutil.which(name) and subprocess.run([name, *probe], capture_output=True, check=False).returncode == 0:
            return name
    return None


def _inspect(program: str, kind: str, name: str) -> Any:
    done = subprocess.run([program, kind, "inspect", name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[0]
