"""Resources that hang, fail or are refused at every look delay no other."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from control_cluster import Cluster
from fake_nodes import FakeNodes
from operator_world import JSON, MODEL, World, install_crd, running
from operators import QUICK, OperatorThread
from pagedserve_operator.names import Key
from pagedserve_operator.reconcile import Look

HANGING = 12
"""More than there are workers."""


def test_resources_that_hang_fail_or_are_refused_delay_no_other(
    control_plane: Cluster, fake_nodes: FakeNodes, namespace: str
) -> None:
    install_crd(control_plane)
    fake_nodes.add_node("poison")
    world = World(control_plane.client(), namespace)
    with _deaf_hub() as hub:
        # Nobody waits for the hub's time-out in this test: whoever is behind it is never ready.
        config = replace(
            QUICK, workers=4, read_nodes=False, fetch_model_config=True, hub_endpoint=hub, hub_timeout_seconds=300.0
        )
        with OperatorThread(control_plane.kubeconfig, config) as thread:
            _break(thread, "broken")
            for index in range(HANGING):
                world.create(f"hanging-{index}", model={"uri": f"hf://example/model-{index}"})
            world.client.create(_config_map("refused-chat-template", namespace))
            world.create("refused", model={**MODEL, "chatTemplate": "{{ messages }}"})
            world.create("broken")
            world.wait("refused", "Degraded", reason="NameTaken")
            healthy = [f"healthy-{index}" for index in range(10)]
            for name in healthy:
                world.create(name)
            world.wait_ready(*healthy)
            world.edit(healthy[0], replicas=2)
            world.wait_child("Deployment", healthy[0], lambda child: child["spec"]["replicas"] == 2)
            still = ["broken", *(f"hanging-{index}" for index in range(HANGING))]
            assert [name for name in still if world.find("Deployment", name) is not None] == []


def _config_map(name: str, namespace: str) -> JSON:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}}


def _break(thread: OperatorThread, name: str) -> None:
    """A bug of ours that shows with one resource alone."""
    reconciler = running(thread).reconciler
    reconcile = reconciler.reconcile

    async def breaking(key: Key) -> Look:
        if key.name == name:
            raise ZeroDivisionError("poisoned")
        return await reconcile(key)

    reconciler.reconcile = breaking  # type: ignore[method-assign]


@contextmanager
def _deaf_hub() -> Iterator[str]:
    """Connections are taken by the kernel, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
