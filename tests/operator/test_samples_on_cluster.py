"""Each sample as a user applies it: `kubectl apply -f`, then `kubectl wait --for=condition=Ready`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from control_cluster import Cluster
from crd import ROOT
from fake_nodes import FakeNodes
from operator_world import JSON, World, install_crd
from operators import QUICK, OperatorThread

FILES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
HERE = {"topology.kubernetes.io/region": "eu-west", "topology.kubernetes.io/zone": "eu-west-1a"}
CARDS = {
    "l4": ("NVIDIA-L4", 23034),
    "l40s": ("NVIDIA-L40S", 46068),
    "a100": ("NVIDIA-A100-SXM4-80GB", 81920),
    "h100": ("NVIDIA-H100-80GB-HBM3", 81559),
    "mig": ("NVIDIA-A100-SXM4-40GB-MIG-3g.20gb", 19968),
}
VOLUMES = {"shared-cache": ("100Gi", "ReadWriteMany", "shared-files"), "model-on-volume": ("200Gi", "ReadOnlyMany", "")}
"""What a cluster's administrator has: volumes for the claims of two samples."""


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster, _kubelets: FakeNodes) -> Iterator[Cluster]:
    """One with a node of each card that a sample asks for, and an operator."""
    install_crd(control_plane)
    for name, (product, memory) in CARDS.items():
        _kubelets.add_gpu_node(f"samples-{name}", product=product, memory_mib=memory, labels=HERE)
    with OperatorThread(control_plane.kubeconfig, QUICK):
        yield control_plane
    _kubelets.clear()


@pytest.fixture
def volume(request: pytest.FixtureRequest, control_plane: Cluster) -> Iterator[None]:
    """The volume that a sample's claim is bound to, where it has one."""
    file: Path = request.node.callspec.params["file"]
    found = VOLUMES.get(file.stem)
    if found is None:
        yield
        return
    manifest = persistent_volume(file.stem, *found)
    control_plane.client().create(manifest)
    yield
    control_plane.client().delete("v1", "PersistentVolume", manifest["metadata"]["name"])


def persistent_volume(sample: str, size: str, mode: str, storage_class: str) -> JSON:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"samples-{sample}"},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": [mode],
            "storageClassName": storage_class,
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": f"/tmp/{sample}"},
        },
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sample_gets_ready(cluster: Cluster, namespace: str, volume: None, file: Path) -> None:
    cluster.kubectl("-n", namespace, "apply", "-f", str(file))
    world = World(cluster.client(), namespace)
    if world.get(file.stem)["spec"].get("suspend"):
        world.wait(file.stem, "Progressing", "False", reason="Suspended")
        assert world.find("Deployment", file.stem) is None
        cluster.kubectl("-n", namespace, "patch", "psvc", file.stem, "--type=merge", '-p={"spec":{"suspend":false}}')
    wait = ("wait", "--for=condition=Ready", f"psvc/{file.stem}", "--timeout=60s")
    done = cluster.kubectl("-n", namespace, *wait, check=False)
    assert done.returncode == 0, (done.stderr, world.get(file.stem).get("status"))
    assert world.get(file.stem)["status"]["url"].startswith(f"http://{file.stem}.{namespace}.svc")
