"""Random specs that the API server accepts, drawn from the CRD's own schema: types, bounds, patterns and enums as they
stand in the file, and what its rules forbid is put right afterwards.

A rule that is added to the CRD and not here shows in the tests that create what is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st

from crd import schema
from spec_rules import put_right

JSON = dict[str, Any]
Drawn = st.SearchStrategy[Any]

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
    return _value(_schema(), "", places or {}).map(put_right)


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
