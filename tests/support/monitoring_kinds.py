"""The Prometheus operator's kinds and KEDA's, as far as server-side apply and children of ours care."""

from __future__ import annotations

from pathlib import Path

import yaml

from control_cluster import Cluster
from pagedserve_operator.kinds import KINDS, OPTIONAL

FILE = Path(__file__).parents[1] / "golden/operator/monitoring_crds.yaml"


def install_monitoring(cluster: Cluster) -> None:
    """Install them and wait until they are served; again it changes nothing."""
    client = cluster.client()
    for document in yaml.safe_load_all(FILE.read_text(encoding="utf-8")):
        client.apply(document)
    for kind in (KINDS[name] for name in sorted(OPTIONAL)):
        path = f"/apis/{kind.api_version}/{kind.plural}"
        client.wait(lambda path=path: client.request("GET", path), f"{kind.name} is served")
