"""What the scenarios need of a cluster, whoever runs it: addresses of Services, images, nodes that come and go, faults.

What a provider can't do raises Unsupported with the reason, by which the scenario is skipped.
"""

from __future__ import annotations

import shutil
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

from e2e.controlplane.build import BuildFailed, build

from control_cluster import Cluster, Unsupported

JSON = dict[str, Any]
ROOT = Path(__file__).parents[2]
LIFECYCLE: JSON = {"startupTimeoutSeconds": 3600, "preStopSeconds": 3, "drainSeconds": 120}
"""Of engines in scenarios: patient with a busy machine, and gone from the endpoints before they drain."""


class Unavailable(Exception):
    """There is no such cluster here; the message says what is missing."""


def version() -> str:
    """Of this tree, as images are tagged by it."""
    project = tomllib.loads((ROOT / "engine" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


@dataclass(frozen=True, kw_only=True)
class Images:
    """Names by which the cluster's nodes know the images, as `make images VARIANT=cpu` gives them."""

    operator: str = f"pagedserve/operator:{version()}"
    first_operator: str = "pagedserve/operator:first"
    """The frozen first release's."""
    engine: str = f"pagedserve/engine:{version()}-cpu"
    light_engine: str = "pagedserve/engine:light"
    """tests/support/light_engine.py; nobody's but the scenarios'."""

    def light(self) -> JSON:
        """Fields of a spec whose engines are light ones."""
        repository, tag = self.light_engine.split(":")
        return {"image": {"repository": repository, "tag": tag}, "lifecycle": {**LIFECYCLE, "preStopSeconds": 1}}


def find_kubectl() -> Path:
    """The program of the PATH, else the one that is built beside the control plane; raises Unavailable."""
    try:
        return Path(shutil.which("kubectl") or build() / "kubectl")
    except BuildFailed as failed:
        raise Unavailable(f"there is no kubectl on the PATH, and none can be built: {failed}") from failed


class Provider(ABC):
    """A cluster to run scenarios on; entered it is there, left everything of it is gone."""

    name: ClassVar[str]
    outlives: ClassVar[bool] = False
    """Whether the cluster stays when this is left, so that what was installed there has to be removed."""
    images = Images()

    @abstractmethod
    def __enter__(self) -> Self:
        """Start it; raises Unavailable where it can't be."""

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave nothing behind."""

    @property
    @abstractmethod
    def cluster(self) -> Cluster:
        """Clients and kubectl, as an administrator."""

    @abstractmethod
    def address(self, namespace: str, service: str) -> str:
        """``host:port`` at which this machine reaches the first port of the Service."""

    @abstractmethod
    def small_model(self) -> JSON:
        """``spec.model`` of one that loads in seconds, in float32, so that greedy answers are the same each time."""

    @abstractmethod
    def light(self) -> JSON:
        """Fields of a spec whose engines cost least here, for scenarios that ask for no text."""

    def fresh(self) -> Provider:
        """A second cluster beside this one, for a scenario that changes what all others stand on."""
        self._refuse("second cluster")

    def load_images(self, images: Sequence[str]) -> None:
        """Make images of this machine known to the nodes."""
        self._refuse("way to load images")

    def add_node(self, *, labels: Mapping[str, str], gpus: int = 0) -> str:
        """The name of a node that no other scenario uses, with these labels and ``nvidia.com/gpu``s."""
        self._refuse("node that a scenario may change")

    @contextmanager
    def node(self, *, labels: Mapping[str, str], gpus: int = 0) -> Iterator[str]:
        """A node as ``add_node`` gives it, as long as this is entered."""
        name = self.add_node(labels=labels, gpus=gpus)
        try:
            yield name
        finally:
            self.remove_node(name)

    def remove_node(self, name: str) -> None:
        """Take back a node that was added; it may be lost by now."""
        self._refuse("node that a scenario may change")

    def lose_node(self, name: str) -> None:
        """Cut the power of a node; the API server learns of it as it does in a cluster."""
        self._refuse("node that may be lost")

    def kill(self, namespace: str, pod: str) -> None:
        """Kill what runs in a pod without a warning."""
        self.cluster.client().delete("v1", "Pod", pod, namespace=namespace, grace_seconds=0)

    def restart_apiserver(self) -> None:
        """Kill the API server and start it again; returns when it answers."""
        self._refuse("restart of its API server")

    def write_logs(self, folder: Path, namespaces: Sequence[str]) -> None:
        """A file for each pod's containers, and whatever else tells what happened."""
        client = self.cluster.client()
        for namespace in namespaces:
            for pod in client.list("v1", "Pod", namespace=namespace):
                self._write_pod_logs(folder, namespace, pod["metadata"]["name"])

    def _write_pod_logs(self, folder: Path, namespace: str, pod: str) -> None:
        """Of what runs now, and of what ran before it."""
        for which in ([], ["--previous"]):
            command = ("-n", namespace, "logs", pod, "--all-containers", "--tail=5000", *which)
            told = self.cluster.kubectl(*command, check=False)
            if told.stdout:
                (folder / f"{namespace}_{pod}{''.join(which)}.log").write_text(told.stdout)

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(f"the provider {self.name} offers no {what}")
