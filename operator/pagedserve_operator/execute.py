"""Carrying out a plan: the writes in their order, each on what it was planned on."""

from __future__ import annotations

from collections.abc import Mapping

from pagedserve_operator.cluster import Cluster
from pagedserve_operator.errors import ChildRejected, Rejected
from pagedserve_operator.names import Key
from pagedserve_operator.plan import Apply, ChildKey, Plan
from pagedserve_operator.spec import Json

Children = Mapping[ChildKey, Json | None]


async def execute(cluster: Cluster, key: Key, plan: Plan, children: Children) -> tuple[Children, ChildRejected | None]:
    """The children as the writes leave them; one that is refused for good keeps no other from being written.

    Raises ApiError where a write may pass at the next look.
    """
    left, refused = dict(children), []
    for going in plan.deletes:
        try:
            await cluster.delete(going.kind, key.namespace, going.name, uid=going.uid)
            left[going.kind, going.name] = None
        except Rejected as error:
            refused.append(f"to delete {going.kind} {going.name}: {error}")
    for coming in plan.applies:
        before = left.get(coming.key)
        if coming.follows and (before is None or _has_replicas(before, coming)):
            continue
        planned_on = _by_uid(before) if before is not None and coming.follows else before
        try:
            left[coming.key] = await cluster.apply(coming.manifest, manager=coming.manager, planned_on=planned_on)
        except Rejected as error:
            refused.append(f"{' '.join(coming.key)}: {error}")
    return left, ChildRejected(f"the API server refused {'; '.join(refused)}") if refused else None


def _has_replicas(written: Json, coming: Apply) -> bool:
    # What a creation defaults to is what most resources want.
    return bool(written["spec"].get("replicas") == coming.manifest["spec"]["replicas"])


def _by_uid(written: Json) -> Json:
    # The controller marks what this plan has just written: its version has moved, but it is the same object.
    return {"metadata": {"uid": written["metadata"]["uid"]}}
