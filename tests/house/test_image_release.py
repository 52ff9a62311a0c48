"""A release of the images: what it is made from, what it refuses, and what it writes down."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fake_builder
from fake_builder import DIGEST, PUSHED, asked, option

ROOT = Path(__file__).parents[2]


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    return fake_builder.install(tmp_path, "docker")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a release is made from: a commit's tree, with the scripts and what they read."""
    tree = tmp_path / "tree"
    for name in (".gitignore", "engine/pyproject.toml", *(f".ci/images/{each}.py" for each in ("build", "release"))):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "-c", "user.name=A", "-c", "user.email=a@b.example", "commit", "--quiet", "--message", "All")
    return tree


def git(tree: Path, *words: str) -> str:
    # Of a hook's own repository, variables speak too.
    environment = {"PATH": os.environ["PATH"]}
    command = ["git", "-C", str(tree), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def release(tree: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return fake_builder.run(tree / ".ci/images/release.py", environment)


@pytest.mark.parametrize(("builder", "digest"), [("docker", DIGEST), ("podman", PUSHED)])
@pytest.mark.parametrize("base", ["example/base:1", "docker.io/library/python:3", "localhost:5000/base:1"])
def test_a_release_is_built_from_one_base_by_digest(
    clone: Path, builder: str, digest: str, base: str, tmp_path: Path
) -> None:
    environment = fake_builder.install(tmp_path, builder)
    done = release(clone, {**environment, "VERSION": "9.9", "BASE_IMAGE": base, "PUSH": "true"})
    assert done.returncode == 0, done.stderr
    builds = [words for words in asked(environment) if "--tag" in words]
    assert {f"BASE_IMAGE={base}@{DIGEST}"} == {option(words, "--build-arg")[0] for words in builds}
    said = json.loads((Path(environment["OUTPUT"]) / "release.json").read_text())
    assert said["revision"] == git(clone, "rev-parse", "HEAD")
    assert [row["name"] for row in said["images"]] == [
        "pagedserve/engine:9.9",
        "pagedserve/operator:9.9",
        "pagedserve/engine:9.9-cpu",
    ]
    assert {row["digest"] for row in said["images"]} == {digest}
    assert {row["sbomSha256"] for row in said["images"]} == {hashlib.sha256(fake_builder.SBOM.encode()).hexdigest()}
    assert [words[-1] for words in asked(environment) if words[1] == "push"] == [row["name"] for row in said["images"]]
    # Layers are gigabytes: whoever waits sees them go.
    assert (done.stdout.count("pull: layer 1"), done.stdout.count("push: layer 1")) == (1, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"REVISION": "abc"}, "REVISION is abc, but the tree is that of "),
        ({"FAKE_BUILDER_DIGESTS": "none"}, "has no digest: give its whole name, and push it to that registry first"),
        ({"FAKE_BUILDER_FAILS": "pull"}, "docker pull ended with 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_can_not_be_told_again_later_is_no_release(
    clone: Path, docker: dict[str, str], given: dict[str, str], said: str
) -> None:
    refused(release(clone, {**docker, **given}), docker, said)


@pytest.mark.parametrize("file", ["engine/pyproject.toml", "engine/untracked.py"])
def test_a_tree_that_is_no_commits_is_no_release(clone: Path, docker: dict[str, str], file: str) -> None:
    with (clone / file).open("a") as changed:
        changed.write("\n")
    for given in ({}, {"REVISION": git(clone, "rev-parse", "HEAD")}):
        refused(release(clone, {**docker, **given}), docker, f"changes that are not committed ({file})")


def test_a_tree_of_which_git_knows_nothing_is_no_release(clone: Path, docker: dict[str, str]) -> None:
    shutil.rmtree(clone / ".git")
    refused(release(clone, docker), docker, "git says of no commit that this is its tree")
    fake_builder.uninstall_git(docker)
    refused(release(clone, {**docker, "REVISION": "abc"}), docker, "install git")


def refused(done: subprocess.CompletedProcess[str], builder: dict[str, str], said: str) -> None:
    assert done.returncode == 1
    assert said in done.stderr
    assert not [words for words in asked(builder) if words[1] in ("build", "push")]
