"""A cluster of this machine without containers: a real control plane, and nodes whose pods are processes.

Everything but the kubelet, the container runtime and kube-proxy is the real thing; those are played by the node
stand-in and the Service proxy of tests/support. Engines and operator are this tree's, started as their images would.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.controlplane.build import cache
from e2e.providers.provider import JSON, Provider, Unavailable

from control_cluster import Cluster
from control_processes import ProgramFailed
from controlplane import NoControlPlane, find_control_plane
from loopback import claimed_subnet, why_not
from node_container import now
from node_stand_in import NodeStandIn
from node_volumes import why_no_account
from service_proxy import ServiceProxy

ROOT = Path(__file__).parents[2]
LIGHT_ENGINE = ROOT / "tests" / "support" / "light_engine.py"
FIRST_OPERATOR = ROOT / "e2e" / "fixtures" / "first-release" / "pagedserve_operator-0.1.0-py3-none-any.whl"
MODELS = cache().parent / "models"
HURRY = 4.0
"""How much faster than in a cluster probes come."""
_AUDIT_BYTES = 1 << 20


class Local(Provider):
    """See above; ``hurry`` as in NodeStandIn, ``autoscaler_seconds`` as in ControlPlane, by default Kubernetes' own."""

    name = "local"

    def __init__(self, *, hurry: float = HURRY, autoscaler_seconds: float = 15.0) -> None:
        self._hurry = hurry
        self._autoscaler_seconds = autoscaler_seconds
        self._nodes: dict[str, NodeStandIn] = {}
        self._stack = ExitStack()
        self._programs: dict[str, Sequence[str] | None] = {
            # A converted model stays on this machine, as an image would hold it: converting takes longest.
            self.images.engine: [sys.executable, "-m", "pagedserve_engine", "serve", "--cache-dir", str(MODELS)],
            self.images.operator: [sys.executable, "-m", "pagedserve_operator"],
            # A wheel is imported as it is; what stands on PYTHONPATH comes before this tree's.
            self.images.first_operator: [
                *("/usr/bin/env", f"PYTHONPATH={FIRST_OPERATOR}"),
                *(sys.executable, "-m", "pagedserve_operator"),
            ],
            self.images.light_engine: [sys.executable, "-I", "-S", str(LIGHT_ENGINE)],
        }

    def __enter__(self) -> Self:
        if reason := why_not() or why_no_account():
            raise Unavailable(reason)
        with ExitStack() as stack:
            self._logs = Path(tempfile.mkdtemp(prefix="pagedserve-logs-"))
            stack.callback(shutil.rmtree, self._logs, ignore_errors=True)
            try:
                # Never the cluster that the user's KUBECONFIG names.
                given = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
                found = find_control_plane(given, autoscaler_seconds=self._autoscaler_seconds)
                self._cluster = stack.enter_context(found)
            except (NoControlPlane, ProgramFailed) as error:
                raise Unavailable(str(error)) from error
            stack.enter_context(ServiceProxy(self._cluster.client()))
            self._stack = stack
            self.add_node(labels={})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def address(self, namespace: str, service: str) -> str:
        spec = self.cluster.client().get("v1", "Service", service, namespace=namespace)["spec"]
        return f"{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def small_model(self) -> JSON:
        # Here, so that nobody waits for torch who needs no model.
        from real_engine import tiny

        return tiny(dtype="float32")

    def light(self) -> JSON:
        return self.images.light()

    def fresh(self) -> Provider:
        return Local(hurry=self._hurry)

    def load_images(self, images: Sequence[str]) -> None:
        if unknown := [image for image in images if image not in self._programs]:
            raise Unavailable(f"nothing stands for the images {', '.join(unknown)} here")

    def add_node(self, *, labels: Mapping[str, str], gpus: int = 0) -> str:
        name = f"node-{len(self._nodes) + 1}"
        subnet = self._stack.enter_context(claimed_subnet())
        node = NodeStandIn(
            self.cluster.client(),
            name,
            gpus=gpus,
            labels=labels,
            images=self._programs,
            hurry=self._hurry,
            subnet=subnet,
            logs=self._logs,
        )
        self._nodes[name] = self._stack.enter_context(node)
        return name

    def remove_node(self, name: str) -> None:
        self._nodes[name].__exit__()

    def lose_node(self, name: str) -> None:
        self._nodes[name].lose()
        # The tests' node controller would wait an hour (control_flags.py) before it says this; a cluster's waits 50 s.
        client = self.cluster.client()
        node = client.get("v1", "Node", name)
        client.patch(node, _not_ready("Unknown", "NodeStatusUnknown"), type="strategic", subresource="status")
        for pod in client.list("v1", "Pod"):
            if pod["spec"].get("nodeName") == name:
                client.patch(pod, _not_ready("False", "NodeLost"), type="strategic", subresource="status")

    def kill(self, namespace: str, pod: str) -> None:
        pids = self._on_its_node(pod, lambda node: node.pids(pod))
        if not pids:
            raise LookupError(f"nothing runs in pod {pod!r}")
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)

    def restart_apiserver(self) -> None:
        self.cluster.restart_apiserver(kill=True)

    def write_logs(self, folder: Path, namespaces: Sequence[str]) -> None:
        for node in self._nodes.values():
            node.keep_logs(self._logs)
        for log in self._logs.iterdir():
            if log.name.startswith(tuple(f"{namespace}_" for namespace in namespaces)):
                shutil.copy(log, folder)
        control = self.cluster.kubeconfig.parent
        for log in control.glob("*.log"):
            (folder / f"control-plane_{log.name}").write_bytes(_tail(log))

    def _on_its_node(self, pod: str, ask: Callable[[NodeStandIn], Mapping[str, int]]) -> Mapping[str, int]:
        for node in self._nodes.values():
            try:
                return ask(node)
            except LookupError:
                continue
        raise LookupError(f"no node runs pod {pod!r}")


def _not_ready(status: str, reason: str) -> dict[str, Any]:
    row = {"type": "Ready", "status": status, "reason": reason, "lastTransitionTime": now()}
    return {"status": {"conditions": [row]}}


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _AUDIT_BYTES))
        return file.read()
