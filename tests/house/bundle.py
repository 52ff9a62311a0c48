"""``manifests/install.yaml``: the cluster-wide overlay in one file, for who has kubectl and nothing else.

The overlay only gathers files and changes none, so that joining them gives what kustomize would build, comments
included; a test on a control plane compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "manifests" / "overlays" / "cluster-wide"
BUNDLE = ROOT / "manifests" / "install.yaml"
GATHERING = {"apiVersion", "kind", "resources", "components"}


class NotGathered(Exception):
    """A kustomization does more than name files and folders: joining its files would leave that out."""


def files(folder: Path) -> Iterator[Path]:
    """The manifests that a kustomization gathers, in its order; raises NotGathered."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if more := set(kustomization) - GATHERING:
        raise NotGathered(f"{folder.relative_to(ROOT)}/kustomization.yaml has {', '.join(sorted(more))}")
    for name in [*kustomization.get("resources", ()), *kustomization.get("components", ())]:
        place = (folder / name).resolve()
        if place.is_dir():
            yield from files(place)
        else:
            yield place


def render() -> str:
    """The text of the bundle."""
    head = "# Made by `make manifests` from manifests/overlays/cluster-wide; change the files there instead.\n"
    return head + "".join(f"---\n{file.read_text(encoding='utf-8')}" for file in files(OVERLAY))


if __name__ == "__main__":
    BUNDLE.write_text(render(), encoding="utf-8")
