"""Cases for each rule of the CRD, by the beginning of its message: specs that it takes, and specs that it refuses."""

from __future__ import annotations

from typing import Any

from crd import JSON

SHAPE = {
    "layers": 2,
    "kvHeads": 1,
    "headDim": 64,
    "hiddenSize": 64,
    "intermediateSize": 64,
    "vocabSize": 64,
    "parameters": 1000,
}
ONCE = "ReadWriteOnce"


def shape(**more: Any) -> JSON:
    return {"model": {"uri": "hf://a/b", "architecture": {**SHAPE, **more}}}


def autoscaled(**more: Any) -> JSON:
    return {"autoscaling": more}


def metric(**row: Any) -> JSON:
    return {"autoscaling": {"metrics": [row]}}


def tolerated(**row: Any) -> JSON:
    return {"gpu": {"tolerations": [row]}}


def lifecycle(**seconds: int) -> JSON:
    return {"lifecycle": seconds}


def claim(*, also: JSON | None = None, **more: Any) -> JSON:
    return {"cache": {"newClaim": more}, **(also or {})}


def volume(**row: Any) -> JSON:
    return {"podTemplate": {"volumes": [row]}}


def mounted(*, at: str = "/data", volumes: Any = ({"name": "v", "emptyDir": {}},), sidecar: bool = False) -> JSON:
    mounts = [{"name": "v", "mountPath": at}]
    holder: JSON = {"sidecars": [{"name": "s", "image": "i", "volumeMounts": mounts}]} if sidecar else {}
    return {"podTemplate": {"volumes": list(volumes), **(holder or {"volumeMounts": mounts})}}


def variable(**row: Any) -> JSON:
    return {"env": [{"name": "A", **row}]}


def sidecar(**more: Any) -> JSON:
    return {"podTemplate": {"sidecars": [{"name": "s", "image": "i", **more}]}}


def peer(**row: Any) -> JSON:
    return {"networkPolicy": {"allowFrom": [row]}}


def amounts(name: str, request: Any, limit: Any) -> JSON:
    return {"resources": {"requests": {name: request}, "limits": {name: limit}}}


SECRET = {"secretKeyRef": {"name": "s", "key": "k"}}
MAP = {"configMapKeyRef": {"name": "s", "key": "k"}}

