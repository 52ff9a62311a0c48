from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from children import UID, resource
from pagedserve_operator.errors import SpecError
from pagedserve_operator.names import Key
from pagedserve_operator.parsing import parse
from pagedserve_operator.spec import InferenceService, Spec

SHAPE = {
    "layers": 12,
    "kvHeads": 13,
    "headDim": 14,
    "hiddenSize": 15,
    "intermediateSize": 16,
    "vocabSize": 17,
    "parameters": 18,
}
# Each field's value differs from its default, and from each other's: a field that is read from another's place is seen.
EVERYTHING: dict[str, Any] = {
    "model": {
        "uri": "hf://example/model",
        "revision": "v2",
        "servedName": "chat",
        "dtype": "float16",
        "maxModelLen": 4096,
        "quantization": "int8",
        "chatTemplate": "{{ messages }}",
        "architecture": {
            **SHAPE,
            "layerTypes": ["full", "sliding"],
            "slidingWindow": 19,
            "activeParameters": 20,
            "maxPositionEmbeddings": 21,
        },
    },
    "gpu": {
        "type": "L4",
        "count": 2,
        "memoryMiB": 20000,
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "b"}],
        "pin": False,
    },
    "tuning": {
        "numBlocks": 100,
        "maxBatchTokens": 200,
        "blockSize": 64,
        "safetyMargin": 0.1,
        "maxMemoryPercent": 0.8,
        "scheduler": "prefill_first",
        "useCudaGraph": False,
        "kvCacheDtype": "bfloat16",
    },
    "replicas": 3,
    "autoscaling": {"minReplicas": 4, "maxReplicas": 5, "metrics": [{"name": "cpu"}], "behavior": {"scaleUp": {}}},
    "rollout": {"strategy": "InPlace"},
    "lifecycle": {"startupTimeoutSeconds": 300, "preStopSeconds": 25, "drainSeconds": 60},
    "limits": {"maxNumSeqs": 31, "maxQueue": 32, "requestTimeoutSeconds": 33},
    "cache": {"newClaim": {"size": "50Gi", "storageClassName": "fast", "accessMode": "ReadWriteOnce"}},
    "auth": {
        "apiKeysSecretRef": {"name": "keys", "key": "clients"},
        "hfTokenSecretRef": {"name": "hub", "key": "secret"},
    },
    "image": {"repository": "example/engine", "tag": "2", "pullPolicy": "Always", "pullSecrets": ["registry"]},
    "resources": {"requests": {"cpu": 4, "memory": "8Gi"}, "limits": {"cpu": "6", "memory": "9Gi"}},
    "env": [{"name": "A", "value": "b"}],
    "podTemplate": {
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "volumes": [{"name": "v"}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "sidecars": [{"name": "s"}],
        "serviceAccountName": "account",
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "topologySpread": [{"topologyKey": "zone"}],
    },
    "service": {"type": "NodePort", "port": 8000, "annotations": {"c": "d"}},
    "disruption": {"enabled": False},
    "networkPolicy": {"enabled": True, "allowFrom": [{"podSelector": {}}]},
    "monitoring": {
        "podMonitor": False,
        "serviceMonitor": True,
        "prometheusRule": False,
        "interval": "5s",
        "labels": {"release": "main"},
    },
    "suspend": True,
}


