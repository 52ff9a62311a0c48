"""Real engines on the control plane: what the operator writes is what an engine takes, and what it says is so.

The node stand-in runs the image of the engine as processes of this machine; everything else is the real thing.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_cluster import Cluster
from missing import skip_without
from node_stand_in import NodeStandIn, why_not
from operator_world import World, condition_of
from pagedserve_operator.desired.monitoring import prometheus_rule
from pagedserve_operator.engine_metrics import ENGINE_METRICS
from pagedserve_operator.names import ANNOTATION_SECRETS
from pagedserve_operator.parsing import parse

pytest.importorskip("torch", reason="the engine needs torch")

from openai import AuthenticationError

from pagedserve_engine.config import EngineConfig
from real_engine import (
    HURRY,
    LIFECYCLE,
    SECONDS,
    SLOW_IMAGE,
    SLOW_SECONDS,
    Asking,
    addresses,
    engine_world,
    health,
    only_address,
    openai_at,
    samples,
    tiny,
    wait_served,
)

JSON = dict[str, Any]

SMALL = "cpu-small"
SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / f"{SMALL}.yaml"
OF_LIBRARIES = {"HOME", "HF_HOME"}
"""Variables that the engine itself doesn't read."""
QUESTION: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engines(control_plane: Cluster) -> Iterator[tuple[World, NodeStandIn]]:
    """One namespace, node and operator for all: engines take long to start, and some tests share theirs."""
    if reason := why_not():
        skip_without(reason)
    with engine_world(control_plane) as engines:
        yield engines


@pytest.fixture(scope="module")
def world(engines: tuple[World, NodeStandIn]) -> World:
    return engines[0]


@pytest.fixture(scope="module")
def node(engines: tuple[World, NodeStandIn]) -> NodeStandIn:
    return engines[1]


@pytest.fixture(scope="module")
def small(control_plane: Cluster, world: World) -> Iterator[JSON]:
    """The sample ``cpu-small``, of a tiny model and served; as it was while it loaded."""
    sample = yaml.safe_load(SAMPLE.read_text())
    sample["metadata"]["namespace"] = world.namespace
    sample["spec"] |= {"model": tiny(), "lifecycle": LIFECYCLE}
    repository, tag = SLOW_IMAGE.split(":")
    sample["spec"]["image"] = {"repository": repository, "tag": tag}
    control_plane.kubectl("apply", "-f=-", stdin=yaml.safe_dump(sample))
    loading = world.wait(SMALL, "Ready", "False", reason="ModelLoading", seconds=SECONDS)
    wait_served(world, SMALL)
    yield loading
    world.delete(SMALL)


@pytest.fixture(scope="module")
def everything(world: World) -> str:
    """The name of a served resource that uses every field which the engine is told of."""
    world.secret("keys", **{"api-keys": "first"})
    world.secret("hub", token="hf_one")
    world.create(
        "everything",
        model=tiny(
            revision="main",
            dtype="float32",
            maxModelLen=4096,
            quantization="none",
            chatTemplate="{% for message in messages %}{{ message.content }}{% endfor %}",
        ),
        tuning={
            "blockSize": 16,
            "safetyMargin": 0.1,
            "maxMemoryPercent": 0.5,
            "scheduler": "prefill_first",
            "useCudaGraph": True,
            "kvCacheDtype": "bfloat16",
        },
        limits={"maxNumSeqs": 8, "maxQueue": 16, "requestTimeoutSeconds": 90},
        lifecycle={**LIFECYCLE, "drainSeconds": 45},
        auth={"apiKeysSecretRef": {"name": "keys"}, "hfTokenSecretRef": {"name": "hub"}},
        env=[{"name": "NUM_THREADS", "value": "2"}, {"name": "PREFIX_CACHE", "value": "false"}],
        resources={"limits": {"memory": "4Gi"}},
    )
    wait_served(world, "everything")
    return "everything"


def pod_of(world: World, name: str) -> JSON:
    """The one pod that isn't leaving."""
    (pod,) = [pod for pod in world.pods(name) if "deletionTimestamp" not in pod["metadata"]]
    return pod


def engine_of(pod: JSON) -> JSON:
    """The status of the engine's container."""
    status: JSON = pod["status"]["containerStatuses"][0]
    return status


def test_a_model_that_loads_is_left_in_peace_and_said_to_load(world: World, small: JSON) -> None:
    assert "is being loaded" in condition_of(small, "Ready")["message"]
    assert condition_of(small, "Degraded")["status"] == "False"
    pod = pod_of(world, SMALL)
    assert engine_of(pod)["restartCount"] == 0
    liveness = pod["spec"]["containers"][0]["livenessProbe"]
    patience = liveness["periodSeconds"] * liveness["failureThreshold"] / HURRY
    assert patience < SLOW_SECONDS / 2, "nothing is shown: liveness wouldn't have killed it either"


def test_the_official_client_chats_where_the_service_leads(world: World, small: JSON) -> None:
    with openai_at(only_address(world, SMALL)) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content


