"""Where the demo plays: a kind cluster where a Docker daemon runs, else the local one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from e2e.controlplane.build import build, built
from e2e.interrupts import uninterrupted
from e2e.keeper import RUNS, Keeper, is_held, kept, release, state_file
from e2e.narration import Narrator
from e2e.providers.choice import chosen
from e2e.providers.kind import Kind, clusters, run, why_no_daemon
from e2e.providers.kind_plan import KindPlan
from e2e.providers.local import Local
from e2e.providers.provider import Images, Unavailable

from control_cluster import Cluster

ROOT = Path(__file__).parents[1]
CLUSTER = "pagedserve-demo"


class Address(Protocol):
    """``host:port`` of a Service by namespace and name."""

    def __call__(self, namespace: str, service: str) -> str:
        """See the class."""


@dataclass(frozen=True)
class Stage:
    """A cluster to play on."""

    cluster: Cluster
    address: Address
    images: Images


def kind_plan() -> KindPlan:
    """The demo's own cluster."""
    return replace(KindPlan.read(os.environ), cluster=CLUSTER, small=True)


def kind_folder() -> Path:
    """Of the kind cluster's kubeconfig, where `make demo-down` finds it."""
    return state_file().with_name("demo-kind")


def why_local(environment: Mapping[str, str] = os.environ) -> str:
    """One line on why the demo plays on a local cluster; empty where it plays on kind. Raises Unavailable."""
    name = chosen(environment)
    if name == "existing":
        raise Unavailable("the demo brings its own cluster: set E2E_PROVIDER to kind or local")
    return why_no_daemon() if name == "kind" else "E2E_PROVIDER says so"


@contextmanager
def staged(narrator: Narrator, *, keep: bool) -> Iterator[Stage]:
    """The stage; left, nothing of it is there, or it is kept for `make demo-down`. Raises Unavailable."""
    if kept() is not None:
        raise Unavailable(RUNS)
    if reason := why_local():
        narrator.stage(f"A local cluster ({reason}): a real control plane, nodes whose pods are processes")
        with _local(narrator, keep=keep) as stage:
            yield stage
        return
    if CLUSTER in clusters():
        raise Unavailable(RUNS)
    narrator.stage("A kind cluster with this tree's images")
    narrator.say("make images (minutes, the first time)")
    if subprocess.run(["make", "images", "VARIANT=cpu"], cwd=ROOT).returncode:
        raise Unavailable("the images can't be built: see above")
    with Kind(kind_plan(), keep=keep, folder=kind_folder()) as provider:
        yield Stage(provider.cluster, provider.address, provider.images)


def strike() -> str:
    """Take down what a demo left; says what that was. Raises Unavailable where some of it stays."""
    gone = []
    if state := kept():
        release(state)
        gone.append("The local cluster is gone")
    elif is_held():
        raise Unavailable("a demo's cluster is just starting or ending: try again in a minute")
    if not why_no_daemon() and CLUSTER in clusters():
        run(kind_plan().down())
        shutil.rmtree(kind_folder(), ignore_errors=True)
        gone.append("The kind cluster is gone")
    return "\n".join(gone) or "No demo runs"


@contextmanager
def _local(narrator: Narrator, *, keep: bool) -> Iterator[Stage]:
    build()
    keeper = Keeper()
    try:
        cluster = Cluster(keeper.start(), kubectl=built() / "kubectl")
        client = cluster.client()

        def address(namespace: str, service: str) -> str:
            spec = client.get("v1", "Service", service, namespace=namespace)["spec"]
            return f"{spec['clusterIP']}:{spec['ports'][0]['port']}"

        narrator.say(cluster.kubectl("get", "nodes").stdout)
        yield Stage(cluster, address, Local.images)
    except BaseException:
        with uninterrupted():
            keeper.stop(keep=False)
        raise
    with uninterrupted():
        keeper.stop(keep=keep)