RULES: dict[str, tuple[list[JSON], list[JSON]]] = {
    "replicas can't be set (nor scaled by kubectl) while autoscaling is on": (
        [{"replicas": 0}, {"autoscaling": {}}, {}],
        [{"replicas": 1, "autoscaling": {}}, {"replicas": 0, "autoscaling": {"minReplicas": 1}}],
    ),
    "minReplicas exceeds maxReplicas": (
        [autoscaled(minReplicas=3, maxReplicas=3), autoscaled(maxReplicas=1), autoscaled(minReplicas=20)],
        [autoscaled(minReplicas=4, maxReplicas=3)],
    ),
    "cpu and memory take averageUtilization": (
        [
            metric(name="cpu"),
            metric(name="cpu", averageUtilization=60),
            metric(name="queueWaitSeconds", averageValue="500m"),
            metric(name="cacheUse", averageValue="0.9"),
            metric(name="waitingRequests", averageValue=3),
            metric(name="runningRequests", averageValue="8"),
        ],
        [metric(name="memory", averageValue="1"), metric(name="cacheUse", averageUtilization=80)],
    ),
    "averageValue": (
        [metric(name="waitingRequests", averageValue="10")],
        [metric(name="waitingRequests", averageValue=bad) for bad in (0, "0", "-1", "many")],
    ),
    "Duplicate value": (
        [{"env": [{"name": "A"}, {"name": "B"}]}],
        [
            {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
            {"autoscaling": {"metrics": [{"name": "cpu"}, {"name": "cpu"}]}},
            {"podTemplate": {"sidecars": [{"name": "s", "image": "i"}, {"name": "s", "image": "j"}]}},
            {"image": {"pullSecrets": ["a", "a"]}},
        ],
    ),
    "count makes no sense with type: cpu": (
        [{"gpu": {"type": "cpu"}}, {"gpu": {"type": "L4", "count": 2}}, {"gpu": {"count": 2}}],
        [{"gpu": {"type": "cpu", "count": 1}}],
    ),
    "memoryMiB makes no sense with type: cpu": (
        [{"gpu": {"type": "Novel-GPU", "memoryMiB": 40960}}],
        [{"gpu": {"type": "cpu", "memoryMiB": 40960}}],
    ),
    "preStopSeconds (default 15) and drainSeconds (default 120) together": (
        [lifecycle(drainSeconds=3585), lifecycle(preStopSeconds=3480), lifecycle(preStopSeconds=0, drainSeconds=3600)],
        [lifecycle(drainSeconds=3586), lifecycle(preStopSeconds=3481), lifecycle(preStopSeconds=1, drainSeconds=3600)],
    ),
    "cache.newClaim with accessMode ReadWriteOnce serves one replica": (
        [
            claim(accessMode=ONCE),
            claim(accessMode=ONCE, also={"replicas": 1}),
            claim(accessMode=ONCE, also={"autoscaling": {"maxReplicas": 1}}),
            claim(also={"replicas": 5}),
            claim(accessMode="ReadWriteMany", also={"autoscaling": {}}),
        ],
        [claim(accessMode=ONCE, also={"replicas": 2}), claim(accessMode=ONCE, also={"autoscaling": {}})],
    ),
    "give only one of cache.emptyDir, cache.existingClaim and cache.newClaim": (
        [{"cache": {}}, {"cache": {"emptyDir": {}}}, {"cache": {"existingClaim": "c"}}],
        [{"cache": {"emptyDir": {}, "existingClaim": "c"}}, {"cache": {"emptyDir": {}, "newClaim": {}}}],
    ),
    "layerTypes must name every layer": (
        [shape(), shape(layerTypes=["full", "full"])],
        [shape(layerTypes=["full"]), shape(layerTypes=["full"] * 3)],
    ),
    "slidingWindow is missing": (
        [shape(layerTypes=["sliding", "full"], slidingWindow=512)],
        [shape(layerTypes=["sliding", "full"])],
    ),
    "activeParameters can't exceed parameters": (
        [shape(activeParameters=1000)],
        [shape(activeParameters=1001)],
    ),
    "give a key, or operator: Exists": (
        [tolerated(key="a"), tolerated(operator="Exists")],
        [tolerated(effect="NoSchedule"), tolerated(operator="Equal", value="x")],
    ),
    "operator Exists takes no value": (
        [tolerated(key="a", operator="Exists"), tolerated(key="a", value="x")],
        [tolerated(key="a", operator="Exists", value="x")],
    ),
    "tolerationSeconds needs effect: NoExecute": (
        [tolerated(key="a", effect="NoExecute", tolerationSeconds=5)],
        [tolerated(key="a", tolerationSeconds=5), tolerated(key="a", effect="NoSchedule", tolerationSeconds=5)],
    ),
    "a key must be like name or example.com/name": (
        [{"gpu": {"nodeSelector": {"a": "b", "example.com/A_b.c-d": "e"}}}],
        [
            {"gpu": {"nodeSelector": {"a b": "c"}}},
            {"gpu": {"nodeSelector": {"a/b/c": "d"}}},
            {"podTemplate": {"labels": {"-a": "b"}}},
            {"podTemplate": {"annotations": {"x" * 64: "b"}}},
            {"service": {"annotations": {"Example.com/a": "b"}}},
            {"monitoring": {"labels": {"a/": "b"}}},
            peer(podSelector={"matchLabels": {"": "b"}}),
        ],
    ),
    "pod-template-hash are the operator's": (
        [{"podTemplate": {"labels": {"app.kubernetes.io/component": "x"}}}],
        [{"podTemplate": {"labels": {"app.kubernetes.io/name": "x"}}}],
    ),
    "/instance and /managed-by are the operator's": (
        [{"monitoring": {"labels": {"release": "main"}}}],
        [{"monitoring": {"labels": {"app.kubernetes.io/managed-by": "me"}}}],
    ),
    "annotations below pagedserve.dev/ are the operator's": (
        [{"podTemplate": {"annotations": {"example.com/pagedserve.dev": "x"}}}],
        [{"podTemplate": {"annotations": {"pagedserve.dev/secrets": "x"}}}],
    ),
    "give exactly one of configMap, secret, emptyDir and persistentVolumeClaim": (
        [volume(name="v", configMap={"name": "c"}), volume(name="v", persistentVolumeClaim={"claimName": "c"})],
        [volume(name="v"), volume(name="v", emptyDir={}, secret={"secretName": "s"})],
    ),
    "volumes named api-keys": (
        [volume(name="models-2", emptyDir={})],
        [volume(name="tmp", emptyDir={}), volume(name="model-cache", emptyDir={})],
    ),
    "volumeMounts names a volume that isn't in podTemplate.volumes": (
        [mounted(), mounted(sidecar=True), {"podTemplate": {"volumeMounts": []}}],
        [mounted(volumes=()), mounted(volumes=[{"name": "w", "emptyDir": {}}]), mounted(volumes=(), sidecar=True)],
    ),
    "volumeMounts can't use /tmp": (
        [mounted(at="/models-2"), mounted(at="/tmp", sidecar=True)],
        [mounted(at=path) for path in ("/tmp", "/dev/shm", "/models", "/etc/pagedserve/api-keys")],
    ),
    "the container named engine is the operator's": ([sidecar(name="engine-2")], [sidecar(name="engine")]),
    "give value or valueFrom, not both": (
        [variable(value="x"), variable(valueFrom=SECRET)],
        [variable(value="", valueFrom=SECRET), sidecar(env=[{"name": "A", "value": "x", "valueFrom": SECRET}])],
    ),
    "give exactly one of secretKeyRef, configMapKeyRef and fieldRef": (
        [variable(valueFrom={"fieldRef": {"fieldPath": "status.podIP"}})],
        [variable(valueFrom={}), variable(valueFrom={**SECRET, **MAP})],
    ),
    "ipBlock stands alone": (
        [peer(ipBlock={"cidr": "10.0.0.0/8"}), peer(podSelector={}, namespaceSelector={})],
        [peer(ipBlock={"cidr": "10.0.0.0/8"}, podSelector={})],
    ),
    "requests.cpu exceeds limits.cpu": (
        [amounts("cpu", "1500m", 2), amounts("cpu", 2, "2"), {"resources": {"limits": {"cpu": 1}}}],
        [amounts("cpu", "2500m", 2), sidecar(resources={"requests": {"cpu": 1}, "limits": {"cpu": "100m"}})],
    ),
    "requests.memory exceeds limits.memory": (
        [amounts("memory", "1024Mi", "1Gi")],
        [amounts("memory", "1025Mi", "1Gi"), amounts("memory", "1Gi", "1G")],
    ),
}

NAMES: dict[str, tuple[list[str], list[str]]] = {
    "metadata.name is too long": (["a" * 50], ["a" * 51]),
    "metadata.name must be lowercase letters": (["a", "a-1"], ["7b-model", "my.model", "1"]),
}

CHANGES: dict[str, tuple[list[tuple[JSON, JSON]], list[tuple[JSON, JSON]]]] = {
    "size can't shrink": (
        [({"size": "1Gi"}, {"size": "2Gi"}), ({"size": "1Gi"}, {"size": "1024Mi"}), ({"size": "50Gi"}, {})],
        [({"size": "2Gi"}, {"size": "1Gi"}), ({}, {"size": "99Gi"})],
    ),
    "storageClassName of a claim can't change": (
        [({"storageClassName": "a"}, {"storageClassName": "a"})],
        [({"storageClassName": "a"}, {"storageClassName": "b"}), ({}, {"storageClassName": "b"})],
    ),
    "accessMode of a claim can't change": (
        [({}, {"accessMode": "ReadWriteMany"})],
        [({}, {"accessMode": ONCE}), ({"accessMode": ONCE}, {})],
    ),
}
