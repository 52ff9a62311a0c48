"""The volumes of a pod on the node stand-in: folders of this machine that follow the objects they show.

A service account's files lie where every client looks for them: its container sees that one path in a mount namespace
of its own. All other mounts are rewritten paths, see node_spec.relocate.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.client
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from control_client import ApiError, Client
from node_spec import JSON, Lookup, NotYet, field_of

ACCOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
_BIND = 'mkdir -p "$2" && mount --bind "$1" "$2" || exit 126; shift 2; exec "$@"'
_RENEWED_AFTER = 0.8
"""Of a token's lifetime."""


@contextmanager
def account_place(place: Path = Path(ACCOUNT_PATH)) -> Iterator[None]:
    """The folder at which pods see their account is there; left, the folders that were made for it are gone again.

    They stay while somebody else has entered, too: what is mounted on a folder elsewhere would go with it.
    """
    made = [each for each in (place, *place.parents) if not each.exists()]
    place.mkdir(parents=True, exist_ok=True)
    entered = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(entered, fcntl.LOCK_SH)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(entered, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in made:
                folder.rmdir()
        os.close(entered)


@functools.cache
def why_no_account() -> str:
    """One line on why no container can see a service account here; empty where one can."""
    try:
        done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    except OSError as error:
        return f"a Pod's service account needs `unshare`: {error.strerror}"
    return f"a Pod's service account needs a mount namespace: {done.stderr.strip()}" if done.returncode else ""


def seeing_account(command: Sequence[str], mounts: Mapping[str, str]) -> list[str]:
    """``command``, started where the service account's files are, if it mounts them; it keeps its process id."""
    if ACCOUNT_PATH not in mounts or why_no_account():
        return list(command)
    return ["unshare", "--mount", "/bin/sh", "-c", _BIND, "sh", mounts[ACCOUNT_PATH], ACCOUNT_PATH, *command]


@dataclass(eq=False, kw_only=True)
class Volumes:
    """What ``pod`` mounts, below ``folder``; claims are folders of the node, in ``claims``, so that they outlive it."""

    client: Client
    pod: JSON
    folder: Path
    claims: Path
    look_up: Lookup
    _tokens: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def mounts(self, container: JSON) -> dict[str, str]:
        """Where each mount path of the container lies on this machine; raises NotYet while something is missing."""
        places = {volume["name"]: self._place(volume) for volume in self._volumes()}
        return {each["mountPath"]: _inside(places, each) for each in container.get("volumeMounts", ())}

    def refresh(self) -> None:
        """Follow the objects, as a kubelet does; what can't be read now stays as it is."""
        for volume in self._volumes():
            try:
                self._place(volume)
            except (NotYet, ApiError, OSError, http.client.HTTPException):
                continue

    def _volumes(self) -> Sequence[JSON]:
        found: Sequence[JSON] = self.pod["spec"].get("volumes", ())
        return found

    def _place(self, volume: JSON) -> Path:
        place: Path = self.folder / str(volume["name"])
        if "persistentVolumeClaim" in volume:
            claim: str = volume["persistentVolumeClaim"]["claimName"]
            place = self.claims / self.pod["metadata"]["namespace"] / claim
        place.mkdir(parents=True, exist_ok=True)
        for name, content in self._files(volume).items():
            _write(place / name, content)
        return place

    def _files(self, volume: JSON) -> Mapping[str, bytes]:
        if "projected" in volume:
            parts = [self._projected(part) for part in volume["projected"]["sources"]]
            return {name: content for part in parts for name, content in part.items()}
        if "secret" in volume:
            return self._data("Secret", volume["secret"]["secretName"], volume["secret"])
        if "configMap" in volume:
            return self._data("ConfigMap", volume["configMap"]["name"], volume["configMap"])
        return {}

    def _projected(self, part: JSON) -> Mapping[str, bytes]:
        if "serviceAccountToken" in part:
            return {part["serviceAccountToken"]["path"]: self._token(part["serviceAccountToken"])}
        if "downwardAPI" in part:
            items = part["downwardAPI"].get("items", ())
            return {item["path"]: field_of(item["fieldRef"]["fieldPath"], self.pod).encode() for item in items}
        kind, source = ("Secret", part["secret"]) if "secret" in part else ("ConfigMap", part["configMap"])
        return self._data(kind, source["name"], source)

    def _data(self, kind: str, name: str, source: JSON) -> Mapping[str, bytes]:
        data = self.look_up(kind, name)
        if data is None and not source.get("optional"):
            raise NotYet("ContainerCreating", f'{kind.lower()} "{name}" not found')
        paths = {item["key"]: item["path"] for item in source.get("items", ())} or {key: key for key in data or {}}
        return {path: data[key] for key, path in paths.items() if data and key in data}

    def _token(self, source: JSON) -> bytes:
        """A token of the pod's service account that ends with the pod, renewed long before it expires."""
        audience, seconds = source.get("audience", ""), source.get("expirationSeconds", 3600)
        token, renewed_at = self._tokens.get(audience, (b"", 0.0))
        if time.monotonic() < renewed_at:
            return token
        metadata = self.pod["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        spec: JSON = {"expirationSeconds": seconds, "boundObjectRef": owner}
        if audience:
            spec["audiences"] = [audience]
        account = self.pod["spec"].get("serviceAccountName") or "default"
        path = self.client.path("v1", "ServiceAccount", account, "token", namespace=metadata["namespace"])
        answer = self.client.request(
            "POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        )
        fresh: bytes = answer["status"]["token"].encode()
        self._tokens[audience] = (fresh, time.monotonic() + _RENEWED_AFTER * seconds)
        return fresh


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
