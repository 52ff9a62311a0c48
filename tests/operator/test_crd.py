"""The CRD's schema without a server: documented, bounded, and one with what the operator reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs
import pytest

from crd import FILE, JSON, fields, schema, strict, version, with_defaults
from pagedserve_operator.parsing import parse

SPEC = schema()["properties"]["spec"]
VALIDATOR = jsonschema_rs.validator_for(strict(schema()))

PASSED_THROUGH = "autoscaling.behavior"
"""Tables that go to a child as they are."""


class Recording(Mapping[str, Any]):
    """A JSON object that remembers which of its fields were asked for."""

    def __init__(self, values: JSON, path: str, asked: set[str]) -> None:
        self._values = {
            name: Recording(value, f"{path}{name}.", asked) if isinstance(value, dict) else value
            for name, value in values.items()
        }
        self._path, self._asked = path, asked

    def __getitem__(self, name: str) -> Any:
        self._asked.add(f"{self._path}{name}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def filled(node: JSON) -> Any:
    """A value with every field there."""
    if "default" in node:
        return node["default"]
    if "enum" in node:
        return node["enum"][0]
    if "properties" in node:
        return {name: filled(below) for name, below in node["properties"].items()}
    return {"object": {}, "array": [], "boolean": True, "string": "1"}.get(node.get("type", "string"), 1)


def opened(node: JSON) -> Any:
    """The least value with every object that needs nothing there and empty, so that all defaults come to bear."""
    names = node.get("required", ())
    return {
        name: opened(below) if "properties" in below else filled(below)
        for name, below in node["properties"].items()
        if name in names or ("properties" in below and not below.get("required"))
    }


def read_by_the_parser() -> set[str]:
    asked: set[str] = set()
    parse({"metadata": {"name": "a"}, "spec": Recording(filled(SPEC), "", asked)})
    return asked


def test_the_file_stays_below_sixty_kilobytes() -> None:
    assert FILE.stat().st_size < 60_000


def test_every_field_is_described_in_sentences() -> None:
    for path, node in fields(schema()):
        if path != ".metadata":
            assert node.get("description", "").endswith("."), path


def test_every_field_with_a_default_tells_it() -> None:
    for path, node in fields(SPEC):
        if "default" in node:
            said = str(node["default"]).lower() if isinstance(node["default"], bool) else str(node["default"])
            assert said in node["description"], path


def test_everything_in_the_spec_is_bounded() -> None:
    """Without bounds the API server has to assume the worst cost of a rule, and refuses the CRD."""
    for path, node in fields(SPEC):
        kind = node.get("type")
        assert kind != "array" or "maxItems" in node, path
        assert kind != "string" or "maxLength" in node or "enum" in node, path
        assert kind not in ("integer", "number") or {"minimum", "maximum"} <= set(node) or "enum" in node, path
        assert "additionalProperties" not in node or "maxProperties" in node, path


def test_every_field_of_the_schema_is_read() -> None:
    known = {path[1:] for path, _ in fields(SPEC) if path and "[]" not in path and "{}" not in path}
    assert {path for path in known - read_by_the_parser() if not path.startswith(f"{PASSED_THROUGH}.")} == set()


def test_every_field_that_is_read_is_in_the_schema() -> None:
    known = {path[1:] for path, _ in fields(SPEC) if path}
    assert read_by_the_parser() - known == set()


def test_defaults_of_schema_and_parser_are_the_same() -> None:
    plain = opened(SPEC)
    served = with_defaults(SPEC, plain)
    assert served != plain
    metadata = {"name": "a"}
    assert parse({"metadata": metadata, "spec": served}).spec == parse({"metadata": metadata, "spec": plain}).spec


def test_no_field_that_a_rule_compares_has_a_default() -> None:
    """Defaulting runs first: the rule would see a value that nobody wrote."""
    compared = set()
    for path, node in fields(SPEC):
        for rule in node.get("x-kubernetes-validations", ()):
            compared |= {f"{path}.{name}" for name in re.findall(r"self\.([a-zA-Z.]+)\b(?!\()", rule["rule"])}
    assert {".gpu.count", ".replicas", ".lifecycle.drainSeconds", ".cache.newClaim.accessMode"} <= compared
    assert {path for path, node in fields(SPEC) if "default" in node} & compared == set()


def test_the_columns_lead_to_fields_of_the_schema() -> None:
    columns = version()["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["Ready", "Reason", "Replicas", "GPU", "Blocks", "URL", "Age"]
    known = {path for path, _ in fields(schema())} | {".metadata.creationTimestamp"}
    for column in columns:
        assert re.sub(r"\[\?\(.*\)\]", "[]", column["jsonPath"]) in known, column["name"]


def test_the_scale_subresource_has_its_selector() -> None:
    known = {path for path, _ in fields(schema())}
    paths = version()["subresources"]["scale"]
    assert set(paths) == {"specReplicasPath", "statusReplicasPath", "labelSelectorPath"}
    assert set(paths.values()) <= known


def resource(path: str, value: Any) -> JSON:
    """A resource with one field set; numbers in the path are rows of a list."""
    spec: Any = {"model": {"uri": "hf://a/b"}}
    place, *rest = path.split(".")
    target = spec
    while rest:
        target = target.setdefault(place, {})
        place, *rest = rest
    target[place] = value
    return {"apiVersion": "pagedserve.dev/v1alpha1", "kind": "InferenceService", "spec": spec}


VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "model.uri": (["hf://org/name", "pvc://claim/path", "/models/x"], ["", "x" * 513, 7, None]),
    "model.dtype": (["auto", "bfloat16"], ["bf16", "", "int8"]),
    "model.maxModelLen": ([2, 131072], [1, "8192", 1.5]),
    "gpu.type": (["auto", "cpu", "NVIDIA-H100-80GB-HBM3", "NVIDIA A100-SXM4-80GB"], ["", "-L4", "a/b"]),
    "gpu.count": ([1, 8], [0, 17, "2"]),
    "gpu.nodeSelector": ([{}, {"a/b": ""}, {"a": "B-1.x"}], [{"a": "no blank"}, {"a": 1}, {"a": "x" * 64}]),
    "tuning.blockSize": ([8, 256], [0, 4, 33, 512]),
    "tuning.safetyMargin": ([0, 0.2, 0.99], [-0.1, 1, "0.2", "20%"]),
    "tuning.maxMemoryPercent": ([0.9, 1], [90, 0, "90%"]),
    "tuning.numBlocks": ([2, 100_000], [1, "auto"]),
    "replicas": ([0, 3], [-1, 1001, "2"]),
    "cache.emptyDir": (
        [{}, {"sizeLimit": "50Gi"}, {"sizeLimit": 1024}],
        [{"sizeLimit": "50GB"}, {"sizeLimit": "-1Gi"}],
    ),
    "cache.newClaim": (
        [{}, {"size": "1.5Ti"}, {"size": "0.5Gi"}, {"size": "104857600Ki"}],
        [{"size": "0"}, {"size": 0}, {"size": "100 Gi"}, {"size": "1e3"}, {"size": "10gb"}, {"accessMode": "RWX"}],
    ),
    "resources.requests": (
        [{"cpu": 4}, {"cpu": "0.5"}, {"cpu": "1500m", "memory": "16Gi"}],
        [{"cpu": "0"}, {"cpu": "two"}, {"cpu": -1}, {"memory": "16 GB"}, {"nvidia.com/gpu": 1}],
    ),
    "image": (
        [{"repository": "registry.example.com:5000/a/b-c", "tag": "1.0"}, {"tag": "1.0@sha256:" + "a" * 64}],
        [{"repository": "a/b:tag"}, {"repository": "A/B"}, {"tag": "a:b"}, {"pullPolicy": "always"}],
    ),
    "auth.hfTokenSecretRef": ([{"name": "a"}, {"name": "a.b", "key": "K.1"}], [{}, {"key": "a"}, {"name": "A"}]),
    "env": ([[], [{"name": "A_1", "value": ""}]], [[{"name": "1A"}], [{"value": "x"}], [{"name": "A", "value": 1}]]),
    "podTemplate.volumes": ([[{"name": "a"}]], [[{"name": "A"}], [{"name": "a", "hostPath": {"path": "/"}}]]),
    "podTemplate.volumeMounts": (
        [[{"name": "a", "mountPath": "/a/b.c"}]],
        [[{"name": "a", "mountPath": path}] for path in ("a", "/", "/a/", "/a/../b", "/a:b")],
    ),
    "service.port": ([80, 65535], [0, 65536, "http"]),
    "networkPolicy.allowFrom": (
        [[{"podSelector": {}}], [{"ipBlock": {"cidr": "10.0.0.0/8"}}], [{"ipBlock": {"cidr": "2001:db8::/32"}}]],
        [[{}], [{"ipBlock": {}}], *([{"ipBlock": {"cidr": bad}}] for bad in ("10.0.0.0", "10.0.0.256/8", ":::/0"))],
    ),
    "monitoring.interval": (["15s", "2m"], ["15", "0s", "1h", "1.5s"]),
    "suspend": ([True], ["yes", "true", 1]),
    "unknown": ([], [1]),
    "podTemplate.nodeName": ([], ["a"]),
}


@pytest.mark.parametrize("path", VALUES)
def test_values_are_bounded_by_the_schema(path: str) -> None:
    good, bad = VALUES[path]
    for value in good:
        VALIDATOR.validate(resource(path, value))
    for value in bad:
        assert not VALIDATOR.is_valid(resource(path, value)), value
