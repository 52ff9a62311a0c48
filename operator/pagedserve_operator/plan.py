"""From the children that should be and those that are to the writes that close the gap; no write where there is none.

Replicas have a field manager of their own, which writes them at creation and afterwards only where the user states a
number and no autoscaler is on. It never lets go of the field: a field that its last owner drops falls back to its
default, which is one replica.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pagedserve_operator.drift import differences, owned_fields
from pagedserve_operator.errors import NameTaken
from pagedserve_operator.kinds import AUTOSCALER, KEDA_AUTOSCALER
from pagedserve_operator.names import API_VERSION, KIND, MANAGER, REPLICAS_MANAGER
from pagedserve_operator.obstacles import fitted, has_stuck_port
from pagedserve_operator.spec import InferenceService, Json

ChildKey = tuple[str, str]
"""Kind and name; the namespace is the resource's."""

_ORDER: Final = (
    "ConfigMap",
    "PersistentVolumeClaim",
    "Service",
    "Deployment",
    AUTOSCALER,
    KEDA_AUTOSCALER,
    "PodDisruptionBudget",
    "NetworkPolicy",
    "PodMonitor",
    "ServiceMonitor",
    "PrometheusRule",
)
_MOUNTED: Final = frozenset({"ConfigMap", "PersistentVolumeClaim"})
_RIVALS: Final = {AUTOSCALER: KEDA_AUTOSCALER, KEDA_AUTOSCALER: AUTOSCALER}
"""Two autoscalers of one Deployment would fight: one is made once the other is gone, finalizers of KEDA's included."""
_NAMED_PATHS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """A server-side apply of exactly these fields."""

    manifest: Json
    manager: str
    why: str
    follows: bool = False
    """Whether an earlier apply of this plan writes the same object: then that one's answer has the resource version."""

    @property
    def key(self) -> ChildKey:
        """Kind and name."""
        return self.manifest["kind"], self.manifest["metadata"]["name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """The deletion of one object, and of no other that has taken its name."""

    kind: str
    name: str
    uid: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Writes in their order: ``deletes`` first."""

    deletes: tuple[Delete, ...] = ()
    applies: tuple[Apply, ...] = ()
    waiting: tuple[str, ...] = ()
    """Names that objects on their way out still hold: look again in some seconds."""
    notes: tuple[str, ...] = ()
    """What the spec asks for and an existing object can't become, a sentence each."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.deletes or self.applies)

    @property
    def summary(self) -> str:
        """One line for the log."""
        writes = [f"delete {delete.kind} {delete.name} ({delete.why})" for delete in self.deletes]
        writes += [f"apply {' '.join(apply.key)} ({apply.why})" for apply in self.applies]
        return "; ".join([*writes, *(f"wait for {name}" for name in self.waiting)]) or "nothing to do"


def plan(service: InferenceService, desired: Sequence[Json], observed: Mapping[ChildKey, Json | None]) -> Plan:
    """What to write. ``observed`` holds every child that the resource could have (see desired.child_keys).

    Raises NameTaken where an object of somebody else stands in a child's place.
    """
    wanted = {(child["kind"], child["metadata"]["name"]): child for child in desired}
    applies: list[Apply] = []
    waiting: list[str] = []
    notes: list[str] = []
    deletes: list[Delete] = []
    for key, child in sorted(wanted.items(), key=lambda item: _ORDER.index(item[0][0])):
        existing = observed.get(key)
        if existing is not None and _is_leaving(service, existing):
            waiting.append(" ".join(key))
            continue
        _require_ours(service, key, existing)
        rival = (_RIVALS.get(key[0], ""), key[1])
        if existing is None and (found := observed.get(rival)) is not None and is_ours(service, found):
            waiting.append(" ".join(rival))
            continue
        if existing is not None and key[0] == "Service" and has_stuck_port(child, existing):
            deletes.append(_delete(key, existing, "another's port stands in the way of its own: to be made anew"))
            continue
        manifest, kept = fitted(child, existing)
        notes += kept
        writes = list(_apply(manifest, existing))
        applies += _with_replicas(service, writes, existing) if key[0] == "Deployment" else writes
    rolls = any(apply.key[0] == "Deployment" for apply in applies)
    deletes += _prune(service, wanted, observed, keep=_MOUNTED if rolls else frozenset())
    return Plan(deletes=tuple(deletes), applies=tuple(applies), waiting=tuple(waiting), notes=tuple(notes))


def _apply(manifest: Json, existing: Json | None) -> Iterator[Apply]:
    if existing is None:
        yield Apply(manifest=manifest, manager=MANAGER, why="is missing")
        return
    paths = list(differences(manifest, existing, manager=MANAGER))
    if paths:
        why = ", ".join(paths[:_NAMED_PATHS]) + (f" and {len(paths) - _NAMED_PATHS} more" * (len(paths) > _NAMED_PATHS))
        yield Apply(manifest=manifest, manager=MANAGER, why=why)


def _with_replicas(service: InferenceService, writes: list[Apply], existing: Json | None) -> list[Apply]:
    scaling = list(_replicas(service, existing, planned=bool(writes)))
    if existing is not None and scaling and scaling[0].manifest["spec"]["replicas"] < existing["spec"]["replicas"]:
        # Kubernetes' controller rolls nothing any more where a roll-out that has begun is scaled down to just the
        # pods that are left of the old template. And pods that are to go needn't be rolled.
        return [replace(scaling[0], follows=False), *writes]
    return [*writes, *scaling]


def _replicas(service: InferenceService, existing: Json | None, *, planned: bool) -> Iterator[Apply]:
    count = _stated_replicas(service, existing)
    if count is None or (existing is not None and existing.get("spec", {}).get("replicas") == count):
        return
    manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": service.key.name, "namespace": service.key.namespace},
        "spec": {"replicas": count},
    }
    why = f"replicas: {count}"
    yield Apply(manifest=manifest, manager=REPLICAS_MANAGER, why=why, follows=planned)


def _stated_replicas(service: InferenceService, existing: Json | None) -> int | None:
    """The number to write; None where it is another's to say.

    One replica that nobody owns is the API server's default: the Deployment was made and its number was not set yet.
    Another number that nobody owns was set by an autoscaler or by kubectl: scaling leaves no owner where was none.
    """
    spec = service.spec
    if existing is None or (existing.get("spec", {}).get("replicas") == 1 and not _has_owner_of_replicas(existing)):
        return spec.autoscaling.min_replicas if spec.autoscaling else 1 if spec.replicas is None else spec.replicas
    return None if spec.autoscaling else spec.replicas


def _has_owner_of_replicas(deployment: Json) -> bool:
    entries = deployment["metadata"].get("managedFields") or ()
    return any("f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {}) for entry in entries)


def _prune(
    service: InferenceService,
    wanted: Mapping[ChildKey, Json],
    observed: Mapping[ChildKey, Json | None],
    *,
    keep: frozenset[str],
) -> Iterator[Delete]:
    """Children that the spec no longer asks for. What pods mount waits until the Deployment no longer names it."""
    for key, existing in observed.items():
        if key in wanted or existing is None or key[0] in keep or not is_ours(service, existing):
            continue
        if "deletionTimestamp" not in existing["metadata"]:
            yield _delete(key, existing, "no longer asked for")


def _delete(key: ChildKey, existing: Json, why: str) -> Delete:
    kind, name = key
    metadata = existing["metadata"]
    return Delete(kind=kind, name=name, uid=metadata["uid"], why=why)


def is_ours(service: InferenceService, existing: Json) -> bool:
    """Whether the object is this resource's child.

    It is by its owner reference's UID; an object that nobody controls and that this operator has applied is adopted
    (its reference was removed by hand, or its owner was deleted with ``--cascade=orphan``).
    """
    if service.owner.owns(existing):
        return True
    return _controller(existing) is None and bool(owned_fields(existing, MANAGER))


def _is_leaving(service: InferenceService, existing: Json) -> bool:
    """Whether the object is being deleted, or will be: its owner was an earlier resource of the same name."""
    if service.owner.owns(existing):
        return "deletionTimestamp" in existing["metadata"]
    controller = _controller(existing) or {}
    named = (controller.get("apiVersion"), controller.get("kind"), controller.get("name"))
    return named == (API_VERSION, KIND, service.key.name)


def _require_ours(service: InferenceService, key: ChildKey, existing: Json | None) -> None:
    if existing is None or is_ours(service, existing):
        return
    controller = _controller(existing)
    whose = f"it belongs to {controller['kind']} {controller['name']}" if controller else "it has no owner"
    raise NameTaken(
        f"{key[0]} {key[1]} exists and isn't this resource's ({whose}): delete it, or give the InferenceService "
        "another name"
    )


def _controller(existing: Json) -> Mapping[str, Any] | None:
    references = existing["metadata"].get("ownerReferences") or ()
    return next((reference for reference in references if reference.get("controller")), None)
