"""What each condition, reason and event of a resource means, and what cures it: the words of docs/conditions.md.

The names come from the operator; a test compares them with what it can write, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Reasons that are looked up together: by reason, its meaning and (where somebody must act) its cure."""

    title: str
    where: str
    """Which conditions carry them."""
    reasons: Mapping[str, tuple[str, ...]]


CONDITIONS: Final[Mapping[str, tuple[str, str, str]]] = {
    "Ready": (
        "enough engines answer: all that are wanted but one, and one at least",
        "fewer answer",
        "never",
    ),
    "Progressing": (
        "pods start, load or roll, and nobody has to do anything",
        "all is done (`Complete`), or it stands still: the reason says why",
        "never",
    ),
    "Degraded": (
        "somebody must act, even where enough engines answer",
        "nothing needs a hand",
        "never",
    ),
    "TuningResolved": (
        "the GPU is known and the engine is sized for it",
        "it can't be: nothing new is made, and what runs stays",
        "nothing is sized yet, or not before other trouble is cured",
    ),
    "ScalingActive": (
        "the autoscaler works",
        "it doesn't; engines stay as many as they are",
        "it has no metrics of ready pods yet, or KEDA's ScaledObject has to go first",
    ),
}
"""By condition: what True, False and Unknown mean."""

