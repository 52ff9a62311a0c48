"""A cluster of containers: kind with this tree's images, nodes with GPU labels, and faults by docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.interrupts import uninterrupted
from e2e.providers.existing import MODEL
from e2e.providers.kind_plan import GPU_COUNT, GPUS, NOTHING_RUNS, KindPlan, Step, set_gpus
from e2e.providers.node_ports import NodePorts
from e2e.providers.provider import JSON, Provider, Unavailable, find_kubectl

from control_cluster import Cluster, Unsupported

PORTS = range(30080, 30088)
"""Those of kind-config.yaml that this machine sees."""
SPARE = "e2e.pagedserve.dev/spare"
_SECONDS = 600.0


def why_no_daemon() -> str:
    """One line on why kind can't run here; empty where it can."""
    for program in ("docker", "kind"):
        if shutil.which(program) is None:
            return f"there is no {program} on the PATH"
    # `docker info` ends with 0 where the client alone is there.
    done = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()
    return f"no Docker daemon answers ({said[-1] if said else 'docker version'})"


class StepFailed(Unavailable):
    """A command ended with ``status``; the message ends with what it said."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def clusters() -> list[str]:
    """Names of the kind clusters that are there, whoever made them; raises Unavailable."""
    return run(Step("list the clusters", ("kind", "get", "clusters"))).split()


class Kind(Provider):
    """See above; left in good order with ``keep``, the cluster stays, and so does its kubeconfig in ``folder``."""

    name = "kind"

    def __init__(self, plan: KindPlan | None = None, *, keep: bool = False, folder: Path | None = None) -> None:
        self.plan = plan or KindPlan.read(os.environ)
        self._keep = keep
        self._wanted_folder = folder
        self._has_light = False
        self._lent: dict[str, Mapping[str, str]] = {}

    def __enter__(self) -> Self:
        if reason := why_no_daemon():
            raise Unavailable(f"E2E_PROVIDER=kind: {reason}")
        # What can't be said to kind is found before anything is there to be undone.
        self.plan.config()
        kubectl = find_kubectl()
        if self.plan.cluster in clusters():
            # Somebody works with it: it isn't ours to load, to break or to delete.
            raise Unavailable(
                f"there is a kind cluster {self.plan.cluster} already: give this one another name by KIND_CLUSTER, "
                f"or delete that by `kind delete cluster --name {self.plan.cluster}`"
            )
        for step in self.plan.needs():
            run(step)
        self._folder = self._wanted_folder or Path(tempfile.mkdtemp(prefix="pagedserve-kind-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        kubeconfig = self._folder / "kubeconfig"
        try:
            for step in self.plan.up(kubeconfig):
                run(step)
            self._cluster = Cluster(kubeconfig, kubectl=kubectl)
            client = self._cluster.client()
            for node in client.list("v1", "Node"):
                if count := node["metadata"]["labels"].get(GPU_COUNT):
                    client.patch(node, set_gpus(int(count)), type="json", subresource="status")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        self._services = NodePorts(client, host="127.0.0.1", ports=PORTS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._keep and kind is None:
            return
        with uninterrupted():
            run(self.plan.down())
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    def address(self, namespace: str, service: str) -> str:
        return self._services.address(namespace, service)

    def small_model(self) -> JSON:
        return {"uri": MODEL, "dtype": "float32"}

    def light(self) -> JSON:
        # Real ones would be dozens of processes with torch in them.
        if not self._has_light:
            self.load_images([self.plan.images.light_engine])
            self._has_light = True
        return self.plan.images.light()

    def fresh(self) -> Provider:
        return Kind(replace(self.plan, cluster=f"{self.plan.cluster}-2", reachable=False, small=True))

    def load_images(self, images: Sequence[str]) -> None:
        for image in images:
            run(self.plan.build(image))
        run(self.plan.load(images))

    def add_node(self, *, labels: Mapping[str, str], gpus: int = 0) -> str:
        client = self.cluster.client()
        free = client.list("v1", "Node", labels=f"{SPARE}=true")
        if not free:
            raise Unsupported("kind-config.yaml has no spare node left: add one there")
        node = client.patch(free[0], {"metadata": {"labels": {**labels, SPARE: None}}})
        if gpus:
            client.patch(node, set_gpus(gpus), type="json", subresource="status")
        name = str(node["metadata"]["name"])
        self._lent[name] = labels
        return name

    def remove_node(self, name: str) -> None:
        client, labels = self.cluster.client(), self._lent.pop(name)
        node = client.find("v1", "Node", name)
        if node is None:
            return
        client.patch(node, {"metadata": {"labels": {**dict.fromkeys(labels), SPARE: "true"}}})
        if GPUS in node["status"]["capacity"]:
            client.patch(node, set_gpus(0), type="json", subresource="status")

    def lose_node(self, name: str) -> None:
        run(self.plan.lose(name))

    def kill(self, namespace: str, pod: str) -> None:
        spec = self.cluster.client().get("v1", "Pod", pod, namespace=namespace)["spec"]
        try:
            run(self.plan.kill_pod(spec["nodeName"], namespace, pod))
        except StepFailed as failed:
            if failed.status == NOTHING_RUNS:
                raise LookupError(f"nothing runs in pod {pod!r}") from failed
            raise
        # Killed again and again, a container is started later each time: a new pod is started at once.
        super().kill(namespace, pod)

    def restart_apiserver(self) -> None:
        run(self.plan.kill_apiserver())
        client = self.cluster.client()
        client.wait(lambda: client.request("GET", "/readyz") == "ok", "the API server answers again", seconds=180)


def run(step: Step) -> str:
    """Do it, and give its standard output; raises Unavailable with what the command said."""
    short = " ".join(step.command[:3])
    pipe = subprocess.PIPE
    with subprocess.Popen(step.command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said, complained = process.communicate(step.stdin, timeout=_SECONDS)
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{step.why}: `{short}` takes longer than {_SECONDS:.0f} s") from error
            raise
    if process.returncode:
        complaint = (complained or said).strip()[-2000:]
        raise StepFailed(f"{step.why}: `{short}` failed: {complaint}", process.returncode)
    return said
