"""What was asked of the API server, read from its audit log: writes are counted here, never inferred."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from control_client import Client

OWN_USERS = ("system:apiserver", "system:kube-controller-manager", "system:kube-scheduler", "system:kwok")
"""The control plane's own programs, which the log leaves out."""
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
_MARK = "audit-mark-"
_CHUNK = 4096


@dataclass(frozen=True)
class AuditEntry:
    """One finished request; ``resource`` is the plural name, and fields that a request has not are empty."""

    verb: str
    user: str
    user_agent: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    uri: str
    at: str

    @property
    def is_write(self) -> bool:
        """Whether it asked for a change, dry runs and refused ones included."""
        return self.verb in WRITES


class AuditLog:
    """Reads the log between marks. A mark is a place in the file behind every request that had been answered."""

    def __init__(self, path: Path, client: Callable[[], Client]) -> None:
        self._path = path
        self._client = client
        self._numbers = itertools.count(1)

    def mark(self) -> int:
        """A place for ``since``: behind every request that was answered before this call."""
        self._settle()
        return self._end()

    def since(self, mark: int = 0) -> list[AuditEntry]:
        """Requests answered since ``mark``, in the log's order; long-running ones stand where they ended."""
        self._settle()
        return [entry for entry in self._read(mark) if not entry.name.startswith(_MARK)]

    def writes(self, mark: int = 0, *, user: str | None = None, but: Sequence[str] = ()) -> list[AuditEntry]:
        """Write requests since ``mark``, by ``user`` alone where one is given, but for the resources in ``but``."""
        written = [entry for entry in self.since(mark) if entry.is_write and entry.resource not in but]
        return [entry for entry in written if user is None or entry.user == user]

    def _settle(self) -> None:
        """Wait for a request of ours in the log: an answer is seen before its line is written."""
        client, name, begin = self._client(), f"{_MARK}{next(self._numbers)}", self._end()
        client.find("v1", "Namespace", name)
        client.wait(lambda: any(entry.name == name for entry in self._read(begin)), f"{name} is in the audit log")

    def _end(self) -> int:
        """Behind the last whole line: the next one may be there in part."""
        with self._path.open("rb") as lines:
            place = lines.seek(0, 2)
            while place > 0:
                begin = max(0, place - _CHUNK)
                lines.seek(begin)
                if (found := lines.read(place - begin).rfind(b"\n")) >= 0:
                    return begin + found + 1
                place = begin
        return 0

    def _read(self, begin: int) -> Iterator[AuditEntry]:
        with self._path.open("rb") as lines:
            lines.seek(begin)
            for line in lines:
                # The last line may still be growing.
                if line.endswith(b"\n"):
                    yield _entry(json.loads(line))


def policy() -> str:
    """The audit policy: metadata of every finished request to a resource, but for the control plane's own."""
    # Addons that run as service accounts of kube-system are the control plane's, too.
    silent = [{"level": "None", "users": list(OWN_USERS)}]
    silent += [{"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]}]
    silent += [{"level": "None", "nonResourceURLs": ["/*"]}]
    document = {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted", "Panic"],
        "omitManagedFields": True,
        "rules": [*silent, {"level": "Metadata"}],
    }
    return yaml.safe_dump(document)


def _entry(event: dict[str, Any]) -> AuditEntry:
    target = event.get("objectRef", {})
    return AuditEntry(
        verb=event["verb"],
        user=event["user"]["username"],
        user_agent=event.get("userAgent", ""),
        group=target.get("apiGroup", ""),
        resource=target.get("resource", ""),
        subresource=target.get("subresource", ""),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=event.get("responseStatus", {}).get("code", 0),
        uri=event["requestURI"],
        at=event["stageTimestamp"],
    )
