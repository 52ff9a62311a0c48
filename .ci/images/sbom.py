"""Writes the image's SBOM (CycloneDX): installed Python packages, Python itself, and the base's Debian packages.

It reads what is there rather than the lock, so that what a variant leaves out is left out here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = Path("/opt/pagedserve")
_FIELDS = ("${db:Status-Abbrev}", "${Package}", "${Version}", "${Architecture}", "${Maintainer}")


def main() -> None:
    """Write ``sbom.cdx.json`` into the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, required=True, help="pyproject.toml of the component")
    parser.add_argument("--dpkg", type=Path, required=True, help="dpkg's folder of the base")
    asked = parser.parse_args()
    document = python_packages(asked.project)
    document["components"] += [python(), *debian_packages(asked.dpkg)]
    target = ENVIRONMENT / "sbom.cdx.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{target}: {len(document['components'])} components")


def python_packages(project: Path) -> dict[str, Any]:
    """The document of the environment, with the component that it belongs to."""
    command = [Path(sys.executable).parent / "cyclonedx-py", "environment", "--output-reproducible"]
    command += ["--output-format", "JSON", "--pyproject", project, "--mc-type", "application"]
    done = subprocess.run([*command, ENVIRONMENT / "bin/python"], stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def python() -> dict[str, Any]:
    """The interpreter, which a base may hold outside its distribution's packages."""
    version = sys.version.split()[0]
    return {
        "bom-ref": f"cpython-{version}",
        "type": "platform",
        "name": "cpython",
        "version": version,
        "purl": f"pkg:generic/cpython@{version}",
    }


def debian_packages(folder: Path) -> list[dict[str, Any]]:
    """What dpkg says is installed."""
    command = ["dpkg-query", f"--admindir={folder}", "--show", "--showformat", "\\t".join(_FIELDS) + "\\n"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    rows = [line.split("\t") for line in listed.splitlines()]
    return [
        {
            "bom-ref": f"deb-{name}-{architecture}",
            "type": "library",
            "name": name,
            "version": version,
            "supplier": {"name": maintainer},
            "purl": f"pkg:deb/debian/{name}@{version.replace(':', '%3A').replace('+', '%2B')}?arch={architecture}",
        }
        for status, name, version, architecture, maintainer in rows
        if status.startswith("ii")
    ]


if __name__ == "__main__":
    main()
