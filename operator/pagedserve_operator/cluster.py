"""The only module that speaks to the API server on behalf of reconciles: reads, fenced writes, and one tree of errors.

Kopf has a session of its own for its watches (watches.py). Everything here goes through the official asynchronous
dynamic client, as plain JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import load_incluster_config, load_kube_config
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.dynamic import DynamicClient, Resource
from yaml import YAMLError

from pagedserve_operator import __version__
from pagedserve_operator.config import ConfigError
from pagedserve_operator.errors import ApiError, Conflict, Rejected, Unavailable
from pagedserve_operator.kinds import KINDS, OPTIONAL
from pagedserve_operator.names import KIND, MANAGER, Key
from pagedserve_operator.spec import Json

SERVED_SECONDS: Final = 60.0
"""How long the answer to "is this optional kind served" is good for."""

Fence = Callable[[], None]
"""Called right before each write; raises NotLeading where none may begin."""


async def load_configuration(kubeconfig: str) -> Configuration:
    """How to reach the API server: by the kubeconfig given, else the Pod's service account, else the default one.

    Raises ConfigError where none can be used.
    """
    configuration = Configuration()
    if not kubeconfig:
        try:
            load_incluster_config(client_configuration=configuration)
            return configuration
        except ConfigException:
            pass
    try:
        await load_kube_config(config_file=kubeconfig or None, client_configuration=configuration)
    except (ConfigException, YAMLError, OSError) as error:
        found = f"the kubeconfig {kubeconfig}" if kubeconfig else "no Pod's service account, and the default kubeconfig"
        raise ConfigError(f"KUBECONFIG: {found} can't be used: {' '.join(str(error).split())}") from error
    return configuration


class Cluster:
    """Objects by kind, namespace and name. Every method raises ApiError's leaves and nothing else of the client's."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        fence: Fence,
        request_seconds: float,
        middlewares: tuple[Any, ...] = (),
    ) -> None:
        # Retries are the work queue's: a hidden one would repeat a write behind the fence's back.
        configuration.retries = None
        configuration.client_session_kwargs = {"middlewares": middlewares}
        self._api = ApiClient(configuration)
        self._api.user_agent = f"{MANAGER}/{__version__}"
        self._dynamic = DynamicClient(self._api)
        self._fence = fence
        self._timeout = aiohttp.ClientTimeout(total=request_seconds)
        self._resources = {name: self._resource(name) for name in KINDS}
        self._served: tuple[float, frozenset[str]] | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None where there is none."""
        try:
            return await self._call(self._dynamic.get, kind, name=name, namespace=namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str | None = None, *, selector: str | None = None) -> list[Json]:
        """Every object of the kind, in one namespace or all; ``selector`` as in ``kubectl get -l``."""
        found = await self._call(self._dynamic.get, kind, namespace=namespace, label_selector=selector)
        # Items of a list carry neither kind nor apiVersion.
        head = {"apiVersion": KINDS[kind].api_version, "kind": kind}
        return [{**head, **item} for item in found["items"]]

    async def apply(self, manifest: Json, *, manager: str, planned_on: Json | None) -> Json:
        """Server-side apply of exactly the manifest's fields to the object that it was planned on, None where was none.

        Raises Conflict where that object has changed or is gone.
        """
        # A version that no object has: ignored where there is no object, a conflict where one was made meanwhile.
        metadata = {"resourceVersion": "1"} if planned_on is None else planned_on["metadata"]
        version = {field: metadata[field] for field in ("resourceVersion", "uid") if field in metadata}
        named = manifest["metadata"]
        self._fence()
        return await self._call(
            self._dynamic.request,
            None,
            method="patch",
            path=self._resources[manifest["kind"]].path(name=named["name"], namespace=named.get("namespace")),
            body=_yaml({**manifest, "metadata": {**named, **version}}),
            # With the character set the client sends the text as it is, and not as one JSON string.
            content_type="application/apply-patch+yaml; charset=utf-8",
            field_manager=manager,
            force_conflicts=True,
        )

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        """Delete the object with this UID, in the background; one that is gone already is fine."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        self._fence()
        try:
            await self._call(self._dynamic.delete, kind, name=name, namespace=namespace, body=body)
        except ApiError as error:
            if error.status != 404:
                raise

    async def patch_status(self, key: Key, status: Mapping[str, Any], *, resource_version: str) -> Json:
        """Make ``status`` (whole) the resource's; raises Conflict where the resource has moved."""
        # Naming the version that the patch was computed on makes the server compare it.
        body = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": resource_version},
            {"op": "add", "path": "/status", "value": status},
        ]
        path = f"{self._resources[KIND].path(name=key.name, namespace=key.namespace)}/status"
        self._fence()
        return await self._call(
            self._dynamic.request,
            None,
            method="patch",
            path=path,
            body=body,
            content_type="application/json-patch+json",
            field_manager=MANAGER,
        )

    async def create(self, manifest: Json) -> Json:
        """Create the object (Events); raises Conflict where the name is taken."""
        self._fence()
        namespace = manifest["metadata"]["namespace"]
        return await self._call(self._dynamic.create, manifest["kind"], body=manifest, namespace=namespace)

    async def review_access(self, spec: Json) -> Json:
        """The ``status`` of a SubjectAccessReview of this ``spec``: a question, which no fence holds back."""
        kind = KINDS["SubjectAccessReview"]
        body = {"apiVersion": kind.api_version, "kind": kind.name, "spec": spec}
        answer = await self._call(self._dynamic.create, kind.name, body=body)
        return cast(Json, answer["status"])

    async def put_lease(self, lease: Json) -> Json:
        """Create the Lease, or replace the version that it carries: the one write that no fence holds back."""
        verb = self._dynamic.replace if "resourceVersion" in lease["metadata"] else self._dynamic.create
        return await self._call(verb, "Lease", body=lease, namespace=lease["metadata"]["namespace"])

    async def served_kinds(self) -> frozenset[str]:
        """The optional kinds that the API server knows, at most a minute old."""
        now = asyncio.get_running_loop().time()
        if self._served is None or now - self._served[0] > SERVED_SECONDS:
            self._served = (now, await self._find_served())
        return self._served[1]

    async def _find_served(self) -> frozenset[str]:
        versions = sorted({KINDS[kind].api_version for kind in OPTIONAL})
        found = await asyncio.gather(*map(self._kinds_of, versions))
        return OPTIONAL & frozenset().union(*found)

    async def _kinds_of(self, api_version: str) -> set[str]:
        try:
            found = await self._call(self._dynamic.request, None, method="get", path=f"/apis/{api_version}")
        except ApiError as error:
            if error.status in (403, 404):
                return set()
            raise
        return {resource["kind"] for resource in found["resources"]}

    async def _call(self, verb: Callable[..., Awaitable[Any]], kind: str | None, **arguments: Any) -> Json:
        leading = {} if kind is None else {"resource": self._resources[kind]}
        try:
            answer = await verb(**leading, **arguments, serializer=_plain, _request_timeout=self._timeout)
        except ApiException as error:
            raise _translate(error) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"no answer from the API server: {str(error) or type(error).__name__}") from error
        return cast(Json, answer)

    def _resource(self, name: str) -> Any:
        kind = KINDS[name]
        return Resource(
            prefix="apis" if kind.group else "api",
            group=kind.group,
            api_version=kind.version,
            kind=kind.name,
            name=kind.plural,
            namespaced=kind.namespaced,
            client=self._dynamic,
        )


_WRONG_TYPE: Final = "failed to create typed patch object"
"""The API server answers a field of the wrong type in a server-side apply with 500."""


def _yaml(value: Json) -> str:
    """JSON that is YAML too, as which the API server reads an apply: YAML refuses surrogate pairs and raw controls."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\uffff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _plain(_: Any, data: Any) -> Any:
    return data


def _translate(error: Any) -> ApiError:
    message = _message(error)
    status = int(error.status or 0)
    if status == 409:
        return Conflict(message, status=status)
    if status in (400, 403, 405, 413, 415, 422) or _WRONG_TYPE in message:
        return Rejected(message, status=status)
    if status in (401, 408, 429) or status >= 500 or status == 0:
        return Unavailable(message, status=status, retry_after=_retry_after(error.headers))
    return ApiError(message, status=status)


def _message(error: Any) -> str:
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason or ''} {body or ''}".strip()


def _retry_after(headers: Mapping[str, str] | None) -> float | None:
    try:
        return float((headers or {})["Retry-After"])
    except (KeyError, ValueError):
        return None
