import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_operator.gpus.labels import read_node
from pagedserve_operator.gpus.resolve import resolve
from pagedserve_operator.spec import InferenceService
from pagedserve_operator.tuning import Tuning, decide, engine_image, inputs_hash, memory_of_pod, status_of
from tuning_cases import gfd, gpu_spec, node, resolved, service, shape

IMAGE = "pagedserve/engine:0.1.0"


def tuned(parsed: InferenceService | None = None, card: str = "L4") -> Tuning:
    return decide(parsed or service(), gpu=resolved(card), shape=shape(), default_image=IMAGE)


def test_a_decision_survives_its_json() -> None:
    for tuning in (tuned(), tuned(card="H100"), tuned(service(tuning={"numBlocks": 7, "useCudaGraph": False}))):
        assert Tuning.from_json(tuning.to_json()) == tuning


def test_a_pinned_decision_survives_its_json() -> None:
    nodes = read_node(node(labels=gfd("NVIDIA-L4", 23034), gpu=1))
    gpu = resolve(gpu_spec(), nodes, min_compute_capability=(7, 5))
    tuning = decide(service(), gpu=gpu, shape=shape(), default_image=IMAGE)
    assert Tuning.from_json(tuning.to_json()) == tuning
    assert tuning.gpu.pin == {"nvidia.com/gpu.product": ("NVIDIA-L4",)}


def test_equal_decisions_are_equal_text() -> None:
    assert tuned().to_json() == tuned().to_json()
    assert tuned().to_json().startswith('{"gpu":{"bandwidth_gbs":300,')


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "7", '"x"', "{", '{"gpu":{}}', "\x00"])
def test_other_text_is_no_decision(text: str) -> None:
    assert Tuning.from_json(text) is None


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path, *(place for key in value for place in places(value[key], (*path, key)))]


PLACES = [place for place in places(json.loads(tuned().to_json())) if place and "pin" not in place]


DEFAULTS = {("gpu", "notes"): [], ("gpu", "is_whole"): True}
"""What earlier releases meant that left it out."""


@given(st.sampled_from(PLACES), st.sampled_from(["gone", None, [], {}, True, "x", -1.5, [1]]))
def test_a_decision_with_any_part_changed_is_read_as_it_is_or_not_at_all(place: tuple[str, ...], change: Any) -> None:
    document = json.loads(tuned().to_json())
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    if change == "gone":
        del parent[place[-1]]
    else:
        parent[place[-1]] = change
    found = Tuning.from_json(json.dumps(document))
    if change == "gone" and place in DEFAULTS:
        parent[place[-1]] = DEFAULTS[place]
    assert found is None or json.loads(found.to_json()) == document


def test_a_decision_of_a_release_that_knew_no_such_part_is_read_as_it_was_meant() -> None:
    tuning = tuned()
    document = json.loads(tuning.to_json())
    del document["gpu"]["is_whole"]
    assert Tuning.from_json(json.dumps(document)) == tuning


def test_who_decided_each_number_is_told() -> None:
    given = service(
        model={"dtype": "float16", "maxModelLen": 100},
        tuning={"numBlocks": 50, "maxBatchTokens": 64, "useCudaGraph": True},
    )
    assert set(tuned().sources.values()) == {"computed"}
    assert set(tuned(given).sources.values()) == {"spec"}
    assert set(tuned().sources) == {"numBlocks", "maxBatchTokens", "maxModelLen", "useCudaGraph", "dtype"}


def test_graphs_are_on_where_there_is_a_gpu() -> None:
    assert tuned().use_cuda_graph
    assert not tuned(service(tuning={"useCudaGraph": False})).use_cuda_graph
    cpu = decide(service(gpu={"type": "cpu"}), gpu=resolved("cpu"), shape=shape("SmolLM2-135M"), default_image=IMAGE)
    assert not cpu.use_cuda_graph
    assert cpu.weights_mib == pytest.approx(513, abs=1)


def test_the_weights_are_the_whole_models_even_on_several_devices() -> None:
    tuning = decide(service(gpu={"count": 2}), gpu=resolved("L4", count=2), shape=shape(), default_image=IMAGE)
    assert tuning.weights_mib == tuned().weights_mib == pytest.approx(15316, abs=1)


def test_the_number_of_sequences_counts() -> None:
    few, many = (tuned(service(limits={"maxNumSeqs": number})) for number in (1, 512))
    assert few.sizing.num_blocks > many.sizing.num_blocks


