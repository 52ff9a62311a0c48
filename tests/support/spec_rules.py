"""What the CRD's rules forbid in a drawn spec is put right: a small function for each group of rules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from pagedserve_operator.fields import quantity

JSON = dict[str, Any]

OWN_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by")
OWN_VOLUMES = frozenset({"api-keys", "chat-template", "hf-token", "model-cache", "models", "shm", "tmp"})
OWN_PATHS = ("/tmp", "/dev/shm", "/models", "/var/cache/pagedserve")


def put_right(drawn: JSON) -> JSON:
    """A copy of the spec that no rule forbids."""
    spec = copy.deepcopy(drawn)
    for correct in (_counts, _gpu, _shape, _cache, _lifecycle, _resources, _env, _volumes, _labels, _peers):
        correct(spec)
    return spec


def _counts(spec: JSON) -> None:
    scaling = spec.get("autoscaling")
    if scaling is None:
        return
    spec.pop("replicas", None)
    if scaling.get("minReplicas", 0) > scaling.get("maxReplicas", 1000):
        scaling["minReplicas"], scaling["maxReplicas"] = scaling["maxReplicas"], scaling["minReplicas"]
    for metric in scaling.get("metrics", ()):
        metric.pop("averageValue" if metric["name"] in ("cpu", "memory") else "averageUtilization", None)


def _gpu(spec: JSON) -> None:
    gpu = spec.get("gpu", {})
    if gpu.get("type") == "cpu":
        gpu.pop("count", None)
        gpu.pop("memoryMiB", None)
    for row in gpu.get("tolerations", ()):
        if "key" not in row:
            row["operator"] = "Exists"
        if row.get("operator") == "Exists":
            row.pop("value", None)
        if row.get("effect") != "NoExecute":
            row.pop("tolerationSeconds", None)


def _shape(spec: JSON) -> None:
    shape = spec["model"].get("architecture", {})
    kinds = shape.get("layerTypes")
    if kinds:
        shape["layerTypes"] = [kinds[layer % len(kinds)] for layer in range(shape["layers"])]
        if "sliding" in kinds:
            shape.setdefault("slidingWindow", 512)
    if shape.get("activeParameters", 0) > shape.get("parameters", 0):
        shape["activeParameters"] = shape["parameters"]


def _cache(spec: JSON) -> None:
    cache = spec.get("cache", {})
    for name in sorted(cache)[1:]:
        del cache[name]
    claim = cache.get("newClaim", {})
    scaling = spec.get("autoscaling")
    single = spec.get("replicas", 1) <= 1 if scaling is None else scaling.get("maxReplicas") == 1
    if claim.get("accessMode") == "ReadWriteOnce" and not single:
        claim["accessMode"] = "ReadWriteMany"


def _lifecycle(spec: JSON) -> None:
    times = spec.get("lifecycle", {})
    if times.get("preStopSeconds", 15) + times.get("drainSeconds", 120) > 3600:
        times["preStopSeconds"], times["drainSeconds"] = 0, 3600


def _resources(spec: JSON) -> None:
    containers = [spec, *spec.get("podTemplate", {}).get("sidecars", ())]
    for resources in (container.get("resources", {}) for container in containers):
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for name in requests.keys() & limits.keys():
            if quantity(requests[name]) > quantity(limits[name]):
                limits[name] = requests[name]


def _env(spec: JSON) -> None:
    containers = [spec, *spec.get("podTemplate", {}).get("sidecars", ())]
    for row in (row for container in containers for row in container.get("env", ())):
        _keep_one(row, ("value", "valueFrom"))
        if "valueFrom" in row:
            _keep_one(row["valueFrom"], ("secretKeyRef", "configMapKeyRef", "fieldRef"))
            row["valueFrom"] = row["valueFrom"] or {"fieldRef": {"fieldPath": "metadata.name"}}


def _volumes(spec: JSON) -> None:
    template = spec.get("podTemplate", {})
    volumes = [row for row in template.get("volumes", ()) if row["name"] not in OWN_VOLUMES]
    for row in volumes:
        _keep_one(row, ("configMap", "secret", "emptyDir", "persistentVolumeClaim"))
        if len(row) == 1:
            row["emptyDir"] = {}
    if "volumes" in template:
        template["volumes"] = volumes
    names = [row["name"] for row in volumes]
    for holder in (template, *template.get("sidecars", ())):
        if "volumeMounts" in holder:
            holder["volumeMounts"] = list(_mounts(holder["volumeMounts"], names, ours=holder is template))
    if "sidecars" in template:
        template["sidecars"] = [row for row in template["sidecars"] if row["name"] != "engine"]


def _mounts(rows: list[JSON], names: list[str], *, ours: bool) -> Iterator[JSON]:
    for index, row in enumerate(rows):
        taken = row["mountPath"] in OWN_PATHS or row["mountPath"].startswith("/etc/pagedserve")
        if names and not (ours and taken):
            yield {**row, "name": names[index % len(names)]}


def _labels(spec: JSON) -> None:
    template = spec.get("podTemplate", {})
    for holder, taken in ((template, (*OWN_LABELS, "pod-template-hash")), (spec.get("monitoring", {}), OWN_LABELS)):
        for key in taken:
            holder.get("labels", {}).pop(key, None)
    for holder in (template, spec.get("service", {})):
        for key in [key for key in holder.get("annotations", {}) if key.startswith("pagedserve.dev/")]:
            del holder["annotations"][key]


def _peers(spec: JSON) -> None:
    for peer in spec.get("networkPolicy", {}).get("allowFrom", ()):
        if "ipBlock" in peer:
            for name in ("podSelector", "namespaceSelector"):
                peer.pop(name, None)


def _keep_one(row: JSON, names: tuple[str, ...]) -> None:
    for name in [name for name in names if name in row][1:]:
        del row[name]
