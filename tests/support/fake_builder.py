"""A stand-in for docker, podman or buildah: writes down what it is asked, and leaves what a real one would leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

SBOM = '{"components": []}\n'
SIZES = {"pagedserve/engine:9.9": 3_000_000_000, "example/base:1": 100_000_000}
DIGEST = "sha256:" + "0" * 64
MIRRORS = "sha256:" + "1" * 64
"""The same image's in another repository."""
PUSHED = "sha256:" + "2" * 64
"""What podman's push makes of the image."""

PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_builder import main
sys.exit(main(sys.argv))
"""


def install(folder: Path, *names: str) -> dict[str, str]:
    """Put builders of these names alone on a PATH; returns the environment for a script."""
    programs = folder / "programs"
    programs.mkdir()
    for name in names:
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    git = shutil.which("git")
    assert git is not None
    (programs / "git").symlink_to(git)
    return {"PATH": str(programs), "FAKE_BUILDER_LOG": str(folder / "asked.jsonl"), "OUTPUT": str(folder / "out")}


def uninstall_git(environment: dict[str, str]) -> None:
    """As on a machine that has a builder and no git."""
    (Path(environment["PATH"]) / "git").unlink()


def run(script: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts to its end."""
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def asked(environment: dict[str, str]) -> list[list[str]]:
    """The command lines so far; probing for the builder left out."""
    rows = Path(environment["FAKE_BUILDER_LOG"]).read_text().splitlines()
    return [row for row in map(json.loads, rows) if row[1] not in ("version", "info")]


def option(words: list[str], name: str) -> list[str]:
    """Every value given to an option."""
    return [value for key, value in pairwise(words) if key == name]


def main(arguments: list[str]) -> int:
    """Answer like a builder; FAKE_BUILDER_FAILS names the command that fails."""
    words = [Path(arguments[0]).name, *arguments[1:]]
    with Path(os.environ["FAKE_BUILDER_LOG"]).open("a") as log:
        log.write(json.dumps(words) + "\n")
    if words[1] == os.environ.get("FAKE_BUILDER_FAILS"):
        print("it can't", file=sys.stderr)
        return 1
    if words[1] in ("pull", "push"):
        print(f"{words[1]}: layer 1 of 1")
    if words[1] == "from":
        print("working-container")
    if words[1] == "run":
        print(SBOM, end="")
    for file in option(words, "--digestfile"):
        Path(file).write_text(f"{PUSHED}\n")
    if words[1:3] == ["image", "inspect"]:
        print(json.dumps([{"Size": SIZES.get(words[3], 1), "RepoDigests": digests(words[3])}]))
    return 0


def digests(name: str) -> list[str]:
    """Of an image in each repository that it is known from, the one that ``name`` names being last."""
    if os.environ.get("FAKE_BUILDER_DIGESTS") == "none":
        return []
    repository = name.removeprefix("docker.io/").removeprefix("library/").rpartition(":")[0]
    return [f"mirror.example/{repository}@{MIRRORS}", f"{repository}@{DIGEST}"]
