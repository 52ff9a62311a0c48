"""Real engines on the control plane: what the operator writes is what an engine takes, and what it says is so.

The node stand-in runs the image of the engine as processes of this machine; everything else is the real thing.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_cluster import Cluster
from node_stand_in import NodeStandIn, why_not
from operator_world import World, condition_of, install_crd
from operators import QUICK, OperatorThread
from pagedserve_operator.desired.autoscaler import ENGINE_METRICS
from pagedserve_operator.desired.monitoring import prometheus_rule
from pagedserve_operator.names import ANNOTATION_SECRETS
from pagedserve_operator.parsing import parse

pytest.importorskip("torch", reason="the engine needs torch")

from openai import AuthenticationError

from pagedserve_engine.config import EngineConfig
from real_engine import (
    HURRY,
    LIFECYCLE,
    LONG,
    SECONDS,
    Asking,
    Stream,
    addresses,
    engine_node,
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
def place(control_plane: Cluster) -> Iterator[World]:
    """One namespace for all: engines take long to start, and some tests share theirs."""
    if reason := why_not():
        pytest.skip(reason)
    client, name = control_plane.client(), f"test-{uuid.uuid4().hex[:8]}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    client.wait(lambda: client.find("v1", "ServiceAccount", "default", namespace=name), "its service account")
    yield World(client, name)
    client.delete("v1", "Namespace", name)


@pytest.fixture(scope="module")
def node(place: World) -> Iterator[NodeStandIn]:
    with engine_node(place.client, f"node-{place.namespace}") as node:
        yield node


@pytest.fixture(scope="module")
def world(control_plane: Cluster, place: World, node: NodeStandIn) -> Iterator[World]:
    """The namespace, with a node and an operator that looks at Secrets often."""
    install_crd(control_plane)
    with OperatorThread(control_plane.kubeconfig, QUICK.derive(secret_resync_seconds=0.5)):
        yield place


@pytest.fixture(scope="module")
def small(control_plane: Cluster, world: World) -> Iterator[JSON]:
    """The sample ``cpu-small``, of a tiny model and served; as it was while it loaded."""
    sample = yaml.safe_load(SAMPLE.read_text())
    sample["metadata"]["namespace"] = world.namespace
    sample["spec"] |= {"model": tiny(), "lifecycle": LIFECYCLE}
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


@pytest.fixture(scope="module")
def pair(world: World) -> Iterator[str]:
    """The name of a resource with two engines, whose rollouts need no room."""
    world.create("pair", model=tiny(), replicas=2, lifecycle=LIFECYCLE, rollout={"strategy": "InPlace"})
    wait_served(world, "pair")
    yield "pair"
    world.delete("pair")


def pod_of(world: World, name: str) -> JSON:
    """The one pod that isn't leaving."""
    (pod,) = [pod for pod in world.pods(name) if "deletionTimestamp" not in pod["metadata"]]
    return pod


def engine_of(pod: JSON) -> JSON:
    """The status of the engine's container."""
    status: JSON = pod["status"]["containerStatuses"][0]
    return status


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_a_model_that_loads_is_left_in_peace_and_said_to_load(world: World, small: JSON) -> None:
    assert "load the model" in condition_of(small, "Ready")["message"]
    assert condition_of(small, "Degraded")["status"] == "False"
    pod = pod_of(world, SMALL)
    assert engine_of(pod)["restartCount"] == 0
    ready = next(row for row in pod["status"]["conditions"] if row["type"] == "Ready")
    took = moment(ready["lastTransitionTime"]) - moment(engine_of(pod)["state"]["running"]["startedAt"])
    liveness = pod["spec"]["containers"][0]["livenessProbe"]
    patience = liveness["periodSeconds"] * liveness["failureThreshold"] / HURRY
    assert took.total_seconds() > patience, "nothing is shown: liveness wouldn't have killed it either"


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
    asked |= {metric for metric, _ in ENGINE_METRICS.values()}
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


