"""How new pods replace old ones: with a spare pod where there is room for it, else in the old one's place.

On GPUs a rollout that needs a spare GPU may wait for ever where all are taken. So none is asked for unless one is seen
free at the moment when the pod template changes; the decision then stays with that template, because the GPU that was
free is taken by the very pod that it was meant for.
"""

from __future__ import annotations

import json

from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.pods import pod_template, template_hash
from pagedserve_operator.names import ANNOTATION_ROLLOUT
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning


def needs_free_gpus(service: InferenceService, tuning: Tuning, facts: Facts, *, deployment: Json | None) -> bool:
    """Whether decide_rollout() has to know how many GPUs are free, which takes reading nodes and pods."""
    return (
        _depends_on_room(service, tuning)
        and deployment is not None
        and _kept(service, tuning, facts, deployment) is None
    )


def decide_rollout(
    service: InferenceService,
    tuning: Tuning,
    facts: Facts,
    *,
    deployment: Json | None,
    free_gpus: int = 0,
    blocked: bool = False,
) -> int | None:
    """Facts.surge: pods beyond the wanted number while rolling out; None is Recreate.

    ``deployment`` is the observed one, ``free_gpus`` the most that one node has free, and ``blocked`` says that the
    spare pod has been found to have no place after all.
    """
    strategy = service.spec.strategy
    if strategy == "Recreate":
        return None
    if strategy != "Auto":
        return 1 if strategy == "Surge" else 0
    if _claim_is_exclusive(service) or blocked:
        return 0
    kept = None if deployment is None else _kept(service, tuning, facts, deployment)
    if kept is not None:
        return kept
    if tuning.gpu.is_cpu:
        return 1
    return 0 if deployment is None else int(free_gpus >= tuning.gpu.count)


def strategy(surge: int | None) -> Json:
    """``spec.strategy`` of the Deployment."""
    if surge is None:
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": int(surge == 0)}}


def rollout_annotation(template: Json, surge: int | None) -> str:
    """What decide_rollout() reads back: the surge, and the template that it was chosen for."""
    return json.dumps({"surge": surge, "template": template_hash(template)}, sort_keys=True, separators=(",", ":"))


def _depends_on_room(service: InferenceService, tuning: Tuning) -> bool:
    return service.spec.strategy == "Auto" and not tuning.gpu.is_cpu and not _claim_is_exclusive(service)


def _claim_is_exclusive(service: InferenceService) -> bool:
    # A second pod may land on a node where the claim can't be attached.
    claim = service.spec.cache.new_claim
    return claim is not None and claim.access_mode in ("ReadWriteOnce", "ReadWriteOncePod")


def _kept(service: InferenceService, tuning: Tuning, facts: Facts, deployment: Json) -> int | None:
    annotations = deployment.get("metadata", {}).get("annotations") or {}
    try:
        decided = json.loads(annotations[ANNOTATION_ROLLOUT])
        surge, template = decided["surge"], decided["template"]
    except (KeyError, TypeError, ValueError):
        return None
    if surge not in (0, 1) or template != template_hash(pod_template(service, tuning, facts)):
        return None
    return int(surge)
