"""The commands by which docs/resource.md installs, on the real helm and kustomize."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from documents import ROOT, Document, commands, files
from helm_program import Helm, find_helm, find_kubectl
from manifest_files import Manifests, by_place, container

PAGE = Document(ROOT / "docs" / "resource.md")
COMMANDS = [shlex.split(command) for block in PAGE.blocks for command, _ in commands(block)]
PREFIX = "registry.example/pagedserve"


def started(*words: str) -> list[list[str]]:
    """The page's commands that begin so, without these words."""
    return [command[len(words) :] for command in COMMANDS if command[: len(words)] == list(words)]


def images(manifests: Manifests) -> set[str]:
    """Of the operator and, by default, of engines."""
    found = container(manifests)
    (engine,) = [row["value"] for row in found["env"] if row["name"] == "ENGINE_IMAGE"]
    return {found["image"], engine}


def kustomized(folder: Path) -> Manifests:
    command = [str(find_kubectl()), "kustomize", str(folder)]
    return by_place(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_images_are_pushed_where_both_ways_look_for_them(tmp_path: Path) -> None:
    assert [f"IMAGE_PREFIX={PREFIX}"] in started("make", "images")
    pushed = {name for (name,) in started("docker", "push")}
    helm = Helm(find_helm(), tmp_path / "helm")
    by_helm, on_kind = [images(templated(helm, words)) for words in started("helm", "install")]
    assert by_helm == pushed
    assert on_kind == set(*started("kind", "load", "docker-image"))
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    (tmp_path / "crds").symlink_to(ROOT / "crds")
    (tmp_path / "kustomization.yaml").write_text(files()["kustomization.yaml"], encoding="utf-8")
    assert images(kustomized(tmp_path)) == pushed


def templated(helm: Helm, words: list[str]) -> Manifests:
    """What an installation would apply."""
    assert words[:2] == ["pagedserve", "manifests/helm/pagedserve"]
    return helm.template(*(word for word in words[4:] if word != "--create-namespace"))


def test_every_upgrade_by_helm_keeps_the_values_that_were_given() -> None:
    for page in ("docs/resource.md", "docs/guide/upgrading.md"):
        blocks = Document(ROOT / page).blocks
        upgrades = [command for block in blocks for command, _ in commands(block) if command.startswith("helm upgrade")]
        assert upgrades, page
        assert all("--reset-then-reuse-values" in shlex.split(command) for command in upgrades), page
