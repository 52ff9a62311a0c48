"""Children on a real API server: what a plan asks for is done, and single fields are edited as a person would."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from control_client import ApiError, Client
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.plan import ChildKey, Plan
from pagedserve_operator.spec import Json

Pointer = tuple[str | int, ...]
MUST_NOT_EXIST = {"resourceVersion": "1"}
"""Server-side apply ignores a version where there is no object, and no object has this one."""
_ROW_KEYS = ("name", "mountPath", "containerPort", "port", "uid", "topologyKey")


class LiveServer:
    """One namespace of a cluster, with the operations that a plan needs."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace

    def observe(self, keys: tuple[ChildKey, ...]) -> dict[ChildKey, Json | None]:
        return {key: self.find(key) for key in keys}

    def find(self, key: ChildKey) -> Json | None:
        kind, name = key
        return self.client.find(KINDS[kind].api_version, kind, name, namespace=self.namespace)

    def get(self, key: ChildKey) -> Json:
        found = self.find(key)
        assert found is not None, key
        return found

    def execute(self, plan: Plan, *, on_absence: bool = False) -> None:
        """Write what the plan says; ``on_absence``: as a plan does that saw no object."""
        for delete in plan.deletes:
            path = self.client.path(KINDS[delete.kind].api_version, delete.kind, delete.name, namespace=self.namespace)
            preconditions = {"uid": delete.uid}
            self.client.request("DELETE", path, {"preconditions": preconditions, "propagationPolicy": "Background"})
        for apply in plan.applies:
            found = self.find(apply.key)
            condition = MUST_NOT_EXIST if found is None or on_absence else {"uid": found["metadata"]["uid"]}
            manifest = {**apply.manifest, "metadata": {**apply.manifest["metadata"], **condition}}
            self.client.apply(manifest, manager=apply.manager)


def leaves(manifest: Any, observed: Any, at: Pointer = ()) -> Iterator[Pointer]:
    """Where in ``observed`` each scalar of ``manifest`` stands."""
    if isinstance(manifest, dict):
        for name, value in manifest.items():
            if isinstance(observed, dict) and name in observed:
                yield from leaves(value, observed[name], (*at, name))
    elif isinstance(manifest, list):
        for index, item in enumerate(manifest):
            place = _place(item, observed, index)
            yield from leaves(item, observed[place], (*at, place))
    else:
        yield at


def read(observed: Any, at: Pointer) -> Any:
    """The value there, or None."""
    for step in at:
        try:
            observed = observed[step]
        except (KeyError, IndexError, TypeError):
            return None
    return observed


def edits(observed: Json, at: Pointer) -> Iterator[list[Json]]:
    """JSON patches that change or remove the value at ``at``; which of them the server accepts is its affair."""
    path = "/" + "/".join(str(step).replace("~", "~0").replace("/", "~1") for step in at)
    for value in _others(read(observed, at)):
        yield [{"op": "replace", "path": path, "value": value}]
    yield [{"op": "remove", "path": path}]


def edit(server: LiveServer, observed: Json, patch: list[Json]) -> Json | None:
    """The object after the edit; None where the server refuses it or nothing has changed by it."""
    try:
        after = server.client.patch(observed, patch, type="json", manager="somebody")
    except ApiError as error:
        if error.code not in (400, 403, 422):
            raise
        return None
    return after if _content(after) != _content(observed) else None


def _content(found: Json) -> Json:
    content = copy.deepcopy({name: value for name, value in found.items() if name != "status"})
    for name in ("managedFields", "resourceVersion", "generation"):
        content["metadata"].pop(name, None)
    return content


def _others(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        yield max(0, value - 1)
    elif isinstance(value, str):
        yield f"{value}x"
        yield from _OTHER_WORDS.get(value, ())
        yield "9"


_OTHER_WORDS = {
    "RollingUpdate": ["Recreate"],
    "TCP": ["UDP"],
    "HTTP": ["HTTPS"],
    "ClusterIP": ["NodePort"],
    "Percent": ["Pods"],
    "Max": ["Min"],
    "In": ["NotIn"],
    "Exists": ["Equal"],
    "NoSchedule": ["NoExecute"],
    "ScheduleAnyway": ["DoNotSchedule"],
    "RuntimeDefault": ["Unconfined"],
    "OnRootMismatch": ["Always"],
    "FallbackToLogsOnError": ["File"],
    "AlwaysAllow": ["IfHealthyBudget"],
    "IfNotPresent": ["Always"],
    "ContainerResource": ["Resource"],
    "Memory": [""],
}


def _place(item: Any, observed: list[Any], index: int) -> int:
    keys = [key for key in _ROW_KEYS if key in item] if isinstance(item, dict) else []
    places = (place for key in keys for place, row in enumerate(observed) if row.get(key) == item[key])
    return next(places, index)
