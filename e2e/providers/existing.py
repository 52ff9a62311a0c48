"""The cluster that KUBECONFIG names, with images that its nodes can pull; nothing of it is broken on purpose."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.providers.node_ports import NodePorts
from e2e.providers.provider import JSON, LIFECYCLE, Images, Provider, Unavailable, find_kubectl

from control_access import NoCredentials
from control_client import Client
from control_cluster import Cluster

MODEL = "SmolLM2-135M-Instruct"
"""Comes with the engine's image."""


INSTALLED = (
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition", "inferenceservices.pagedserve.dev"),
    ("v1", "Namespace", "pagedserve-system"),
)
"""What every installation has."""


class Existing(Provider):
    """Variables: KUBECONFIG, E2E_OPERATOR_IMAGE, E2E_ENGINE_IMAGE, E2E_MODEL, E2E_NODE_ADDRESS (see e2e/README.md)."""

    name = "existing"
    outlives = True

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        usual = Images()
        self.images = Images(
            operator=environment.get("E2E_OPERATOR_IMAGE", usual.operator),
            engine=environment.get("E2E_ENGINE_IMAGE", usual.engine),
        )

    def __enter__(self) -> Self:
        given = self._environment.get("KUBECONFIG")
        if not given:
            raise Unavailable("E2E_PROVIDER=existing runs on the cluster that KUBECONFIG names: set it")
        self._cluster = Cluster(Path(given), kubectl=find_kubectl())
        try:
            client = self._cluster.client()
        except NoCredentials as error:
            raise Unavailable(f"KUBECONFIG: {error}") from error
        if found := occupied(client):
            raise Unavailable(
                f"{found} is there already: the scenarios would replace that operator, and remove it in the end; "
                "name a cluster without one"
            )
        host = self._environment.get("E2E_NODE_ADDRESS") or node_address(client.list("v1", "Node"))
        self._services = NodePorts(client, host=host)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def address(self, namespace: str, service: str) -> str:
        return self._services.address(namespace, service)

    def small_model(self) -> JSON:
        return {"uri": self._environment.get("E2E_MODEL", MODEL), "dtype": "float32"}

    def light(self) -> JSON:
        return {"model": self.small_model(), "lifecycle": LIFECYCLE}


def occupied(client: Client) -> str:
    """What of an operator the cluster has already; empty where it has nothing."""
    for api_version, kind, name in INSTALLED:
        if client.find(api_version, kind, name) is not None:
            return f"{kind} {name}"
    return ""


def node_address(nodes: list[JSON]) -> str:
    """An address of some node, one that is meant for outside before others; raises Unavailable."""
    rows = [row for node in nodes for row in node.get("status", {}).get("addresses", ())]
    for kind in ("ExternalIP", "InternalIP"):
        for row in rows:
            if row["type"] == kind:
                return str(row["address"])
    raise Unavailable("no node of the cluster has an address: set E2E_NODE_ADDRESS to one that this machine reaches")