def test_a_rolling_update_cuts_no_stream_and_fails_no_request(world: World, pair: str) -> None:
    ready = condition_of(world.get(pair), "Ready")
    old = {pod["metadata"]["uid"] for pod in world.pods(pair)}
    with Asking(world, pair) as asking:
        asking.wait_answers(1)
        streams = [Stream(address) for address in addresses(world, pair)]
        assert len(streams) == 2
        world.edit(pair, env=[{"name": "LOG_LEVEL", "value": "debug"}])
        leaving = _wait_draining(world, streams)
        assert leaving.runs
        assert leaving.address not in addresses(world, pair)
        wait_served(world, pair)
        asking.wait_answers(2)
    assert [stream.finish() for stream in streams] == [LONG, LONG]
    assert asking.failures == []
    assert condition_of(world.get(pair), "Ready")["lastTransitionTime"] == ready["lastTransitionTime"]
    assert not old & {pod["metadata"]["uid"] for pod in world.pods(pair) if "deletionTimestamp" not in pod["metadata"]}


def test_a_scale_down_cuts_no_stream_and_fails_no_request(control_plane: Cluster, world: World, pair: str) -> None:
    with Asking(world, pair) as asking:
        asking.wait_answers(1)
        streams = [Stream(address) for address in addresses(world, pair)]
        assert len(streams) == 2
        control_plane.kubectl("-n", world.namespace, "scale", f"psvc/{pair}", "--replicas=1")
        leaving = _wait_draining(world, streams)
        assert leaving.runs
        assert [stream.finish() for stream in streams] == [LONG, LONG]
        world.client.wait(lambda: len(world.pods(pair)) == 1, "one engine is left", seconds=SECONDS)
        asking.wait_answers(2)
    assert asking.failures == []
    assert addresses(world, pair) == [stream.address for stream in streams if stream is not leaving]


def _wait_draining(world: World, streams: list[Stream]) -> Stream:
    """The first stream whose engine takes no more requests."""

    def draining() -> Stream | None:
        return next((stream for stream in streams if health(stream.address) != 200), None)

    return world.client.wait(draining, "an engine drains", seconds=SECONDS)


def test_an_engine_that_cannot_start_says_why_until_the_spec_is_cured(world: World, node: NodeStandIn) -> None:
    windows = {**tiny()["architecture"], "layerTypes": ["sliding", "sliding"], "slidingWindow": 32}
    endless = {**tiny()["architecture"], "maxPositionEmbeddings": 131072}
    lost = "/nowhere/small-135M"
    cases: dict[str, tuple[JSON, JSON, str, str]] = {
        "lost": (tiny(uri=lost), {}, "CrashLoop", f"MODEL is '{lost}': no such file or folder"),
        "long": (
            tiny(architecture=endless, maxModelLen=100_000),
            {},
            "CrashLoop",
            "MAX_MODEL_LEN is 100000 and the model holds 8192 tokens",
        ),
        "large": (
            tiny(architecture=windows, maxModelLen=8000),
            {"numBlocks": 16, "maxBatchTokens": 64},
            "ModelDoesNotFit",
            "MAX_MODEL_LEN is 8000: one sequence of that length takes",
        ),
    }
    for name, (model, tuning, *_) in cases.items():
        world.create(name, model=model, tuning=tuning, lifecycle=LIFECYCLE)
    for name, (*_, reason, message) in cases.items():
        refused = world.wait(name, "Ready", "False", reason=reason, seconds=SECONDS)
        assert message in condition_of(refused, "Ready")["message"]
        assert condition_of(refused, "TuningResolved")["status"] == "True"
        assert (condition_of(refused, "Degraded")["status"], condition_of(refused, "Degraded")["reason"]) == (
            "True",
            reason,
        )
        assert "Available" not in world.events(name)
    world.delete("long")
    world.delete("large")
    world.edit("lost", model={"uri": tiny()["uri"]})
    cured = wait_served(world, "lost")
    assert condition_of(cured, "Degraded")["status"] == "False"
    world.delete("lost")


def test_an_image_that_cannot_be_pulled_is_named(world: World, node: NodeStandIn) -> None:
    world.create("unpulled", image={"repository": "registry.example/engines/lost", "tag": "v9"})
    refused = world.wait("unpulled", "Ready", "False", reason="ImagePullFailed", seconds=SECONDS)
    assert "image registry.example/engines/lost:v9 can't be pulled" in condition_of(refused, "Ready")["message"]
    world.delete("unpulled")
