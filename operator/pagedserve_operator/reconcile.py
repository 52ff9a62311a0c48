"""One look at one resource, as a table of contents: get, parse, tune, desire, observe, plan, execute, report.

Nothing is remembered between two looks but who waits for nodes: what is, is read from the API server; what was decided
stands on the Deployment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

from pagedserve_operator import status
from pagedserve_operator.cluster import Cluster
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.errors import ApiError, ChildRejected, GPUTypeRequired, GPUUnknown, Rejected, UserError
from pagedserve_operator.events import EventNote
from pagedserve_operator.keys import key_of_resource
from pagedserve_operator.metrics import Resources
from pagedserve_operator.names import API_VERSION, KIND, MANAGER, Key, selector_labels
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import Apply, ChildKey, Plan, plan
from pagedserve_operator.referenced import hash_of_referenced, refers
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuner import Tuner
from pagedserve_operator.tuning import Tuning

logger = logging.getLogger(__name__)

WAITING_SECONDS: Final = 2.0
"""Between looks at a name that an object on its way out still holds."""

_AUTOSCALER: Final = "HorizontalPodAutoscaler"
_NOTHING: Final = Plan()
_NEEDS_NODES: Final = (GPUTypeRequired, GPUUnknown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a look ended; ``again_seconds``: when to look next where time alone will change the verdict."""

    result: str
    gone: bool = False
    refers: bool = False
    again_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observed:
    """The world around one resource."""

    children: Mapping[ChildKey, Json | None]
    pods: tuple[Json, ...]
    autoscalers: tuple[Json, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What is to be done, or why nothing can be."""

    service: InferenceService | None = None
    tuning: Tuning | None = None
    plan: Plan = _NOTHING
    problem: UserError | None = None


class Reconciler:
    """Looks at resources; many looks may run at once, never two at the same key."""

    def __init__(
        self,
        cluster: Cluster,
        tuner: Tuner,
        config: OperatorConfig,
        resources: Resources,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._tuner = tuner
        self._config = config
        self._resources = resources
        self._now = now
        self._waiting_for_nodes: set[Key] = set()

    @property
    def waiting_for_nodes(self) -> Iterable[Key]:
        """Resources that a node may help."""
        return tuple(self._waiting_for_nodes)

    async def reconcile(self, key: Key) -> Look:
        """Make the resource's children what they should be and report; raises ApiError and NotLeading."""
        raw = await self._cluster.get(KIND, key.namespace, key.name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            return self._forget(key)
        observed = await self._observe(key)
        verdict = await self._decide(raw, observed)
        verdict, observed, changed = await self._execute(key, verdict, observed)
        reported, again = await self._report(raw, verdict, observed)
        self._remember(key, verdict)
        return Look(
            result="refused" if verdict.problem else "changed" if changed or reported else "unchanged",
            refers=verdict.service is not None and refers(verdict.service),
            again_seconds=_soonest(
                again,
                verdict.problem.retry_seconds if verdict.problem else None,
                WAITING_SECONDS if verdict.plan.waiting else None,
            ),
        )

    async def _observe(self, key: Key) -> _Observed:
        keys = child_keys(key.name, await self._cluster.served_kinds())
        places = [place for place in keys if place[0] != _AUTOSCALER]
        selector = ",".join(f"{label}={value}" for label, value in selector_labels(key.name).items())
        (pods, autoscalers), found = await asyncio.gather(
            asyncio.gather(
                self._cluster.list("Pod", key.namespace, selector=selector),
                self._cluster.list(_AUTOSCALER, key.namespace),
            ),
            asyncio.gather(*(self._cluster.get(kind, key.namespace, name) for kind, name in places)),
        )
        children: dict[ChildKey, Json | None] = dict(zip(places, found, strict=True))
        named = [scaler for scaler in autoscalers if scaler["metadata"]["name"] == key.name]
        children[_AUTOSCALER, key.name] = named[0] if named else None
        return _Observed(children=children, pods=tuple(pods), autoscalers=tuple(autoscalers))

    async def _decide(self, raw: Json, observed: _Observed) -> _Verdict:
        """What the children should be, or whose fault it is that nobody can say; nothing is half decided."""
        service: InferenceService | None = None
        tuning = kept = self._tuner.kept(_deployment(observed, raw))
        try:
            service = parse(raw)
            if service.spec.suspend:
                return _Verdict(service=service, tuning=kept)
            secrets = await hash_of_referenced(service, self._cluster)
            tuning = await self._tuner.tune(service, _deployment(observed, raw))
            facts = Facts(secrets_hash=secrets, served_kinds=await self._cluster.served_kinds())
            surge = await self._tuner.surge(
                service, tuning, facts, deployment=_deployment(observed, raw), blocked=_is_blocked(raw)
            )
            facts = replace(facts, surge=surge)
            manifests = desired(service, tuning, facts)
            return _Verdict(service=service, tuning=tuning, plan=plan(service, manifests, observed.children))
        except UserError as problem:
            return _Verdict(service=service, tuning=tuning, problem=problem)

    async def _execute(self, key: Key, verdict: _Verdict, observed: _Observed) -> tuple[_Verdict, _Observed, bool]:
        """Carry the plan out; a child that is refused for good keeps no other from being made."""
        children = dict(observed.children)
        refused: list[str] = []
        for going in verdict.plan.deletes:
            await self._cluster.delete(going.kind, key.namespace, going.name, uid=going.uid)
            children[going.kind, going.name] = None
        for coming in verdict.plan.applies:
            planned_on = children.get(coming.key)
            if coming.follows and planned_on is not None:
                if _has_replicas(planned_on, coming):
                    continue
                planned_on = _by_uid(planned_on)
            try:
                children[coming.key] = await self._apply(coming, planned_on)
            except Rejected as error:
                refused.append(f"{' '.join(coming.key)}: {error}")
        if not verdict.plan.empty:
            logger.info("%s: %s", key, verdict.plan.summary, extra={"fields": {"resource": str(key)}})
        if refused:
            verdict = replace(verdict, problem=ChildRejected(f"the API server refused {'; '.join(refused)}"))
        return verdict, replace(observed, children=children), not verdict.plan.empty

    async def _apply(self, coming: Apply, planned_on: Json | None) -> Json:
        return await self._cluster.apply(coming.manifest, manager=coming.manager, planned_on=planned_on)

    async def _report(self, raw: Json, verdict: _Verdict, observed: _Observed) -> tuple[bool, float | None]:
        """Write the status if it differs; events follow it, so that a transition is told once."""
        key = key_of_resource(raw)
        outcome = status.compute(
            raw,
            service=verdict.service,
            tuning=verdict.tuning,
            problem=verdict.problem,
            observation=_observation(raw, observed),
            now=self._now(),
        )
        self._resources.report(key, outcome.status["conditions"])
        if not status.differs(raw.get("status"), outcome.status):
            return False, outcome.look_again_seconds
        await self._cluster.patch_status(key, outcome.status, resource_version=raw["metadata"]["resourceVersion"])
        for note in outcome.events:
            await self._tell(raw, note)
        return True, outcome.look_again_seconds

    async def _tell(self, raw: Json, note: EventNote) -> None:
        try:
            await self._cluster.create(_event(raw, note, self._now()))
        except ApiError as error:
            logger.warning("event %s not written: %s", note.reason, error)

    def _remember(self, key: Key, verdict: _Verdict) -> None:
        if isinstance(verdict.problem, _NEEDS_NODES):
            self._waiting_for_nodes.add(key)
        else:
            self._waiting_for_nodes.discard(key)

    def _forget(self, key: Key) -> Look:
        # The garbage collector takes the children: they name their owner, and no finalizer holds it back.
        self._waiting_for_nodes.discard(key)
        self._resources.forget(key)
        return Look(result="unchanged", gone=True)


def _deployment(observed: _Observed, raw: Json) -> Json | None:
    return observed.children["Deployment", raw["metadata"]["name"]]


def _has_replicas(written: Json, coming: Apply) -> bool:
    # What a creation defaults to is what most resources want.
    return bool(written["spec"].get("replicas") == coming.manifest["spec"]["replicas"])


def _by_uid(written: Json) -> Json:
    # The controller marks what this look has just written: its version has moved, but it is the same object.
    return {"metadata": {"uid": written["metadata"]["uid"]}}


def _is_blocked(raw: Json) -> bool:
    conditions = (raw.get("status") or {}).get("conditions") or ()
    return any(row["type"] == "Progressing" and row["reason"] == "RolloutBlocked" for row in conditions)


def _observation(raw: Json, observed: _Observed) -> status.Observation:
    name = raw["metadata"]["name"]
    ours = observed.children[_AUTOSCALER, name]
    return status.Observation(
        deployment=_deployment(observed, raw),
        pods=observed.pods,
        hpa=ours,
        foreign_hpas=tuple(
            scaler["metadata"]["name"]
            for scaler in observed.autoscalers
            if _targets(scaler, name) and (ours is None or scaler["metadata"]["uid"] != ours["metadata"]["uid"])
        ),
        service=observed.children["Service", name],
    )


def _targets(scaler: Json, deployment: str) -> bool:
    target = scaler["spec"]["scaleTargetRef"]
    return bool(target["kind"] == "Deployment" and target["name"] == deployment)


def _soonest(*times: float | None) -> float | None:
    return min((seconds for seconds in times if seconds is not None), default=None)


def _event(raw: Json, note: EventNote, now: datetime) -> Json:
    metadata, at = raw["metadata"], now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": metadata["namespace"], "name": f"{metadata['name']}.{uuid4().hex[:16]}"},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            **{field: metadata[field] for field in ("namespace", "name", "uid", "resourceVersion")},
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message,
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
