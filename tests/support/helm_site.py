"""A namespace of a real cluster that the chart is installed into, and what is there before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from control_client import JSON, Client
from control_cluster import Cluster
from helm_program import RELEASE, Helm
from helm_templates import CHART
from pagedserve_operator.names import API_VERSION, KIND, Key, Owner

OPERATOR = "pagedserve-operator"
PASSING = frozenset({"events", "events.events.k8s.io", "leases.coordination.k8s.io"})
"""Kinds whose objects come and go by themselves."""
GOING_SECONDS = 60.0


@dataclass(frozen=True)
class Site:
    """A cluster with a namespace to install into."""

    cluster: Cluster
    helm: Helm
    namespace: str

    @property
    def client(self) -> Client:
        return self.cluster.client()

    def install(self, *arguments: str, chart: Path = CHART, check: bool = True) -> str:
        """What helm says; ``check`` as in Helm.run."""
        command = ("install", RELEASE, str(chart), "--namespace", self.namespace, *arguments)
        done = self.helm.run(*command, check=check)
        assert check or done.returncode != 0, f"it was installed: {done.stdout}"
        return done.stdout + done.stderr

    def upgrade(self, *arguments: str, chart: Path = CHART, check: bool = True) -> str:
        """What helm says; values that were given before stay given."""
        command = (
            "upgrade",
            RELEASE,
            str(chart),
            "--namespace",
            self.namespace,
            "--reset-then-reuse-values",
            *arguments,
        )
        done = self.helm.run(*command, check=check)
        assert check or done.returncode != 0, f"it was upgraded: {done.stdout}"
        return done.stdout + done.stderr

    def uninstall(self) -> None:
        self.helm.run("uninstall", RELEASE, "--namespace", self.namespace, "--ignore-not-found")

    def wait_left(self, expected: set[str], *, before: set[str]) -> None:
        """Until ``expected`` is all that there is besides what was ``before``; raises AssertionError."""
        deadline = time.monotonic() + GOING_SECONDS
        while (found := everything(self.cluster) - before) != expected:
            assert time.monotonic() < deadline, f"left: {found - expected}; gone: {expected - found}"

    def deployment(self) -> JSON:
        return self.client.get("apps/v1", "Deployment", OPERATOR, namespace=self.namespace)

    def serve(self, name: str) -> tuple[JSON, JSON]:
        """A resource, and a child of it as the operator would have made one."""
        metadata = {"name": name, "namespace": "default"}
        spec = {"model": {"uri": "hf://a/b"}, "replicas": 1}
        owner = self.client.create({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec})
        reference = Owner(Key("default", name), owner["metadata"]["uid"]).reference()
        child = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {**metadata, "ownerReferences": [reference]}}
        return owner, self.client.create(child)

    def found(self, owner: JSON) -> tuple[JSON, JSON]:
        """The resource and its child as they are now."""
        name = owner["metadata"]["name"]
        return (
            self.client.get(API_VERSION, KIND, name, namespace="default"),
            self.client.get("v1", "ConfigMap", name, namespace="default"),
        )


def everything(cluster: Cluster) -> set[str]:
    """Every object of the cluster, but for what comes and goes by itself."""
    # An API whose server is on its way out is told as an error, besides all others.
    kinds = cluster.kubectl("api-resources", "--verbs=list", "--output=name", check=False).stdout.split()
    columns = "custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name"
    asked = ",".join(kind for kind in kinds if kind not in PASSING)
    rows = cluster.kubectl("get", asked, "--all-namespaces", "--no-headers", f"--output={columns}").stdout
    return {" ".join(row.split()) for row in rows.splitlines()}