GROUPS: Final = (
    Group(
        title="All is well",
        where="Each is the reason of one condition.",
        reasons={
            "Available": ("`Ready` is true: as many engines answer as must.",),
            "Complete": ("`Progressing` is false: every pod has the newest template and is ready.",),
            "AsExpected": ("`Degraded` is false.",),
            "Resolved": ("`TuningResolved` is true; the message has the numbers and why this GPU.",),
            "Active": ("`ScalingActive` is true.",),
        },
    ),
    Group(
        title="It passes by itself",
        where="`Progressing` is true; `Ready` is false with the same reason where too few engines answer meanwhile.",
        reasons={
            "PodsStarting": ("Pods wait for a node, an image or a volume.",),
            "ModelLoading": (
                "The engine has started and loads the model; the message says how many seconds it has. Liveness isn't "
                "asked meanwhile.",
            ),
            "WaitingForDrain": ("A new pod takes the place of one that still finishes its requests.",),
            "RollingOut": ("A new template replaces an older one; the message counts.",),
            "Pending": ("`TuningResolved` is unknown: the first look isn't done.",),
            "WaitingForKEDA": (
                "`ScalingActive` is unknown: KEDA's ScaledObject is on its way out, and the HorizontalPodAutoscaler "
                "comes after it. KEDA must run to let it go.",
            ),
            "WaitingForMetrics": (
                "`ScalingActive` is unknown: no pod is ready, or the autoscaler hasn't measured one yet.",
            ),
        },
    ),
    Group(
        title="As you asked",
        where="`Ready`, `Progressing`, `TuningResolved` or `ScalingActive`.",
        reasons={
            "ScaledToZero": ("No engine is wanted.", "Set `spec.replicas` to 1 or more."),
            "Suspended": (
                "`spec.suspend` is true: children stay as they are, edits by hand included.",
                "Set it to false.",
            ),
            "ScalingDisabled": (
                "The Deployment was scaled to 0 by hand, which turns the autoscaler off.",
                "Scale it to 1: `kubectl scale deployment/NAME --replicas=1`.",
            ),
        },
    ),
    Group(
        title="Pods don't run",
        where="`Degraded` is true; `Ready` is false where too few engines answer. The most telling comes first.",
        reasons={
            "ModelDoesNotFit": (
                "Weights, or an explicit `spec.model.maxModelLen`, need more memory than there is: by the operator's "
                "reckoning (`TuningResolved` is false) or by the engine's measurement (its termination message).",
                "The message names what would fit. [Memory](guide/memory.md).",
            ),
            "ImagePullFailed": (
                "An image can't be pulled.",
                "Correct `spec.image`, or give `spec.image.pullSecrets`.",
            ),
            "ContainerConfigError": (
                "The kubelet can't create a container: a Secret, ConfigMap or key is missing, or a security rule "
                "forbids it.",
                "The message is the kubelet's.",
            ),
            "CrashLoop": (
                "A container ends again and again, or can't be started. The message holds its last words, the exit "
                "code and the restarts.",
                "Do what the words say. `OOMKilled`: raise `spec.resources.limits.memory`.",
            ),
            "StartupTimeout": (
                "An engine wasn't ready in its time, no container started for 15 minutes, or a rollout passed its "
                "deadline.",
                "Raise `spec.lifecycle.startupTimeoutSeconds`, or see the pod's logs and events for what is slow.",
            ),
            "RolloutBlocked": (
                "A rollout waits for a GPU or for room that the old pods hold; they go on answering.",
                "Free a GPU. With `spec.rollout.strategy: Auto` the operator goes on without a spare pod by itself.",
            ),
            "InsufficientGPU": (
                "No node has the GPUs that a pod asks for.",
                "Free GPUs, add nodes, or ask for fewer replicas.",
            ),
            "Unschedulable": (
                "No node takes a pod for another reason: labels, taints, cpu, memory, volumes.",
                "The message is the scheduler's. `spec.gpu`, `spec.resources` and tolerations decide.",
            ),
            "PodFailed": (
                "A pod ended for good (evicted, its node lost) and is being replaced.",
                "The message says why. `spec.cache.emptyDir.sizeLimit` evicts whoever exceeds it.",
            ),
            "NotReady": (
                "An engine that was ready is not any more, or its node doesn't report.",
                "See its logs, and `kubectl get nodes`.",
            ),
            "PodsRejected": (
                "The API server refuses the pods: a quota, an admission rule, a missing ServiceAccount.",
                "The message is the API server's.",
            ),
        },
    ),
    Group(
        title="The resource can't be as it is",
        where="`Degraded` is true, and what runs goes on.",
        reasons={
            "InvalidSpec": (
                "A field has a value that the schema lets through and that can't be, here or on this GPU (then "
                "`TuningResolved` is false too). Nothing of the newest spec is applied.",
                "The message names the field and what it may be.",
            ),
            "UnsupportedModelURI": (
                "`spec.model.uri` has a scheme that nothing reads.",
                "Write `hf://`, `pvc://`, `random://`, or a path.",
            ),
            "SecretNotFound": (
                "A Secret or ConfigMap that the spec names, or a key in it, isn't there.",
                "Create it, or correct the name or key.",
            ),
            "NameTaken": (
                "An object with a child's name exists and isn't this resource's.",
                "Delete it, or give the InferenceService another name.",
            ),
            "ChildRejected": (
                "The API server refuses a child: invalid, forbidden, over quota. The other children are written.",
                "The message is the API server's.",
            ),
            "ChildImmutable": (
                "An existing claim can't become what `spec.cache.newClaim` asks for. Everything else is applied.",
                "Take the change back, or delete the claim, which downloads the weights again.",
            ),
        },
    ),
    Group(
        title="The engine can't be sized",
        where="`TuningResolved` is false and `Degraded` true. A resource that has no pods yet gets none.",
        reasons={
            "GPUTypeRequired": (
                "`spec.gpu.type` is `auto` and nothing tells which GPUs there are.",
                "Set `spec.gpu.type`, label the nodes, or let the operator read them.",
            ),
            "GPUUnknown": (
                "Neither the catalogue nor a label tells the GPU's memory.",
                "Correct the name, or set `spec.gpu.memoryMiB`.",
            ),
            "GPUUnsupported": (
                "The engine's image doesn't run on the card, or several slices should serve one model.",
                "Set `spec.gpu.type` to a newer or whole card, or `spec.gpu.count` to 1.",
            ),
            "ModelShapeUnknown": (
                "No `config.json` could be read, and the name states no number of parameters.",
                "State it in `spec.model.architecture`.",
            ),
        },
    ),
    Group(
        title="Autoscaling doesn't work",
        where="`ScalingActive` is false; engines stay as many as they are.",
        reasons={
            "AutoscalerConflict": (
                "Another autoscaler scales the same Deployment, or selects the same pods.",
                "Delete it, or remove `spec.autoscaling` (or `spec.replicas`).",
            ),
            "MetricsUnavailable": (
                "Pods are ready and the autoscaler gets no metrics of them.",
                "The message says which part is missing; [Autoscale](guide/autoscaling.md) who serves which metric.",
            ),
            "ScalingFailed": (
                "The autoscaler, or KEDA, can't read or change the number of pods.",
                "The message is its own.",
            ),
            "KEDAMissing": (
                "`spec.autoscaling.backend` is `KEDA`, which isn't installed.",
                "Install KEDA, or remove `spec.autoscaling.backend`.",
            ),
            "PrometheusUnknown": (
                "KEDA reads engine metrics from Prometheus, and nobody says where that is.",
                "Set `PROMETHEUS_URL` of the operator, or scale by cpu and memory.",
            ),
        },
    ),
)

EVENTS: Final[Mapping[str, tuple[str, str]]] = {
    "TuningResolved": ("Normal", "The GPU and the numbers were decided, with the memory's breakdown."),
    "RolloutStarted": ("Normal", "A new template replaces the old one."),
    "RolloutGap": (
        "Warning",
        "The rollout of the only replica leaves nothing that answers for a while, since no GPU is free beside it.",
    ),
    "RolloutFinished": ("Normal", "Every pod has the new template."),
    "Recovered": ("Normal", "What was degraded is over."),
    "Suspended": ("Normal", "`spec.suspend` became true."),
    "Resumed": ("Normal", "`spec.suspend` became false."),
    "ScalingActive": ("Normal", "The autoscaler works again."),
}
"""Events with a name of their own, by type and meaning."""
