"""The operator's image against a real API server, as its pod runs it: its own account, the manifests' rights alone."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from containers import OPERATOR, Container, Image, image
from control_processes import free_port
from controlplane import ControlPlane, NoControlPlane, find_control_plane
from crd import wait_until_served
from manifest_files import bundle, container
from missing import skip_without
from node_volumes import ACCOUNT_PATH
from operator_world import World

NAMESPACE = "pagedserve-system"
ACCOUNT = "pagedserve-operator"
MINUTES = "60m"
"""That a token holds; far more than a test takes."""
USER = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
METRICS_API = ("apiregistration.k8s.io/v1", "APIService", "v1beta2.custom.metrics.k8s.io")
AUTOSCALING = {"minReplicas": 2, "maxReplicas": 4, "metrics": [{"name": "queueWaitSeconds"}]}
SHOWN = 4000
"""Characters of a log."""
MADE = ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy")


@pytest.fixture
def operator() -> Image:
    return image(OPERATOR)


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    """A control plane with all of the bundle but the Deployment, in whose pods' place a container runs."""
    try:
        found = find_control_plane()
    except NoControlPlane as missing:
        skip_without(str(missing))
    if not isinstance(found, ControlPlane):
        pytest.skip("a container can't be given an account of your cluster: leave KUBECONFIG unset to run this test")
    with found:
        rest = [manifest for (kind, _), manifest in bundle().items() if kind != "Deployment"]
        found.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(rest))
        wait_until_served(found)
        yield found


@pytest.fixture
def account(plane: ControlPlane, tmp_path: Path) -> Path:
    """The files of the operator's service account, as a kubelet would put them into its pod."""
    token = plane.kubectl("create", "token", ACCOUNT, f"--namespace={NAMESPACE}", f"--duration={MINUTES}").stdout
    files = {"token": token.strip(), "namespace": NAMESPACE, "ca.crt": plane.ca.read_text()}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644)
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def running(operator: Image, plane: ControlPlane, account: Path) -> Iterator[Container]:
    told = {row["name"]: row["value"] for row in container(bundle())["env"] if "value" in row}
    server = urllib.parse.urlsplit(plane.url)
    told |= {
        "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port),
        "OPERATOR_NAMESPACE": NAMESPACE,
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": str(free_port()),
        "METRICS_API_HOST": "127.0.0.1",
        "METRICS_API_PORT": str(free_port()),
        "FETCH_MODEL_CONFIG": "false",
    }
    options = [word for name, value in told.items() for word in ("--env", f"{name}={value}")]
    with operator.started(options=(*options, "--volume", f"{account}:{ACCOUNT_PATH}:ro")) as started:
        yield started


def test_it_makes_what_a_resource_asks_for_with_the_rights_of_the_manifests(
    operator: Image, running: Container, plane: ControlPlane
) -> None:
    print(plane.kubectl("auth", "can-i", "--list", f"--as={USER}", f"--namespace={NAMESPACE}").stdout)
    world = World(plane.client(), "default")
    with explained_by(running):
        world.create("chat", autoscaling=AUTOSCALING, networkPolicy={"enabled": True})
        for kind in MADE:
            world.wait_child(kind, "chat")
        # No node is there to run an engine.
        world.wait("chat", "Ready", "False")
        world.client.wait(lambda: world.client.find(*METRICS_API), "the metrics API is registered")
        # Its probes' port, as its own health check asks it.
        assert running.run(*operator.config["Healthcheck"]["Test"][1:]).returncode == 0
        world.delete("chat")
        world.wait_gone("Deployment", "chat")
    assert "forbidden" not in running.logs.lower()
    running.signal("TERM")
    assert running.wait() == 0


@contextmanager
def explained_by(running: Container) -> Iterator[None]:
    """What is waited for in vain comes with the operator's last words."""
    try:
        yield
    except TimeoutError as error:
        raise AssertionError(f"{error}; the operator said: {running.logs[-SHOWN:]}") from error