def parsed(spec: dict[str, Any]) -> Spec:
    return parse(resource(spec)).spec


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Fields that are no dataclasses themselves, by their path."""
    if is_dataclass(value):
        rows = (leaves(getattr(value, field.name), f"{path}.{field.name}") for field in fields(value))
        return {name: leaf for row in rows for name, leaf in row.items()}
    return {path: value}


def test_the_least_resource_has_every_default() -> None:
    spec = parsed({})
    assert spec.model.dtype == "auto"
    assert (spec.gpu.type, spec.gpu.count, spec.gpu.pin) == ("auto", 1, True)
    assert (spec.tuning.block_size, spec.tuning.safety_margin, spec.tuning.max_memory_percent) == (32, 0.2, 0.9)
    assert (spec.lifecycle.pre_stop_seconds, spec.lifecycle.drain_seconds) == (15, 120)
    assert (spec.service.type, spec.service.port) == ("ClusterIP", 80)
    assert (spec.strategy, spec.suspend, spec.disruption_budget) == ("Auto", False, True)
    assert (spec.replicas, spec.autoscaling, spec.cache.new_claim, spec.api_keys) == (None, None, None, None)


def test_every_field_that_is_given_is_read() -> None:
    full, least = leaves(parsed(EVERYTHING)), leaves(parsed({}))
    # Either a claim is made or one is there; the schema allows no two.
    one_of = {".cache.existing_claim", ".cache.size_limit"}
    unread = {path for path, value in full.items() if least.get(path, "absent") == value}
    assert unread == one_of
    assert parsed({"cache": {"existingClaim": "weights"}}).cache.existing_claim == "weights"
    assert parsed({"cache": {"emptyDir": {"sizeLimit": "5Gi"}}}).cache.size_limit == "5Gi"


def test_no_two_numbers_are_read_from_one_field() -> None:
    numbers = [value for value in leaves(parsed(EVERYTHING)).values() if type(value) in (int, float)]
    assert len(numbers) == len(set(numbers)) > 20


def test_parsing_leaves_the_json_as_it_is() -> None:
    raw = resource(EVERYTHING)
    before = copy.deepcopy(raw)
    assert parse(raw).raw == before == raw


def test_who_the_resource_is_comes_from_its_metadata() -> None:
    service = parse(resource())
    assert (service.key, service.owner.uid, service.generation) == (Key("models", "chat"), UID, 1)


def test_a_file_without_a_server_has_the_default_namespace_and_no_uid() -> None:
    service = parse({"metadata": {"name": "chat"}, "spec": {"model": {"uri": "hf://example/model"}}})
    assert (service.key, service.owner.uid, service.generation) == (Key("default", "chat"), "", 1)


BOUNDS = {
    "nothing": ({}, (2, 10)),
    "a minimum": ({"minReplicas": 3}, (3, 10)),
    "a minimum above the default maximum": ({"minReplicas": 20}, (20, 20)),
    "a maximum": ({"maxReplicas": 4}, (2, 4)),
    "a maximum below the default minimum": ({"maxReplicas": 1}, (1, 1)),
    "both": ({"minReplicas": 5, "maxReplicas": 6}, (5, 6)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_that_is_missing_follows_the_one_that_is_given(name: str) -> None:
    given, bounds = BOUNDS[name]
    autoscaling = parsed({"autoscaling": given}).autoscaling
    assert autoscaling is not None
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == bounds


def test_empty_objects_say_what_absent_ones_do_not() -> None:
    assert parsed({"autoscaling": {}}).autoscaling is not None
    assert parsed({"cache": {"newClaim": {}}}).cache.new_claim is not None
    assert parsed({"cache": {"emptyDir": {}}}) == parsed({})


def test_zero_replicas_are_not_the_default() -> None:
    assert parsed({"replicas": 0}).replicas == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, r"spec\.model\.uri: is missing"),
    "a model that is a string": ({"model": "hf://a/b"}, r"spec\.model: must be an object"),
    "a quoted number": ({"replicas": "2"}, r"spec\.replicas: must be a whole number, not '2'"),
    "a quoted fraction": (
        {"tuning": {"safetyMargin": "0.2"}},
        r"spec\.tuning\.safetyMargin: must be a number, not '0\.2'",
    ),
    "an unknown strategy": ({"rollout": {"strategy": "Blue"}}, r"spec\.rollout\.strategy: must be one of Auto, Surge"),
    "a bad quantity": ({"resources": {"limits": {"memory": "8GB"}}}, r"spec\.resources\.limits\.memory: '8GB' is no"),
    "a bad size of a claim": ({"cache": {"newClaim": {"size": "big"}}}, r"spec\.cache\.newClaim\.size: 'big' is no"),
    "a Secret without a name": ({"auth": {"hfTokenSecretRef": {}}}, r"spec\.auth\.hfTokenSecretRef\.name: is missing"),
    "half a shape": (
        {"model": {"uri": "a", "architecture": {"layers": 2}}},
        r"spec\.model\.architecture\.kvHeads: is missing",
    ),
    "a selector with a number": ({"gpu": {"nodeSelector": {"a": 1}}}, r"spec\.gpu\.nodeSelector\.a: must be a string"),
    "variables as a table": ({"env": {"A": "b"}}, r"spec\.env: must be a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_without_a_server_gets_wrong_is_named_by_its_path(name: str) -> None:
    spec, message = REFUSED[name]
    with pytest.raises(SpecError, match=f"^{message}"):
        parsed(spec)


@pytest.mark.parametrize("raw", [{}, {"metadata": {}}, {"metadata": {"name": ""}}, {"metadata": None, "spec": None}])
def test_a_resource_without_a_name_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^metadata\.name: is missing"):
        parse(raw)


@pytest.mark.parametrize("spec", [None, [], "text", 5])
def test_a_resource_without_a_spec_is_refused(spec: Any) -> None:
    with pytest.raises(SpecError, match=r"^spec"):
        parse({**resource(), "spec": spec})


def test_a_parsed_resource_is_compared_by_value_without_its_json() -> None:
    one, other = resource({"replicas": 1}), resource({"replicas": 1})
    other["metadata"]["labels"] = {"team": "a"}
    assert parse(one) == parse(other)
    assert parse(one) != parse(resource({"replicas": 2}))
    assert isinstance(parse(one), InferenceService)
