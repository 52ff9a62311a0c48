"""The operator as its manifests install it, two Pods that are real processes, and engines whose load a test steers."""

from __future__ import annotations

import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bundle import BUNDLE
from control_client import Client
from controlplane import ControlPlane
from crd import wait_until_served
from loopback import claimed_subnet
from manifest_files import bundle, container
from node_stand_in import NodeStandIn
from operator_world import World
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.metrics_api.registration import NAME
from pagedserve_operator.status.observed import condition

JSON = dict[str, Any]
NAMESPACE = "pagedserve-system"
OPERATOR = "pagedserve-operator"
ENGINE = Path(__file__).with_name("steered_engine.py")
HURRY = 20.0
SETTINGS = {
    "LEASE_SECONDS": "3",
    "RENEW_DEADLINE_SECONDS": "2",
    "RENEW_SECONDS": "0.5",
    "FETCH_MODEL_CONFIG": "false",
}
"""The operators' beside those of the manifests: nobody waits long for another leader."""
SECONDS = 180.0
"""Two operators and some engines start on two cores."""
ROOT = "/apis/custom.metrics.k8s.io/v1beta2"


@dataclass(frozen=True)
class Installation:
    """A control plane with the bundle applied, a node, and one namespace of engines."""

    plane: ControlPlane
    node: NodeStandIn
    world: World

    @property
    def client(self) -> Client:
        return self.world.client

    def install(self) -> None:
        """Apply the bundle, and wait until the API server gets metrics from it."""
        manifests = bundle()
        container(manifests)["env"] += [{"name": name, "value": value} for name, value in SETTINGS.items()]
        self.plane.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(manifests.values()))
        wait_until_served(self.plane)
        self.client.wait(self.is_available, "the metrics API is available", seconds=SECONDS)

    def uninstall(self) -> None:
        """As documented."""
        self.plane.kubectl("delete", "-f", str(BUNDLE), "--timeout=120s", seconds=150)

    def is_available(self) -> bool:
        """Whether the API server gets metrics from the operator."""
        return condition(self.api_service(), "Available").get("status") == "True"

    def api_service(self, name: str = NAME) -> JSON | None:
        return self.client.find("apiregistration.k8s.io/v1", "APIService", name)

    def operators(self) -> list[JSON]:
        """Ready pods of the operator that are not being deleted."""
        pods = self.client.list("v1", "Pod", namespace=NAMESPACE, labels=f"app.kubernetes.io/name={OPERATOR}")
        return [pod for pod in pods if is_ready(pod)]

    def engines(self, name: str) -> list[JSON]:
        """Ready pods of a resource that are not being deleted."""
        return [pod for pod in self.world.pods(name) if is_ready(pod)]

    def wait_engines(self, name: str, count: int) -> list[JSON]:
        def enough() -> list[JSON] | None:
            found = self.engines(name)
            return found if len(found) == count else None

        return self.client.wait(enough, f"{name} has {count} engines", seconds=SECONDS)

    def values(self, metric: str, name: str = "", *, client: Client | None = None) -> dict[str, str]:
        """Quantities by pod, as an autoscaler gets them through the API server."""
        selector = urllib.parse.quote(f"app.kubernetes.io/instance={name}" if name else "")
        path = f"{ROOT}/namespaces/{self.world.namespace}/pods/*/{metric}?labelSelector={selector}"
        found = (client or self.client).request("GET", path)
        return {item["describedObject"]["name"]: item["value"] for item in found["items"]}

    def user(self, name: str, *groups: str) -> Client:
        return self.plane.client(self.plane.kubeconfig_for(name, groups))


@contextmanager
def installation(programs: Path, *, autoscaler_seconds: float) -> Iterator[Installation]:
    """An installation that serves metrics; autoscalers look every ``autoscaler_seconds``."""
    images = {
        container(bundle())["image"]: [sys.executable, "-m", "pagedserve_operator"],
        OperatorConfig().engine_image: [sys.executable, str(ENGINE)],
    }
    with ControlPlane(programs, autoscaler_seconds=autoscaler_seconds) as plane:
        client = plane.client()
        client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
        with (
            claimed_subnet() as subnet,
            NodeStandIn(client, "metrics-node", images=images, hurry=HURRY, subnet=subnet) as node,
        ):
            made = Installation(plane, node, World(client, "models"))
            made.install()
            yield made


def is_ready(pod: JSON) -> bool:
    """Whether the pod is ready and stays."""
    return "deletionTimestamp" not in pod["metadata"] and condition(pod, "Ready").get("status") == "True"


def steer(pod: JSON, **load: Any) -> None:
    """Make the engine pretend: see steered_engine.Load."""
    url = f"http://{pod['status']['podIP']}:8080/steer"
    with urllib.request.urlopen(url, data=json.dumps(load).encode(), timeout=30) as answer:
        assert answer.status == 200