def test_a_killed_engine_comes_back_and_ready_tells_both(world: World, node: NodeStandIn, small: JSON) -> None:
    before = pod_of(world, SMALL)
    os.kill(node.pids(before["metadata"]["name"])["engine"], signal.SIGKILL)
    down = world.wait(SMALL, "Ready", "False", seconds=SECONDS)
    assert "exit code 137" in condition_of(down, "Ready")["message"]
    assert condition_of(down, "Degraded")["status"] == "True"
    world.client.wait(lambda: not addresses(world, SMALL), "the Service has no endpoint")
    up = wait_served(world, SMALL)
    assert condition_of(up, "Degraded")["status"] == "False"
    pod = pod_of(world, SMALL)
    assert (pod["metadata"]["uid"], engine_of(pod)["restartCount"]) == (before["metadata"]["uid"], 1)
    assert health(only_address(world, SMALL)) == 200


def test_the_engine_reads_every_variable_as_it_was_meant(world: World, node: NodeStandIn, everything: str) -> None:
    pod = pod_of(world, everything)
    written = {row["name"] for row in pod["spec"]["containers"][0]["env"]}
    assert written - {field.name.upper() for field in fields(EngineConfig)} == OF_LIBRARIES
    environ = Path(f"/proc/{node.pids(pod['metadata']['name'])['engine']}/environ").read_text()
    read = EngineConfig.read(environ=dict(row.split("=", 1) for row in environ.split("\0") if row))
    tuning = world.get(everything)["status"]["tuning"]
    assert read == read.derive(
        model=tiny()["uri"],
        model_revision="main",
        served_model_name="tiny",
        dtype="float32",
        max_model_len=4096,
        kv_cache_dtype="bfloat16",
        device="cpu",
        num_blocks=tuning["numBlocks"],
        max_batch_tokens=tuning["maxBatchTokens"],
        block_size=16,
        safety_margin=0.1,
        max_memory_percent=0.5,
        use_cuda_graph=False,
        scheduler="prefill_first",
        prefix_cache=False,
        num_threads=2,
        max_num_seqs=8,
        max_queue=16,
        request_timeout_seconds=90,
        drain_seconds=45,
        log_format="json",
        port=8080,
    )
    assert read.chat_template is not None
    assert "message.content" in read.chat_template.read_text()
    assert read.api_key_file is not None
    assert read.api_key_file.read_text() == "first"
    assert read.hf_token_file is not None
    assert read.hf_token_file.read_text() == "hf_one"


def test_a_chat_goes_through_the_template_of_the_spec(world: World, everything: str) -> None:
    with openai_at(only_address(world, everything), key="first") as client:
        plain = client.completions.create(model="tiny", prompt="Hello", max_tokens=1)
        chat = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert chat.usage is not None
    assert plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


def test_the_gauges_agree_with_the_status(world: World, everything: str) -> None:
    gauges, tuning = samples(only_address(world, everything)), world.get(everything)["status"]["tuning"]
    names = {"numBlocks": "num_blocks", "maxBatchTokens": "max_batch_tokens", "maxModelLen": "max_model_len"}
    for field, gauge in names.items():
        kinds = {kind: gauges[f"pagedserve_{gauge}", kind] for kind in ("requested", "actual")}
        assert kinds == {"requested": tuning[field], "actual": tuning[field]}, field


def test_every_metric_that_alerts_and_autoscaling_ask_for_is_there(world: World, everything: str) -> None:
    service = parse(world.create("watched", suspend=True, monitoring={"prometheusRule": True}))
    world.delete("watched")
    asked = set(re.findall(r"\bpagedserve_\w+", str(prometheus_rule(service)["spec"])))  # type: ignore[index]
    asked |= set(ENGINE_METRICS.values())
    assert len(asked) > len(ENGINE_METRICS)
    assert asked <= {name for name, _ in samples(only_address(world, everything))}


def test_rotated_api_keys_are_taken_without_a_restart(world: World, node: NodeStandIn, everything: str) -> None:
    before = pod_of(world, everything)
    address = only_address(world, everything)

    def is_accepted(key: str) -> bool:
        with openai_at(address, key=key) as client:
            try:
                client.completions.create(model="tiny", prompt="Hello", max_tokens=1)
            except AuthenticationError:
                return False
            return True

    assert (is_accepted("first"), is_accepted("second")) == (True, False)
    world.secret("keys", **{"api-keys": "second"})
    world.client.wait(lambda: is_accepted("second"), "the new key is accepted")
    assert not is_accepted("first")
    after = pod_of(world, everything)
    assert (after["metadata"]["uid"], engine_of(after)["restartCount"]) == (before["metadata"]["uid"], 0)


def test_another_token_for_the_hub_rolls_the_engine_and_somebody_always_answers(
    world: World, node: NodeStandIn, everything: str
) -> None:
    before = pod_of(world, everything)
    deployment = world.child("Deployment", everything)

    def annotation(child: JSON) -> str:
        return str(child["spec"]["template"]["metadata"]["annotations"][ANNOTATION_SECRETS])

    def is_replaced() -> bool:
        return before["metadata"]["uid"] not in {pod["metadata"]["uid"] for pod in world.pods(everything)}

    with Asking(world, everything, key="second") as asking:
        asking.wait_answers(1)
        world.secret("hub", token="hf_two")
        world.wait_child("Deployment", everything, lambda child: annotation(child) != annotation(deployment), "rolls")
        world.client.wait(is_replaced, "the old engine has gone", seconds=SECONDS)
        asking.wait_answers(1)
    assert asking.failures == []
    wait_served(world, everything)
    world.delete(everything)
