"""A node whose pods are real processes on this machine, so that a rollout, a crash loop and a drain are real.

It does what a kubelet does with the fields that we use, and no more. Each container is a local process without any
isolation: its image is what ``images`` names, or its own ``command``; ``HOST``, ``METRICS_HOST`` and
``METRICS_API_HOST`` are the pod's address, so that many pods share a port; ``TERMINATION_MESSAGE_PATH`` and, where they
occur in values of the environment and in the command, mount paths are rewritten to folders of this machine. A service
account is what it is in a cluster: a token of the API server's, at the path where clients look. Pod addresses are added
to the loopback interface.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from control_client import ApiError, Client
from loopback import SUBNET_SIZE, add_address, address_in, remove_address, why_not
from node_container import now
from node_pod import Pod, Surroundings
from node_spec import JSON, Images
from node_volumes import account_place, why_no_account

__all__ = ["NodeStandIn", "why_not"]

POLL_SECONDS = 0.3
HEARTBEAT_SECONDS = 5.0


class NodeStandIn:
    """A node named ``name`` with ``gpus`` of ``nvidia.com/gpu``; entered, it is Ready; left, all that it ran is gone.

    ``images`` maps an image to the command that stands for its entrypoint, None to an image that can't be pulled.
    Probes and the back-off of crash loops (``backoff`` seconds at first) run ``hurry`` times as fast as they say.
    Nodes that run at the same time need ``subnet``s of their own: see loopback.py. Logs of pods that have
    gone are kept in the folder ``logs``, where one is given.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        *,
        gpus: int = 0,
        cpu: str = "64",
        memory: str = "256Gi",
        labels: Mapping[str, str] | None = None,
        images: Images | None = None,
        backoff: float = 0.5,
        hurry: float = 1.0,
        subnet: int = 77,
        logs: Path | None = None,
    ) -> None:
        self.name = name
        self._client = client
        self._capacity = {"cpu": cpu, "memory": memory, "pods": "110"}
        if gpus:
            self._capacity["nvidia.com/gpu"] = str(gpus)
        self._labels = {"kubernetes.io/hostname": name, **(labels or {})}
        self._images = images or {}
        self._backoff, self._hurry = backoff, hurry
        self._subnet = subnet
        self._logs = logs
        self._num_addresses = 0
        self._pods: dict[str, Pod] = {}
        self._over = threading.Event()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="pagedserve-node-"))
        if not why_no_account():
            self._stack.enter_context(account_place())
        self._node = Surroundings(
            client=self._client,
            host_address=address_in(self._subnet, 1),
            folder=self._folder,
            images=self._images,
            backoff=self._backoff,
            hurry=self._hurry,
        )
        metadata = {"name": self.name, "labels": self._labels}
        self._manifest = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        self._client.apply(self._manifest, manager="node-stand-in")
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for uid in list(self._pods):
            self._drop(uid)
        self._client.delete("v1", "Node", self.name)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._stack.close()

    def lose(self) -> None:
        """Go silent, as a machine whose power fails: what ran here is dead, and nobody tells the API server.

        The addresses of its pods stay here, so that who calls them is refused and led nowhere else.
        """
        self._over.set()
        self._thread.join()
        for pod in self._pods.values():
            pod.stop()

    def pids(self, pod: str) -> dict[str, int]:
        """The processes of the containers that run in the pod of that name."""
        return {each.spec["name"]: each.pid for each in self._named(pod).containers if each.pid is not None}

    def log(self, pod: str, container: str) -> str:
        """What the container wrote so far, over all of its restarts."""
        path = self._named(pod).folder / container / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def keep_logs(self, folder: Path) -> None:
        """Copy what the pods that run here wrote so far into ``folder``."""
        for pod in list(self._pods.values()):
            pod.keep_logs(folder)

    def _named(self, pod: str) -> Pod:
        found = [each for each in list(self._pods.values()) if each.document["metadata"]["name"] == pod]
        if not found:
            raise LookupError(f"no pod {pod!r} runs on node {self.name!r}")
        return found[-1]

    def _run(self) -> None:
        beat_at = time.monotonic() + HEARTBEAT_SECONDS
        while not self._over.wait(POLL_SECONDS):
            # An API server that is away or being restarted changes nothing for what runs already.
            with contextlib.suppress(ApiError, OSError, HTTPException):
                if time.monotonic() >= beat_at:
                    self._beat()
                    beat_at = time.monotonic() + HEARTBEAT_SECONDS
                self._look()

    def _beat(self) -> None:
        states = {"Ready": "True", "MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False"}
        conditions = [
            {"type": kind, "status": state, "reason": "StandIn", "lastHeartbeatTime": now()}
            for kind, state in states.items()
        ]
        status = {
            "capacity": self._capacity,
            "allocatable": self._capacity,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": self._node.host_address}],
        }
        self._client.patch(self._manifest, {"status": status}, type="strategic", subresource="status")

    def _look(self) -> None:
        selector = urllib.parse.quote(f"spec.nodeName={self.name}")
        answer = self._client.request("GET", f"/api/v1/pods?fieldSelector={selector}")
        seen = {pod["metadata"]["uid"]: {"apiVersion": "v1", "kind": "Pod", **pod} for pod in answer["items"]}
        for uid in self._pods.keys() - seen.keys():
            self._drop(uid)
        for uid, pod in seen.items():
            if uid in self._pods:
                self._pods[uid].see(pod)
            else:
                self._admit(uid, pod)

    def _admit(self, uid: str, pod: JSON) -> None:
        namespace = pod["metadata"]["namespace"]
        address = self._new_address()
        self._pods[uid] = Pod(pod, address, self._node, lambda kind, name: self._data(kind, name, namespace))

    def _new_address(self) -> str:
        """The one that was free longest; the first two aren't for pods."""
        for _ in range(2, SUBNET_SIZE):
            address = address_in(self._subnet, 2 + self._num_addresses % (SUBNET_SIZE - 2))
            self._num_addresses += 1
            if add_address(address):
                return address
        raise OSError(f"node {self.name} has no address left for a pod")

    def _drop(self, uid: str) -> None:
        pod = self._pods.pop(uid)
        pod.stop()
        remove_address(pod.address)
        if self._logs is not None:
            pod.keep_logs(self._logs)
        shutil.rmtree(pod.folder, ignore_errors=True)

    def _data(self, kind: str, name: str, namespace: str) -> Mapping[str, bytes] | None:
        found: dict[str, Any] | None = self._client.find("v1", kind, name, namespace=namespace)
        if found is None:
            return None
        data: Mapping[str, str] = found.get("data", {})
        if kind == "ConfigMap":
            return {key: value.encode() for key, value in data.items()}
        return {key: base64.b64decode(value) for key, value in data.items()}
