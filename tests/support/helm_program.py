"""The real helm, built from source as the control plane is, with settings and caches of a test's own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e.controlplane.build import built

from crd import ROOT
from helm_templates import CHART
from manifest_files import Manifests, by_place
from missing import skip_without

MODULE = ROOT / "e2e" / "helm"
RELEASE = "pagedserve"
WAITING_SECONDS = 120.0


@dataclass(frozen=True)
class Helm:
    """``program`` with its files below ``folder``; commands that need a cluster ask that of ``kubeconfig``."""

    program: Path
    folder: Path
    kubeconfig: Path | None = None

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run helm to its end; with ``check`` a failure raises AssertionError with what it said."""
        own = {f"HELM_{name}_HOME": str(self.folder / name) for name in ("CACHE", "CONFIG", "DATA")}
        environment = {**os.environ, **own, "KUBECONFIG": str(self.kubeconfig or os.devnull)}
        command = [str(self.program), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAITING_SECONDS)
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stderr or done.stdout}"
        return done

    def template(self, *arguments: str, namespace: str = "pagedserve-system", chart: Path = CHART) -> Manifests:
        """What the chart makes of values, without a cluster."""
        return by_place(self.run("template", RELEASE, str(chart), "--namespace", namespace, *arguments).stdout)


def find_helm(environment: Mapping[str, str] = os.environ) -> Path:
    """The program that HELM names, else the built one; a test that calls it is skipped without any, but fails in CI."""
    if given := environment.get("HELM"):
        return Path(given)
    program = built(MODULE) / "helm"
    if not program.is_file():
        skip_without("no helm: run `python e2e/controlplane/build.py e2e/helm` once, or set HELM to one", environment)
    return program


def find_kubectl() -> Path:
    """The built kubectl, whose kustomize needs no cluster; missing, it is treated as helm is."""
    program = built() / "kubectl"
    if not program.is_file():
        skip_without("no kubectl: run `python e2e/controlplane/build.py` once")
    return program
