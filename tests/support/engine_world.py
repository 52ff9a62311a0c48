"""Pods, Deployments and autoscalers as a cluster shows them, for one resource named ``llama``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.parsing import parse
from pagedserve_operator.sizing import Breakdown, Sizing
from pagedserve_operator.spec import InferenceService
from pagedserve_operator.status import Means, Observation, Outcome, compute
from pagedserve_operator.tuning import Tuning

Json = dict[str, Any]
NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
IMAGE = "pagedserve/engine:0.1.0"
CANT_FIT = (
    "the weights take 15.0 GiB and the engine may use 13.3 GiB of 14.8 GiB: 1.7 GiB short; choose a smaller model or "
    "DTYPE, raise MAX_MEMORY_PERCENT, or give it more memory"
)
NO_GPU = (
    "0/12 nodes are available: 3 Insufficient nvidia.com/gpu, 9 node(s) didn't match Pod's node affinity/selector. "
    "preemption: 0/12 nodes are available: 3 No preemption victims found for incoming pod, 9 Preemption is not helpful "
    "for scheduling."
)
GPU = ResolvedGpu(
    product="NVIDIA-L4",
    memory_mib=23034,
    count=1,
    tflops=121,
    bandwidth_gbs=300,
    compute_capability=(8, 9),
    resource="nvidia.com/gpu",
    pin={"nvidia.com/gpu.product": ("NVIDIA-L4",)},
    reason="spec.gpu.type names it.",
    source="spec",
)
TUNING = Tuning(
    gpu=GPU,
    sizing=Sizing(
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        num_blocks=900,
        max_batch_tokens=2048,
        max_model_len=8192,
        block_size=32,
        block_bytes=4 * 2**20,
        breakdown=Breakdown(
            weights=15300, runtime=1000, activations=500, graphs=300, cache=3600, left_over=2334, total=23034
        ),
        notes=(),
    ),
    shape_source="spec.model.architecture",
    image=IMAGE,
    weights_mib=15300,
    use_cuda_graph=True,
    sources={"numBlocks": "computed"},
)


def ago(seconds: float) -> str:
    """That long before NOW, as the API server writes it; negative: after."""
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def resource(*, generation: int = 1, status: Json | None = None, **spec: Any) -> Json:
    return {
        "metadata": {"name": "llama", "namespace": "models", "uid": "u1", "generation": generation},
        "spec": {"model": {"uri": "hf://meta-llama/Llama-3.1-8B"}, **spec},
        "status": status or {},
    }


def deployment(
    replicas: int = 1, *, updated: int | None = None, generation: int = 1, seen: int | None = None, **extra: Any
) -> Json:
    """``extra``: revision, reason (of Progressing), surge, refusal (of ReplicaFailure)."""
    conditions = [
        {"type": "Progressing", "status": "True", "reason": extra.get("reason", "NewReplicaSetAvailable")},
        {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"},
    ]
    if "refusal" in extra:
        conditions.append({"type": "ReplicaFailure", "status": "True", "message": extra["refusal"]})
    return {
        "metadata": {
            "name": "llama",
            "generation": generation,
            "annotations": {"deployment.kubernetes.io/revision": extra.get("revision", "1")},
        },
        "spec": {
            "replicas": replicas,
            "progressDeadlineSeconds": 900,
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": extra.get("surge", 0), "maxUnavailable": 1},
            },
        },
        "status": {
            "observedGeneration": generation if seen is None else seen,
            "replicas": replicas,
            "updatedReplicas": replicas if updated is None else updated,
            "conditions": conditions,
        },
    }


def pod(name: str = "llama-1-a", *, template: str = "t1", born: float = 300, **status: Any) -> Json:
    """A scheduled pod; ``status`` replaces parts of its status, ``leaving`` (seconds) gives a deletion time."""
    leaving = status.pop("leaving", None)
    conditions = status.pop("conditions", [condition("Ready", "False", since=born)])
    metadata = {
        "name": name,
        "creationTimestamp": ago(born),
        "labels": {"pod-template-hash": template},
    }
    if leaving is not None:
        metadata["deletionTimestamp"] = ago(-leaving)
    return {
        "metadata": metadata,
        "spec": {
            "terminationGracePeriodSeconds": 150,
            "containers": [
                {"name": "engine", "image": IMAGE, "startupProbe": {"periodSeconds": 10, "failureThreshold": 60}}
            ],
        },
        "status": {
            "phase": "Running",
            "startTime": ago(born),
            "conditions": [condition("PodScheduled", "True", since=born), *conditions],
            **status,
        },
    }


def condition(kind: str, status: str, *, since: float = 300, **more: str) -> Json:
    return {"type": kind, "status": status, "lastTransitionTime": ago(since), **more}


def ready_pod(name: str = "llama-1-a", **more: Any) -> Json:
    running = {"running": {"startedAt": ago(290)}}
    return pod(
        name,
        conditions=[condition("Ready", "True", since=100)],
        containerStatuses=[engine(ready=True, started=True, state=running)],
        **more,
    )


def loading_pod(name: str = "llama-1-a", *, running_for: float = 60, **more: Any) -> Json:
    running = {"running": {"startedAt": ago(running_for)}}
    return pod(name, containerStatuses=[engine(state=running)], **more)


def creating_pod(name: str = "llama-1-a", **more: Any) -> Json:
    return pod(
        name, phase="Pending", containerStatuses=[engine(state={"waiting": {"reason": "ContainerCreating"}})], **more
    )


def waiting_pod(reason: str, message: str = "", *, name: str = "llama-1-a", **more: Any) -> Json:
    waiting = {"waiting": {"reason": reason, "message": message}}
    return pod(name, phase="Pending", containerStatuses=[engine(state=waiting)], **more)


def crashing_pod(
    name: str = "llama-1-a", *, exit_code: int = 1, message: str = "", reason: str = "Error", **more: Any
) -> Json:
    """``seen``: back-off (default), running or ended, the moments of a crash loop; ``lasted``: seconds of its life."""
    end = {
        "exitCode": exit_code,
        "reason": reason,
        "message": message,
        "startedAt": ago(40 + more.pop("lasted", 20)),
        "finishedAt": ago(40),
    }
    back_off = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container=engine"}}
    moments = {
        "back-off": {"state": back_off, "lastState": {"terminated": end}},
        "running": {"state": {"running": {"startedAt": ago(5)}}, "lastState": {"terminated": end}},
        "ended": {"state": {"terminated": end}},
    }
    restarts = more.pop("restarts", 3)
    status = engine(restartCount=restarts, **moments[more.pop("seen", "back-off")])
    return pod(name, containerStatuses=[status], **more)


def unscheduled_pod(name: str = "llama-1-a", *, message: str = NO_GPU, **more: Any) -> Json:
    made = pod(name, phase="Pending", conditions=[], **more)
    refused = condition("PodScheduled", "False", reason="Unschedulable", message=message)
    made["status"]["conditions"] = [refused]
    return made


def engine(**status: Any) -> Json:
    return {"name": "engine", "image": IMAGE, "ready": False, "started": False, "restartCount": 0, **status}


def autoscaler(*conditions: Json) -> Json:
    return {"spec": {"minReplicas": 2, "maxReplicas": 10}, "status": {"conditions": list(conditions)}}


def look(
    raw: Json, *, deployment: Json | None = None, pods: tuple[Json, ...] | list[Json] = (), **more: Any
) -> Outcome:
    """compute() over a resource; ``more``: tuning, problem, hpa, foreign, service, now, children."""
    service: InferenceService | None = more.get("service", parse(raw))
    return compute(
        raw,
        service=service,
        tuning=more.get("tuning", TUNING),
        problem=more.get("problem"),
        observation=Observation(
            deployment=deployment,
            pods=tuple(pods),
            hpa=more.get("hpa"),
            foreign_hpas=tuple(more.get("foreign", ())),
            service=more.get("child_service", {"metadata": {"name": "llama"}}),
            scaled_object=more.get("scaled_object"),
            means=more.get("means", Means()),
        ),
        now=more.get("now", NOW),
    )


def verdict(outcome: Outcome, kind: str = "Ready") -> tuple[str, str]:
    """(status, reason) of a condition."""
    row = row_of(outcome, kind)
    return row["status"], row["reason"]


def row_of(outcome: Outcome, kind: str = "Ready") -> Json:
    return next(row for row in outcome.status["conditions"] if row["type"] == kind)


def message_of(outcome: Outcome, kind: str = "Ready") -> str:
    return str(row_of(outcome, kind)["message"])


def told(outcome: Outcome) -> list[tuple[str, str]]:
    """(type, reason) of each event."""
    return [(note.type, note.reason) for note in outcome.events]
