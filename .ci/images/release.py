"""Builds a release's images from one base, pinned by the digest that its tag has today.

A release is what a commit says, so the tree must be that commit's and nothing else. Settings are those of build.py, and
PUSH=true. dist/images/release.json names base, images and SBOMs by digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from build import BuildError, Settings, build, git, read, run, said

SHOWN = 5
"""Changed files that a refusal lists."""


def main() -> int:
    """0 done, 1 failed."""
    try:
        release(read(os.environ), push=os.environ.get("PUSH", "") == "true")
    except BuildError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def release(settings: Settings, *, push: bool) -> None:
    """Build both variants of the engine and the operator, push them where asked, and write down what they are."""
    if settings.builder == "buildah":
        raise BuildError("BUILDER is buildah, which knows no digest of a tag: give docker or podman")
    check_tree(settings.revision)
    pinned = dataclasses.replace(settings, base_image=pin(settings.builder, settings.base_image))
    print(f"{settings.base_image} is {pinned.base_image}", flush=True)
    rows: list[dict[str, Any]] = []
    for variant, images in (("cuda", ("engine", "operator")), ("cpu", ("engine",))):
        chosen = dataclasses.replace(pinned, variant=variant, images=images)
        build(chosen)
        rows += [describe(chosen, image, push=push) for image in images]
    document = {"version": pinned.version, "revision": pinned.revision, "base": pinned.base_image, "images": rows}
    target = pinned.output / "release.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target}")


def check_tree(revision: str) -> None:
    """Raise BuildError unless the tree is what ``revision`` says: the build copies files that git doesn't know, too."""
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if head is None or changes is None:
        raise BuildError("git says of no commit that this is its tree: install git, and release from a clone")
    if changes:
        listed = ", ".join(row.split(maxsplit=1)[-1] for row in changes.splitlines()[:SHOWN])
        raise BuildError(f"the tree has changes that are not committed ({listed}): commit them, or use `make images`")
    if revision != head:
        raise BuildError(f"REVISION is {revision}, but the tree is that of {head}: leave REVISION out")


def pin(builder: str, name: str) -> str:
    """``name`` by the digest that its registry has for it today."""
    if "@" in name:
        return name
    run([builder, "pull", name])
    found = known_digest(builder, name)
    if found is None:
        raise BuildError(f"BASE_IMAGE {name} has no digest: give its whole name, and push it to that registry first")
    return f"{name}@{found}"


def describe(settings: Settings, image: str, *, push: bool) -> dict[str, Any]:
    """The release's row of an image; its digest is the registry's, so it is known once it was pushed."""
    name, sbom = settings.name(image), settings.sbom(image)
    row = {"name": name, "sbom": sbom.name, "sbomSha256": hashlib.sha256(sbom.read_bytes()).hexdigest()}
    if push:
        row["digest"] = pushed(settings.builder, name)
    return row


def pushed(builder: str, name: str) -> str:
    """Push an image; returns the digest that its registry has for it now."""
    if builder == "podman":
        # What it knows of an image that it built is its own copy's digest, and a push compresses anew.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "digest"
            run([builder, "push", "--digestfile", str(file), name])
            return file.read_text(encoding="utf-8").strip()
    run([builder, "push", name])
    found = known_digest(builder, name)
    if found is None:
        raise BuildError(f"{name} was pushed, but {builder} knows no digest of it: look it up in the registry")
    return found


def known_digest(builder: str, name: str) -> str | None:
    """The digest of a local image in the repository that ``name`` names; it may have others elsewhere."""
    digests = json.loads(said(builder, "image", "inspect", name))[0].get("RepoDigests") or []
    split = (row.rpartition("@") for row in digests)
    return next((digest for repository, _, digest in split if familiar(repository) == familiar(name)), None)


def familiar(name: str) -> str:
    """The repository of a name as Docker shows it: without tag, and without what it puts in front by itself."""
    registry, slash, path = name.rpartition("/")
    whole = f"{registry}{slash}{path.partition(':')[0]}"
    return whole.removeprefix("index.").removeprefix("docker.io/").removeprefix("library/")


if __name__ == "__main__":
    sys.exit(main())
