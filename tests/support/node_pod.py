"""One pod on the node stand-in: its volumes, its containers in order, its status, and its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from control_client import ApiError, Client
from node_container import Container, Launch, now
from node_spec import JSON, Images, Lookup, NotYet, command_of, environment_of, relocate

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
        self._namespace: str = pod["metadata"]["namespace"]
        self.folder = node.folder / "pods" / self.uid
        self._node = node
        self._look_up = look_up
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
            self._refresh()
        try:
            self._report()
            if self._leaving and not any(container.running for container in every):
                self._remove()
        except (ApiError, OSError) as error:
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
            prepare=partial(self._prepare, spec),
            restarts_on=restarts_on[policy],
            grace=self.document["spec"].get("terminationGracePeriodSeconds", 30),
            backoff=self._node.backoff / self._node.hurry,
            hurry=self._node.hurry,
        )

    def _prepare(self, spec: JSON) -> Launch:
        places = {volume["name"]: self._place(volume) for volume in self.document["spec"].get("volumes", ())}
        mounts = {each["mountPath"]: _inside(places, each) for each in spec.get("volumeMounts", ())}
        here = {**self.document, "status": {"podIP": self.address, "hostIP": self._node.host_address}}
        environment = environment_of(spec, here, self._look_up)
        local = {name: relocate(value, mounts) for name, value in environment.items()}
        parts = command_of(spec, self._node.images, environment)
        # What stands for the image is a program of this machine, wherever that lies.
        own_parts = len(self._node.images.get(spec["image"]) or ())
        command = [*parts[:own_parts], *(relocate(part, mounts) for part in parts[own_parts:])]
        own = {
            "HOST": self.address,
            "TERMINATION_MESSAGE_PATH": str(self.folder / spec["name"] / "termination-log"),
        }
        return Launch(
            command=command,
            environment={"PATH": os.environ.get("PATH", ""), "HOME": str(self.folder), **local, **own},
        )

    def _place(self, volume: JSON) -> Path:
        """The folder of a volume; a claim's is the node's, so that it outlives the pod."""
        place: Path = self.folder / "volumes" / str(volume["name"])
        if "persistentVolumeClaim" in volume:
            claim: str = volume["persistentVolumeClaim"]["claimName"]
            place = self._node.folder / "claims" / self._namespace / claim
        place.mkdir(parents=True, exist_ok=True)
        for name, content in self._files(volume).items():
            _write(place / name, content)
        return place

    def _files(self, volume: JSON) -> Mapping[str, bytes]:
        source, kind, key = volume.get("secret"), "Secret", "secretName"
        if source is None:
            source, kind, key = volume.get("configMap"), "ConfigMap", "name"
        if source is None:
            return {}
        data = self._look_up(kind, source[key])
        if data is None and not source.get("optional"):
            raise NotYet("ContainerCreating", f'{kind.lower()} "{source[key]}" not found')
        names = {item["key"]: item["path"] for item in source.get("items", ())} or {name: name for name in data or {}}
        return {path: data[name] for name, path in names.items() if data and name in data}

    def _refresh(self) -> None:
        """Secrets and ConfigMaps that are mounted follow their objects, as they do on a kubelet."""
        for volume in self.document["spec"].get("volumes", ()):
            try:
                self._place(volume)
            except (NotYet, ApiError, OSError):
                continue

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


def _inside(places: Mapping[str, Path], mount: JSON) -> str:
    place = places[mount["name"]]
    return str(place / mount["subPath"]) if "subPath" in mount else str(place)


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one go, and only where it differs: its reader may look at its time."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.replace(path)
