"""One pod on the node stand-in: its volumes, its containers in order, its status, and its end."""

from __future__ import annotations

import http.client
import os
import shutil
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from control_client import ApiError, Client
from node_container import Container, Launch, now
from node_spec import JSON, Images, Lookup, NotYet, command_of, environment_of, relocate
from node_volumes import Volumes, seeing_account

TICK_SECONDS = 0.05
_REFRESH_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a node gives each of its pods."""

    client: Client
    host_address: str
    folder: Path
    images: Images
    backoff: float
    hurry: float


class Pod:
    """A pod in a thread of its own; ``see`` hands it what the API server says of it now."""

    def __init__(self, pod: JSON, address: str, node: Surroundings, look_up: Lookup) -> None:
        self.document = pod
        self.address = address
        self.uid: str = pod["metadata"]["uid"]
        self.folder = node.folder / "pods" / self.uid
        self._node = node
        self._look_up = look_up
        self._volumes = Volumes(
            client=node.client, pod=pod, folder=self.folder / "volumes", claims=node.folder / "claims", look_up=look_up
        )
        self._start_time = now()
        self._written: JSON = {}
        self._since: dict[str, tuple[str, str]] = {}
        self._leaving = False
        self._refresh_at = 0.0
        self._over = threading.Event()
        self.starting = [self._container(spec, once=True) for spec in pod["spec"].get("initContainers", ())]
        self.containers = [self._container(spec) for spec in pod["spec"]["containers"]]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def see(self, pod: JSON) -> None:
        """Take notice of a newer version of it."""
        self.document = pod

    def stop(self) -> None:
        """End its processes now; it is no longer reported on."""
        self._over.set()
        self.thread.join()

    def keep_logs(self, folder: Path) -> None:
        """Copy what its containers wrote into ``folder``, one file each."""
        metadata = self.document["metadata"]
        for container in (*self.starting, *self.containers):
            if container.log.exists():
                name = f"{metadata['namespace']}_{metadata['name']}_{self.uid[:8]}_{container.spec['name']}.log"
                shutil.copyfile(container.log, folder / name)

    def _run(self) -> None:
        try:
            while not self._over.wait(TICK_SECONDS):
                self._tick(time.monotonic())
        finally:
            for container in (*self.starting, *self.containers):
                container.kill()

    def _tick(self, moment: float) -> None:
        every = (*self.starting, *self.containers)
        if "deletionTimestamp" in self.document["metadata"] and not self._leaving:
            self._leaving = True
            for container in every:
                container.leave(moment, self.document["metadata"].get("deletionGracePeriodSeconds", 30))
        for container in self._due():
            container.tick(moment)
        if moment >= self._refresh_at:
            self._refresh_at = moment + _REFRESH_SECONDS
            self._volumes.refresh()
        try:
            self._report()
            if self._leaving and not any(container.running for container in every):
                self._remove()
        except (ApiError, OSError, http.client.HTTPException) as error:
            if isinstance(error, ApiError) and error.code == 404:
                self._over.set()

    def _due(self) -> list[Container]:
        """The containers whose turn it is: those that come first, one by one, then all others."""
        if self._leaving:
            return [*self.starting, *self.containers]
        first = next((each for each in self.starting if not _succeeded(each)), None)
        return self.containers if first is None else [first]

    def _container(self, spec: JSON, *, once: bool = False) -> Container:
        policy = self.document["spec"].get("restartPolicy", "Always")
        restarts_on = {"Always": lambda code: bool(code) or not once, "OnFailure": bool, "Never": lambda _: False}
        return Container(
            spec=spec,
            address=self.address,
            folder=self.folder / spec["name"],
            prepare=partial(self._prepare_or_wait, spec),
            restarts_on=restarts_on[policy],
            grace=self.document["spec"].get("terminationGracePeriodSeconds", 30),
            backoff=self._node.backoff / self._node.hurry,
            hurry=self._node.hurry,
        )

    def _prepare_or_wait(self, spec: JSON) -> Launch:
        try:
            return self._prepare(spec)
        except (ApiError, OSError, http.client.HTTPException) as error:
            raise NotYet("ContainerCreating", str(error)) from error

    def _prepare(self, spec: JSON) -> Launch:
        mounts = self._volumes.mounts(spec)
        here = {**self.document, "status": {"podIP": self.address, "hostIP": self._node.host_address}}
        environment = environment_of(spec, here, self._look_up)
        local = {name: relocate(value, mounts) for name, value in environment.items()}
        parts = command_of(spec, self._node.images, environment)
        # What stands for the image is a program of this machine, wherever that lies.
        own_parts = len(self._node.images.get(spec["image"]) or ())
        command = [*parts[:own_parts], *(relocate(part, mounts) for part in parts[own_parts:])]
        own = {
            "HOST": self.address,
            "METRICS_HOST": self.address,
            "METRICS_API_HOST": self.address,
            "TERMINATION_MESSAGE_PATH": str(self.folder / spec["name"] / "termination-log"),
        }
        given = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), **self._api_server()}
        return Launch(command=seeing_account(command, mounts), environment={**given, **local, **own})

    def _api_server(self) -> Mapping[str, str]:
        """Where programs in pods find it; a kubelet tells every container."""
        place = urllib.parse.urlsplit(self._node.client.access.url)
        return {"KUBERNETES_SERVICE_HOST": str(place.hostname), "KUBERNETES_SERVICE_PORT": str(place.port)}

    def _report(self) -> None:
        status = self._status()
        if status == self._written:
            return
        self._node.client.patch(
            self.document, {"status": status}, type="strategic", subresource="status", manager="node-stand-in"
        )
        self._written = status

    def _status(self) -> JSON:
        initialized = all(map(_succeeded, self.starting))
        ready = initialized and all(container.ready for container in self.containers)
        states = {"Initialized": initialized, "ContainersReady": ready, "Ready": ready}
        return {
            "phase": self._phase(),
            "hostIP": self._node.host_address,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self._start_time,
            "conditions": [self._condition(kind, "True" if state else "False") for kind, state in states.items()],
            "initContainerStatuses": [_finished(container) for container in self.starting],
            "containerStatuses": [container.status() for container in self.containers],
        }

    def _condition(self, kind: str, state: str) -> JSON:
        if self._since.get(kind, ("", ""))[0] != state:
            self._since[kind] = (state, now())
        reason = {"reason": "ContainersNotReady"} if state == "False" else {}
        return {"type": kind, "status": state, "lastTransitionTime": self._since[kind][1], **reason}

    def _phase(self) -> str:
        if not all(map(_succeeded, self.starting)):
            failed = any(container.done for container in self.starting if not _succeeded(container))
            return "Failed" if failed else "Pending"
        if all(container.done for container in self.containers):
            return "Succeeded" if all(map(_succeeded, self.containers)) else "Failed"
        begun = any(each.running or each.terminated or each.restarts for each in self.containers)
        return "Running" if begun else "Pending"

    def _remove(self) -> None:
        """The last word: the object goes."""
        metadata = self.document["metadata"]
        path = self._node.client.path("v1", "Pod", metadata["name"], namespace=metadata["namespace"])
        self._node.client.request("DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})
        self._over.set()


def _succeeded(container: Container) -> bool:
    return container.terminated is not None and container.terminated["exitCode"] == 0


def _finished(container: Container) -> JSON:
    """The status of an init container, which is ready once it has succeeded."""
    return {**container.status(), "ready": _succeeded(container)}