@pytest.mark.parametrize(
    ("image", "default", "expected"),
    [
        ({}, IMAGE, IMAGE),
        ({"repository": "own/engine"}, IMAGE, "own/engine:0.1.0"),
        ({"tag": "2"}, IMAGE, "pagedserve/engine:2"),
        ({"repository": "own/engine", "tag": "2"}, IMAGE, "own/engine:2"),
        ({"tag": "2"}, "registry:5000/engine", "registry:5000/engine:2"),
        ({"repository": "own"}, "registry:5000/engine", "own"),
        ({}, "a/b@sha256:00", "a/b@sha256:00"),
        ({"tag": "2"}, "a/b:1@sha256:00", "a/b:2"),
    ],
)
def test_the_image_is_the_users_where_given(image: dict[str, str], default: str, expected: str) -> None:
    assert engine_image(service(image=image).spec.image, default) == expected


@pytest.mark.parametrize(
    ("resources", "memory"),
    [
        ({}, None),
        ({"requests": {"memory": "2Gi"}}, 2048),
        ({"requests": {"memory": "2Gi"}, "limits": {"memory": "4G"}}, 3814),
        ({"limits": {"cpu": "4"}}, None),
    ],
)
def test_a_pods_memory_is_its_limit_else_its_request(resources: dict[str, Any], memory: int | None) -> None:
    assert memory_of_pod(service(resources=resources).spec) == memory


SAME: dict[str, dict[str, Any]] = {
    "replicas": {"replicas": 5},
    "autoscaling": {"autoscaling": {"maxReplicas": 4}},
    "what clients call it": {"model": {"servedName": "x"}},
    "chat template": {"model": {"chatTemplate": "{{ x }}"}},
    "order of requests": {"tuning": {"scheduler": "prefill_first", "safetyMargin": 0.5}},
    "a default that is written out": {"gpu": {"type": "auto", "count": 1, "pin": True}, "tuning": {"blockSize": 32}},
    "pull policy": {"image": {"pullPolicy": "Always"}},
    "memory of a pod with a GPU": {"resources": {"limits": {"memory": "64Gi"}}},
    "labels": {"podTemplate": {"labels": {"a": "b"}}},
}
OTHER: dict[str, dict[str, Any]] = {
    "model": {"uri": "hf://org/other-8b"},
    "revision": {"model": {"revision": "abc"}},
    "dtype": {"model": {"dtype": "float16"}},
    "length": {"model": {"maxModelLen": 100}},
    "type": {"gpu": {"type": "L4"}},
    "count": {"gpu": {"count": 2}},
    "selector": {"gpu": {"nodeSelector": {"a": "b"}}},
    "tolerations": {"gpu": {"tolerations": [{"key": "a"}]}},
    "pin": {"gpu": {"pin": False}},
    "blocks": {"tuning": {"numBlocks": 9}},
    "block size": {"tuning": {"blockSize": 16}},
    "memory share": {"tuning": {"maxMemoryPercent": 0.8}},
    "graphs": {"tuning": {"useCudaGraph": False}},
    "image": {"image": {"tag": "2"}},
    "sequences": {"limits": {"maxNumSeqs": 3}},
    "cpu": {"gpu": {"type": "cpu"}},
}


@pytest.mark.parametrize("change", SAME)
def test_what_the_decision_does_not_depend_on_keeps_it(change: str) -> None:
    assert inputs_hash(service(**SAME[change])) == inputs_hash(service())


def test_each_input_of_the_decision_makes_another_hash() -> None:
    hashes = {name: inputs_hash(service(**change)) for name, change in OTHER.items()}
    assert len({*hashes.values(), inputs_hash(service())}) == len(OTHER) + 1


def test_memory_counts_where_the_engine_runs_in_it() -> None:
    small, large = (service(gpu={"type": "cpu"}, resources={"limits": {"memory": size}}) for size in ("4Gi", "8Gi"))
    assert inputs_hash(small) != inputs_hash(large)
    assert inputs_hash(small) == inputs_hash(service(gpu={"type": "cpu"}, resources={"limits": {"memory": "4096Mi"}}))


def test_a_hash_is_the_same_in_every_release() -> None:
    # A change here decides anew for every resource when the operator is upgraded, and may roll all pods.
    assert inputs_hash(service()) == "db561cfeb423aa51"


def test_the_status_has_the_numbers_their_origin_and_the_breakdown() -> None:
    status = status_of(tuned())
    assert status["gpu"]["product"] == "NVIDIA-L4"
    assert (status["numBlocks"], status["sources"]["numBlocks"]) == (tuned().sizing.num_blocks, "computed")
    assert (
        sum(size for part, size in status["breakdownMiB"].items() if part != "total") == status["breakdownMiB"]["total"]
    )
    assert json.loads(json.dumps(status)) == status
