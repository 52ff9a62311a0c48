"""Random specs that the API server accepts, drawn from the CRD's own schema: types, bounds, patterns and enums as they
stand in the file, and what its rules forbid is put right afterwards, a small function for each group of rules.

A rule that is added to the CRD and not here shows in the tests that create what is drawn.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st

from crd import schema
from pagedserve_operator.fields import quantity

JSON = dict[str, Any]
Drawn = st.SearchStrategy[Any]

OWN_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by")
OWN_VOLUMES = frozenset({"api-keys", "chat-template", "hf-token", "model-cache", "models", "shm", "tmp"})
OWN_PATHS = ("/tmp", "/dev/shm", "/models", "/var/cache/pagedserve")
MOST_ROWS = 3
LONGEST_TEXT = 40
_LABEL_RULE = re.compile(r"self\.all\(k, k\.matches\('(?P<pattern>.+)'\)\)")

FEASIBLE: Mapping[str, Drawn] = {
    ".model.uri": st.sampled_from(
        ["hf://example/small-135M", "hf://example/model-8B", "pvc://weights/llama-1b", "/models/tiny-0.5b"]
    ),
    ".model.maxModelLen": st.integers(2, 2048),
    ".model.architecture": st.just(
        {
            "layers": 30,
            "kvHeads": 3,
            "headDim": 64,
            "hiddenSize": 576,
            "intermediateSize": 1536,
            "vocabSize": 49152,
            "parameters": 134_515_008,
            "maxPositionEmbeddings": 8192,
        }
    ),
    ".gpu.type": st.sampled_from(["cpu", "L4", "NVIDIA-H100-80GB-HBM3", "T4"]),
    ".gpu.count": st.integers(1, 4),
    ".gpu.memoryMiB": st.integers(20_000, 200_000),
    ".tuning.numBlocks": st.integers(2, 2000),
    ".tuning.maxBatchTokens": st.integers(16, 2048),
    ".tuning.maxMemoryPercent": st.sampled_from([0.7, 0.9, 1]),
    ".resources.limits.memory": st.sampled_from(["64Gi", "100G", 68_719_476_736, "65536Mi"]),
    ".resources.requests.memory": st.sampled_from(["32Gi", "0.5Ti", "40000M"]),
}
"""Places with values for which an engine can be sized; whether one can be still depends on how they meet."""

FEW: Mapping[str, Drawn] = {
    ".replicas": st.integers(0, 2),
    ".autoscaling.minReplicas": st.integers(1, 2),
    ".autoscaling.maxReplicas": st.integers(1, 3),
}
"""As many engines as a control plane bears without a thought: each is a real Pod to its controllers."""


EXISTING: Mapping[str, Drawn] = {
    ".auth.apiKeysSecretRef": st.just({"name": "keys"}),
    ".auth.hfTokenSecretRef": st.just({"name": "hub"}),
    ".env[].valueFrom.secretKeyRef": st.just({"name": "hub", "key": "token"}),
    ".env[].valueFrom.configMapKeyRef": st.just({"name": "hub", "key": "token"}),
}
"""References to objects that ``referred_to`` makes."""


def specs(places: Mapping[str, Drawn] | None = None) -> st.SearchStrategy[JSON]:
    """Values of ``spec``; ``places`` says what to draw at a path such as ``.gpu.type``, else the schema does."""
    return _value(_schema(), "", places or {}).map(_put_right)


def feasible_specs() -> st.SearchStrategy[JSON]:
    """Specs of few engines that nearly always can be sized, and that refer to what ``referred_to`` makes."""
    return specs({**FEASIBLE, **FEW, **EXISTING}).map(_named_gpu)


def referred_to(namespace: str) -> list[JSON]:
    """The objects that feasible specs refer to."""
    values = {"keys": {"api-keys": "one"}, "hub": {"token": "hf_abc"}}
    return [
        {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, field: data}
        for kind, field in (("Secret", "stringData"), ("ConfigMap", "data"))
        for name, data in values.items()
    ]


def _named_gpu(spec: JSON) -> JSON:
    gpu = spec.setdefault("gpu", {})
    if not {"type", "nodeSelector"} & gpu.keys() or gpu.get("type") is None:
        gpu["type"] = "L4"
    return spec


def _value(node: JSON, path: str, places: Mapping[str, Drawn]) -> Drawn:
    if path in places:
        return places[path]
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "anyOf" in node:
        # A number or a quantity; the bound is the number's, the pattern the text's.
        return st.one_of(st.integers(node["minimum"], 10**6), _text(node))
    return _BY_TYPE[node["type"]](node, path, places)


def _object(node: JSON, path: str, places: Mapping[str, Drawn]) -> Drawn:
    if "additionalProperties" in node:
        values = _value(node["additionalProperties"], f"{path}{{}}", places)
        return st.dictionaries(_label_keys(), values, max_size=min(node["maxProperties"], MOST_ROWS))
    fields = {name: _value(below, f"{path}.{name}", places) for name, below in node.get("properties", {}).items()}
    required = {name: fields.pop(name) for name in node.get("required", ())}
    drawn = st.fixed_dictionaries(required, optional=fields)
    return drawn.filter(bool) if node.get("minProperties") else drawn


def _array(node: JSON, path: str, places: Mapping[str, Drawn]) -> Drawn:
    keys = node.get("x-kubernetes-list-map-keys")
    unique: Callable[[Any], Any] | None = None
    if keys:
        unique = lambda row: tuple(row.get(key) for key in keys)  # noqa: E731
    elif node.get("x-kubernetes-list-type") == "set":
        unique = str
    rows = _value(node["items"], f"{path}[]", places)
    most = min(node["maxItems"], MOST_ROWS)
    return st.lists(rows, min_size=node.get("minItems", 0), max_size=most, unique_by=unique)


def _text(node: JSON) -> Drawn:
    longest, least = node["maxLength"], node.get("minLength", 0)
    if "pattern" not in node:
        alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
        return st.text(alphabet, min_size=least, max_size=min(longest, LONGEST_TEXT))
    return _matching(node["pattern"]).filter(lambda text: least <= len(text) <= longest)


def _number(node: JSON) -> Drawn:
    return st.floats(node["minimum"], node["maximum"], allow_subnormal=False)


_BY_TYPE: Mapping[str, Callable[[JSON, str, Mapping[str, Drawn]], Drawn]] = {
    "object": _object,
    "array": _array,
    "string": lambda node, path, places: _text(node),
    "boolean": lambda node, path, places: st.booleans(),
    "integer": lambda node, path, places: st.integers(node["minimum"], node["maximum"]),
    "number": lambda node, path, places: _number(node),
}


@cache
def _matching(pattern: str) -> Drawn:
    # Of the server's regular expressions, which know ASCII alone.
    return st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)


@cache
def _schema() -> JSON:
    found: JSON = schema()["properties"]["spec"]
    return found


@cache
def _label_keys() -> Drawn:
    rules = _schema()["properties"]["gpu"]["properties"]["nodeSelector"]
    found = (_LABEL_RULE.fullmatch(rule["rule"]) for rule in rules["x-kubernetes-validations"])
    pattern = next(match["pattern"] for match in found if match)
    # The prefix is a host name: 253 characters, which no rule has to say of what people write.
    return _matching(pattern).filter(lambda key: len(key) <= 100)


def _put_right(drawn: JSON) -> JSON:
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
