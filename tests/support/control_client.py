"""A small blocking client of the API server for tests: objects are the JSON that the server speaks."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import time
import urllib.parse
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from control_access import Access

JSON = dict[str, Any]
Objects = list[JSON]
_Connections = list[http.client.HTTPSConnection]
Found = TypeVar("Found")
WAITING_SECONDS = 60.0
_PATCHES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}
_BROKEN = (ConnectionError, ssl.SSLError, http.client.CannotSendRequest)


class ApiError(Exception):
    """The API server refused; ``status`` is its Status object."""

    def __init__(self, code: int, status: JSON) -> None:
        super().__init__(f"{code} {status.get('reason', '')}: {status.get('message', status)}")
        self.code = code
        self.status = status
        self.reason: str = status.get("reason", "")


@dataclass(eq=False)
class Client:
    """Requests as one user. Kinds are named as manifests name them; what the server offers is asked once per group."""

    access: Access
    user_agent: str = "tests"
    _kinds: dict[tuple[str, str], JSON] = field(default_factory=dict)
    _idle: _Connections = field(default_factory=list)

    def __post_init__(self) -> None:
        # Clients are made in passing; the last reference takes the connections along. Any thread may use one client.
        weakref.finalize(self, _close_all, self._idle)

    def get(self, api_version: str, kind: str, name: str, *, namespace: str | None = None) -> JSON:
        return self._object("GET", self.path(api_version, kind, name, namespace=namespace))

    def find(self, api_version: str, kind: str, name: str, *, namespace: str | None = None) -> JSON | None:
        """The object, or None where there is none."""
        try:
            return self.get(api_version, kind, name, namespace=namespace)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, api_version: str, kind: str, *, namespace: str | None = None, labels: str = "") -> Objects:
        path = self.path(api_version, kind, namespace=namespace)
        items: Objects = self.request("GET", f"{path}?labelSelector={urllib.parse.quote(labels)}")["items"]
        # A list leaves out what it says once for all.
        return [{"apiVersion": api_version, "kind": kind, **item} for item in items]

    def create(self, manifest: JSON, *, subresource: str = "") -> JSON:
        name = manifest["metadata"].get("name", "") if subresource else ""
        return self._object("POST", self._path_of(manifest, name, subresource), manifest)

    def replace(self, manifest: JSON, *, subresource: str = "") -> JSON:
        return self._object("PUT", self._path_of(manifest, manifest["metadata"]["name"], subresource), manifest)

    def apply(self, manifest: JSON, *, manager: str = "tests", force: bool = True, subresource: str = "") -> JSON:
        """Server-side apply."""
        path = self._path_of(manifest, manifest["metadata"]["name"], subresource)
        query = urllib.parse.urlencode({"fieldManager": manager, "force": str(force).lower()})
        return self._object("PATCH", f"{path}?{query}", manifest, content_type="application/apply-patch+yaml")

    def patch(
        self,
        target: JSON,
        patch: Any,
        *,
        type: str = "merge",
        subresource: str = "",
        manager: str = "tests",
    ) -> JSON:
        """Patch the object that ``target`` names; ``type`` is merge, json or strategic."""
        path = self._path_of(target, target["metadata"]["name"], subresource)
        return self._object("PATCH", f"{path}?fieldManager={manager}", patch, content_type=_PATCHES[type])

    def delete(
        self,
        api_version: str,
        kind: str,
        name: str,
        *,
        namespace: str | None = None,
        propagation: str = "Background",
        grace_seconds: int | None = None,
    ) -> None:
        """Ask for the end of an object; it is no error where there is none."""
        body: JSON = {"propagationPolicy": propagation}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            self.request("DELETE", self.path(api_version, kind, name, namespace=namespace), body)
        except ApiError as error:
            if error.code != 404:
                raise

    def wait(
        self,
        probe: Callable[[], Found | None],
        what: str,
        *,
        seconds: float = WAITING_SECONDS,
        every: float = 0.05,
    ) -> Found:
        """The first truthy value of ``probe``; errors are waited out. Raises TimeoutError naming ``what``."""
        deadline = time.monotonic() + seconds
        while True:
            seen: object
            try:
                if found := probe():
                    return found
                seen = found
            except (ApiError, OSError, http.client.HTTPException) as error:
                seen = error
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what} (last seen: {seen!r})")
            time.sleep(every)

    def wait_gone(self, api_version: str, kind: str, name: str, *, namespace: str | None = None) -> None:
        def gone() -> bool:
            return self.find(api_version, kind, name, namespace=namespace) is None

        self.wait(gone, f"{kind} {name} is gone")

    def path(
        self, api_version: str, kind: str, name: str = "", subresource: str = "", *, namespace: str | None = None
    ) -> str:
        """The URL path of a kind's collection, of one object, or of its subresource."""
        resource = self._resource(api_version, kind)
        parts = [_root(api_version)]
        if resource["namespaced"] and namespace is not None:
            parts += ["namespaces", namespace]
        return "/".join([*parts, resource["name"], *filter(None, (name, subresource))])

    def request(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Any:
        """Any request; the answer's JSON, or its text where it is none. Raises ApiError from code 400."""
        headers: dict[str, str] = {"Accept": "application/json", "User-Agent": self.user_agent}
        if self.access.token is not None:
            headers["Authorization"] = f"Bearer {self.access.token}"
        data = None
        if body is not None:
            # Plain ASCII but for what takes two escapes: an apply is read as YAML, which knows no surrogate pairs.
            text = json.dumps(body, ensure_ascii=False)
            data = re.sub("[\x7f-\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text).encode()
            headers["Content-Type"] = content_type
        code, answer = self._exchange(method, path, data, headers)
        try:
            document = json.loads(answer)
        except ValueError:
            document = answer.decode(errors="replace")
        if code >= 400:
            raise ApiError(code, document if isinstance(document, dict) else {"message": document})
        return document

    def _object(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> JSON:
        answer: JSON = self.request(method, path, body, content_type=content_type)
        return answer

    def _exchange(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """On an idle connection; where the server closed that meanwhile, on a new one."""
        while self._idle:
            connection = self._idle.pop()
            try:
                return self._send(connection, method, path, data, headers)
            except _BROKEN:
                continue
        place = urllib.parse.urlsplit(self.access.url).netloc
        fresh = http.client.HTTPSConnection(place, context=self.access.context, timeout=WAITING_SECONDS)
        return self._send(fresh, method, path, data, headers)

    def _send(
        self,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[int, bytes]:
        try:
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            answer = response.status, response.read()
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def _path_of(self, manifest: JSON, name: str, subresource: str) -> str:
        namespace = manifest["metadata"].get("namespace")
        return self.path(manifest["apiVersion"], manifest["kind"], name, subresource, namespace=namespace)

    def _resource(self, api_version: str, kind: str) -> JSON:
        if (api_version, kind) not in self._kinds:
            for resource in self.request("GET", _root(api_version))["resources"]:
                if "/" not in resource["name"]:
                    self._kinds[api_version, resource["kind"]] = resource
        return self._kinds[api_version, kind]


def _close_all(idle: _Connections) -> None:
    while idle:
        idle.pop().close()


def _root(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
