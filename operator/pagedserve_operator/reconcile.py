"""One look at one resource, as a table of contents: get, observe, decide, execute, report.

Nothing is remembered between two looks but who waits for nodes: what is, is read from the API server; what was decided
stands on the Deployment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from pagedserve_operator import status
from pagedserve_operator.cluster import Cluster
from pagedserve_operator.desired import Facts, desired
from pagedserve_operator.errors import ChildImmutable, TuningError, UserError
from pagedserve_operator.execute import execute
from pagedserve_operator.kinds import KEDA_AUTOSCALER
from pagedserve_operator.metrics import Resources
from pagedserve_operator.names import KIND, Key, Owner
from pagedserve_operator.observe import World, observe
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import Plan, plan
from pagedserve_operator.posting import post
from pagedserve_operator.referenced import hash_of_referenced, refers
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.status import Means
from pagedserve_operator.tuner import Tuner
from pagedserve_operator.tuning import Tuning

logger = logging.getLogger(__name__)

WAITING_SECONDS: Final = 2.0
"""Between looks at a name that an object on its way out still holds."""
_NOTHING: Final = Plan()
_BASIS: Final = Facts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a look ended; ``again_seconds``: when to look next where time alone will change the verdict."""

    result: str
    gone: bool = False
    refers: bool = False
    """Whether Secrets or ConfigMaps are referred to, which aren't watched."""
    again_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is to be done, or why nothing can be."""

    service: InferenceService | None = None
    tuning: Tuning | None = None
    plan: Plan = _NOTHING
    problem: UserError | None = None


class Reconciler:
    """Looks at resources; many looks may run at once, never two at the same key.

    ``autoscalers_near`` names the autoscalers that may scale a resource's Deployment, ``basis`` is what children depend
    on wherever they are, and ``metrics_trouble`` says why engine metrics don't reach autoscalers ("": nothing known).
    """

    def __init__(
        self,
        cluster: Cluster,
        tuner: Tuner,
        resources: Resources,
        *,
        autoscalers_near: Callable[[Key], Collection[str]],
        basis: Facts = _BASIS,
        metrics_trouble: Callable[[], str] = lambda: "",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster = cluster
        self._tuner = tuner
        self._resources = resources
        self._autoscalers_near = autoscalers_near
        self._basis = basis
        self._metrics_trouble = metrics_trouble
        self._now = now
        self._waiting_for_nodes: set[Key] = set()

    @property
    def waiting_for_nodes(self) -> Iterable[Key]:
        """Resources that couldn't be sized, which a node may help."""
        return tuple(self._waiting_for_nodes)

    async def reconcile(self, key: Key) -> Look:
        """Make the resource's children what they should be and report; raises ApiError and NotLeading."""
        raw = await self._cluster.get(KIND, key.namespace, key.name)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            return self._forget(key)
        owner = Owner(key, raw["metadata"]["uid"])
        world = await observe(self._cluster, owner, autoscalers=self._autoscalers_near(key))
        verdict = await self._decide(raw, world)
        # At once: a node that comes while the rest is written should wake this key.
        self._remember(key, verdict)
        verdict, world = await self._execute(key, verdict, world)
        reported, again = await self._report(raw, verdict, world)
        return _look(verdict, reported=reported, again=again)

    async def _decide(self, raw: Json, world: World) -> Verdict:
        """What the children should be, or whose fault it is that nobody can say; nothing is half decided."""
        service: InferenceService | None = None
        tuning = kept = self._tuner.kept(world.deployment)
        try:
            service = parse(raw)
            if service.spec.suspend:
                return Verdict(service=service, tuning=kept)
            secrets = await hash_of_referenced(service, self._cluster)
            tuning = await self._tuner.tune(service, world.deployment)
            facts = replace(self._basis, secrets_hash=secrets, served_kinds=await self._cluster.served_kinds())
            surge = await self._tuner.surge(
                service, tuning, facts, deployment=world.deployment, blocked=_is_blocked(raw)
            )
            manifests = desired(service, tuning, replace(facts, surge=surge))
            return Verdict(service=service, tuning=tuning, plan=plan(service, manifests, world.children))
        except UserError as problem:
            return Verdict(service=service, tuning=tuning, problem=problem)

    async def _execute(self, key: Key, verdict: Verdict, world: World) -> tuple[Verdict, World]:
        if verdict.plan.notes:
            verdict = replace(verdict, problem=ChildImmutable("; ".join(verdict.plan.notes)))
        if verdict.plan.empty:
            return verdict, world
        logger.info("%s: %s", key, verdict.plan.summary, extra={"fields": {"resource": str(key)}})
        children, rejected = await execute(self._cluster, key, verdict.plan, world.children)
        return replace(verdict, problem=rejected or verdict.problem), world.after(children)

    async def _report(self, raw: Json, verdict: Verdict, world: World) -> tuple[bool, float | None]:
        """Write the status if it differs; events follow it, so that a transition is told once."""
        outcome = status.compute(
            raw,
            service=verdict.service,
            tuning=verdict.tuning,
            problem=verdict.problem,
            observation=replace(world.observation(), means=await self._means()),
            now=self._now(),
        )
        self._resources.report(world.key, outcome.status["conditions"])
        if not status.differs(raw.get("status"), outcome.status):
            return False, outcome.look_again_seconds
        version = raw["metadata"]["resourceVersion"]
        await self._cluster.patch_status(world.key, outcome.status, resource_version=version)
        for note in outcome.events:
            await post(self._cluster, raw, note, self._now())
        return True, outcome.look_again_seconds

    async def _means(self) -> Means:
        return Means(
            keda=KEDA_AUTOSCALER in await self._cluster.served_kinds(),
            prometheus=bool(self._basis.prometheus_url),
            metrics_trouble=self._metrics_trouble(),
        )

    def _remember(self, key: Key, verdict: Verdict) -> None:
        if isinstance(verdict.problem, TuningError):
            self._waiting_for_nodes.add(key)
        else:
            self._waiting_for_nodes.discard(key)

    def _forget(self, key: Key) -> Look:
        # The garbage collector takes the children: they name their owner, and no finalizer holds it back.
        self._waiting_for_nodes.discard(key)
        self._resources.forget(key)
        return Look(result="unchanged", gone=True)


def _look(verdict: Verdict, *, reported: bool, again: float | None) -> Look:
    changed = reported or not verdict.plan.empty
    times = (
        again,
        verdict.problem.retry_seconds if verdict.problem else None,
        WAITING_SECONDS if verdict.plan.waiting else None,
    )
    return Look(
        result="refused" if verdict.problem else "changed" if changed else "unchanged",
        refers=verdict.service is not None and refers(verdict.service),
        again_seconds=min((seconds for seconds in times if seconds is not None), default=None),
    )


def _is_blocked(raw: Json) -> bool:
    conditions = (raw.get("status") or {}).get("conditions") or ()
    return any(row["type"] == "Progressing" and row["reason"] == "RolloutBlocked" for row in conditions)
