"""Builds the images with the builder that is there, and writes each one's SBOM beside them.

Every setting is a variable, so that `make images VARIANT=cpu` passes it on; docs/images.md lists them. Standard library
only: a machine that builds images needs nothing installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDERS = ("docker", "podman", "buildah")
IMAGES = ("engine", "operator")
VARIANTS = ("cuda", "cpu")
BASE_IMAGE = "docker.io/library/python:3.13-slim-trixie"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SECRETS = {"apt.conf": "APT_CONF", "pip.conf": "PIP_CONF", "uv.toml": "UV_TOML", "ca.crt": "CA_BUNDLE"}
"""Files that only the build sees, by the variable that holds a path: how registries are reached."""
_COMMIT = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


class BuildError(Exception):
    """Something that stops the build; the message names the setting and the cure."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is built, from what, and by what."""

    builder: str
    images: tuple[str, ...]
    variant: str
    prefix: str
    version: str
    revision: str
    base_image: str
    source: str
    torch_index: str
    network: str
    proxies: dict[str, str]
    secrets: dict[str, Path]
    output: Path

    def name(self, image: str) -> str:
        """Reference of an image; the engine for processors has a tag of its own."""
        suffix = "-cpu" if image == "engine" and self.variant == "cpu" else ""
        return f"{self.prefix}/{image}:{self.version}{suffix}"

    def sbom(self, image: str) -> Path:
        """Where the image's SBOM lies."""
        return self.output / f"{self.name(image).rpartition('/')[2].replace(':', '-')}.cdx.json"


def read(variables: Mapping[str, str]) -> Settings:
    """The settings; raises BuildError by variable. An empty variable counts as absent."""
    given = {name: value for name, value in variables.items() if value}
    images = tuple(given.get("IMAGES", " ".join(IMAGES)).split())
    for image in images:
        _check("IMAGES", image, IMAGES)
    return Settings(
        builder=_builder(given.get("BUILDER")),
        images=images,
        variant=_check("VARIANT", given.get("VARIANT", "cuda"), VARIANTS),
        prefix=given.get("IMAGE_PREFIX", "pagedserve"),
        version=given.get("VERSION") or _version(),
        revision=given.get("REVISION") or git(*_COMMIT) or "unknown",
        base_image=given.get("BASE_IMAGE", BASE_IMAGE),
        source=given.get("SOURCE", ""),
        torch_index=given.get("TORCH_INDEX", ""),
        network=given.get("BUILD_NETWORK", ""),
        proxies={name: value for name, value in given.items() if name.upper() in PROXIES},
        secrets=_secrets(given),
        output=Path(given.get("OUTPUT", ROOT / "dist/images")),
    )


def build(settings: Settings) -> None:
    """Build every image asked for, write its SBOM, and say how large it is."""
    for image in settings.images:
        print(f"Building {settings.name(image)} from {settings.base_image} with {settings.builder}", flush=True)
        run(command(settings, image))
        _write_sbom(settings, image)
    for image in settings.images:
        print(f"{settings.name(image)}{_size(settings, image)}; SBOM {settings.sbom(image)}")


def command(settings: Settings, image: str) -> list[str]:
    """The builder's command line."""
    arguments = {
        "BASE_IMAGE": settings.base_image,
        "VERSION": settings.version,
        "REVISION": settings.revision,
        "SOURCE": settings.source,
        **({"VARIANT": settings.variant, "TORCH_INDEX": settings.torch_index} if image == "engine" else {}),
        **settings.proxies,
    }
    words = [settings.builder, "build", "--file", str(ROOT / f"Dockerfile.{image}")]
    if settings.builder == "docker":
        # Each image has its own SBOM, and `kind load` fails on attestations that the daemon keeps apart.
        words += ["--provenance=false", "--sbom=false"]
    else:
        # OCI's own format has no place for a health check.
        words += ["--format", "docker", "--layers"]
    for name, value in arguments.items():
        words += ["--build-arg", f"{name}={value}"] if value else []
    for name, path in settings.secrets.items():
        words += ["--secret", f"id={name},src={path}"]
    words += ["--network", settings.network] if settings.network else []
    return [*words, "--tag", settings.name(image), str(ROOT)]


def _write_sbom(settings: Settings, image: str) -> None:
    # From the image itself: what lies beside it is what is in it.
    document = "/opt/pagedserve/sbom.cdx.json"
    if settings.builder == "buildah":
        container = said("buildah", "from", settings.name(image)).strip()
        try:
            text = said("buildah", "run", "--network", "none", container, "--", "cat", document)
        finally:
            said("buildah", "rm", container)
    else:
        only_cat = ("run", "--rm", "--network", "none", "--entrypoint", "cat")
        text = said(settings.builder, *only_cat, settings.name(image), document)
    settings.output.mkdir(parents=True, exist_ok=True)
    settings.sbom(image).write_text(text, encoding="utf-8")


def _size(settings: Settings, image: str) -> str:
    if settings.builder == "buildah":
        return ""
    whole, base = (image_size(settings.builder, name) for name in (settings.name(image), settings.base_image))
    added = f", {(whole - base) / 1e6:.0f} MB of them over its base" if base else ""
    return f": {whole / 1e6:.0f} MB{added}"


def image_size(builder: str, name: str) -> int:
    """Bytes of a local image; 0 where the builder doesn't know it by that name."""
    done = subprocess.run([builder, "image", "inspect", name], capture_output=True, text=True, check=False)
    return int(json.loads(done.stdout)[0]["Size"]) if done.returncode == 0 else 0


def run(words: list[str]) -> None:
    """Run a command and show its lines as they come; raises BuildError where it fails."""
    # Docker's older builder knows neither secrets nor mounts.
    done = subprocess.run(words, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=False)
    if done.returncode:
        raise BuildError(f"{words[0]} {words[1]} ended with {done.returncode}: its lines above say why")


def said(*words: str) -> str:
    """What a command prints; raises BuildError where it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BuildError(f"`{' '.join(words)}` ended with {done.returncode}: its lines above say why")
    return done.stdout


def _builder(asked: str | None) -> str:
    if asked is not None:
        _check("BUILDER", asked, BUILDERS)
    for name in (asked,) if asked else BUILDERS:
        if shutil.which(name) and _answers(name):
            return name
    wanted = asked or ", ".join(BUILDERS)
    raise BuildError(f"no builder answers ({wanted}): start Docker's daemon, or install podman or buildah")


def _answers(builder: str) -> bool:
    # `docker info` ends with 0 where the client alone is there.
    words = [builder, "version", *(["--format", "{{.Server.Version}}"] if builder == "docker" else [])]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _check(variable: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise BuildError(f"{variable} is {value!r}: give {' or '.join(allowed)}")
    return value


def _secrets(given: Mapping[str, str]) -> dict[str, Path]:
    # A machine that trusts certificates of its own says so in SSL_CERT_FILE.
    known = {"CA_BUNDLE": given.get("SSL_CERT_FILE", ""), **given}
    found = {name: Path(known[variable]) for name, variable in SECRETS.items() if known.get(variable)}
    for name, path in found.items():
        if not path.is_file():
            raise BuildError(f"{SECRETS[name]} is {str(path)!r}, which is no file: give the path of one")
    return found


def _version() -> str:
    project = tomllib.loads((ROOT / "engine/pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def git(*words: str) -> str | None:
    """What git says of this tree; None where it isn't installed or knows no such tree."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    """0 done, 1 failed."""
    try:
        build(read(os.environ))
    except BuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
