"""What the end-to-end providers tell kind, docker and the API server, where neither kind nor docker can run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.installation import BUNDLE, with_settings
from e2e.providers.choice import PROVIDERS, choose, chosen
from e2e.providers.existing import Existing, node_address
from e2e.providers.kind import Kind
from e2e.providers.kind_plan import BadVariable, KindPlan, set_gpus
from e2e.providers.node_ports import twin
from e2e.providers.provider import Images, Unavailable
from e2e.run import steps
from e2e.stage import kind_plan
from e2e.streams import Crowd, Cut, Question, Stream, ask

from control_cluster import write_kubeconfig
from control_processes import Program, free_port
from fake_kind import FakeKind

JSON = dict[str, Any]
ROOT = Path(__file__).parents[2]
LIGHT_ENGINE = Path(__file__).parents[1] / "support" / "light_engine.py"
QUESTION = Question("count", 5)


def test_the_provider_is_kind_unless_said_otherwise() -> None:
    assert chosen({}) == "kind"
    assert isinstance(choose({"E2E_PROVIDER": "existing"}), Existing)
    with pytest.raises(Unavailable, match=f"E2E_PROVIDER must be one of {', '.join(PROVIDERS)}, not 'minikube'"):
        chosen({"E2E_PROVIDER": "minikube"})


def test_an_existing_cluster_needs_its_kubeconfig() -> None:
    with pytest.raises(Unavailable, match="set it"):
        Existing({}).__enter__()


@pytest.mark.parametrize("user", [{"exec": {"command": "aws"}}, {"auth-provider": {"name": "gcp"}}, {}])
def test_a_user_of_a_plugin_is_refused_with_the_cure(tmp_path: Path, user: JSON) -> None:
    path = write_kubeconfig(tmp_path / "config", url="https://example.com", ca=None, user="eks", token="t")
    document = yaml.safe_load(path.read_text())
    document["users"][0]["user"] = user
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(Unavailable, match=r"KUBECONFIG: the user 'eks' of .*: name a kubeconfig with the token of a"):
        Existing({"KUBECONFIG": str(path)}).__enter__()


def test_the_plan_names_every_program_image_and_cluster() -> None:
    plan = KindPlan(cluster="mine", node_image="example/node:v1")
    told = list(steps(plan))
    assert {step.command[0] for step in told} == {"kind", "docker"}
    (create,) = [step for step in told if "create" in step.command and "mine" in step.command]
    assert create.command[create.command.index("--image") + 1] == "example/node:v1"
    assert yaml.safe_load(create.stdin)["kind"] == "Cluster"
    deleted = [step.command[-1] for step in told if "delete" in step.command]
    assert deleted == ["mine-2", "mine"]


def test_the_images_are_those_that_are_built_for_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(FakeKind(tmp_path / "programs").folder), prepend=os.pathsep)
    spec = importlib.util.spec_from_file_location("images_build", ROOT / ".ci" / "images" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    settings = script.read({"VARIANT": "cpu", "BUILDER": "docker"})
    assert (Images().engine, Images().operator) == (settings.name("engine"), settings.name("operator"))
    inspected = [step.command[-1] for step in KindPlan().needs()]
    assert inspected == [Images().operator, Images().engine]


def test_images_of_the_scenarios_alone_are_built_plainly_from_files_that_are_there() -> None:
    for image in (Images().first_operator, Images().light_engine):
        command = KindPlan().build(image).command
        assert command[command.index("--tag") + 1] == image
        assert {"--provenance=false", "--sbom=false", f"--build-arg=BASE_IMAGE={Images().operator}"} <= set(command)
        (file,) = [word.removeprefix("--file=") for word in command if word.startswith("--file=")]
        copied = [line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith("COPY")]
        assert copied
        assert all(Path(command[-1], name).is_file() for name in copied)


def test_the_nodes_are_a_control_plane_one_with_gpus_and_spare_ones() -> None:
    nodes = yaml.safe_load(KindPlan().config())["nodes"]
    assert [node["role"] for node in nodes].count("control-plane") == 1
    labels = [node.get("labels", {}) for node in nodes]
    assert sum("nvidia.com/gpu.product" in row for row in labels) == 1
    assert sum("e2e.pagedserve.dev/spare" in row for row in labels) == 3
    assert set_gpus(2) == [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "2"}]


def test_a_small_cluster_has_one_plain_worker() -> None:
    nodes = yaml.safe_load(KindPlan(small=True).config())["nodes"]
    assert [(node["role"], "labels" in node) for node in nodes] == [("control-plane", False), ("worker", False)]
    assert kind_plan().small
    fresh = Kind(KindPlan()).fresh()
    assert isinstance(fresh, Kind)
    assert fresh.plan.small


def test_only_one_cluster_has_the_machines_ports() -> None:
    assert "extraPortMappings" in KindPlan().config()
    assert "extraPortMappings" not in KindPlan(reachable=False).config()


def test_kubelet_settings_reach_every_node_in_both_versions_of_kubeadm() -> None:
    plan = KindPlan.read({"KIND_KUBELET_CONFIG": "{failCgroupV1: false}", "KIND_KUBELET_ARGS": "--v=4 a=b"})
    patches = [yaml.safe_load(text) for text in yaml.safe_load(plan.config())["kubeadmConfigPatches"]]
    assert patches[0]["kind"] == "KubeletConfiguration"
    assert patches[0]["failCgroupV1"] is False
    told = {(patch["apiVersion"][-7:], patch["kind"]): patch["nodeRegistration"] for patch in patches[1:]}
    assert told["v1beta3", "JoinConfiguration"] == {"kubeletExtraArgs": {"v": "4", "a": "b"}}
    assert told["v1beta4", "InitConfiguration"] == {
        "kubeletExtraArgs": [{"name": "v", "value": "4"}, {"name": "a", "value": "b"}]
    }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KIND_KUBELET_CONFIG": "[1]"}, "KIND_KUBELET_CONFIG must be a mapping"),
        ({"KIND_KUBELET_CONFIG": "{"}, "KIND_KUBELET_CONFIG is no YAML"),
        ({"KIND_KUBELET_ARGS": "verbose"}, "KIND_KUBELET_ARGS has 'verbose': write name=value"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(BadVariable, match=message):
        KindPlan.read(variables).config()


def test_a_twin_leads_where_its_service_does_and_goes_with_it() -> None:
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    service = {
        "metadata": {"name": "chat", "namespace": "models", "uid": "u"},
        "spec": {"selector": {"a": "b"}, "ports": ports},
    }
    made = twin(service, 30081)
    assert made["metadata"]["ownerReferences"][0]["uid"] == "u"
    assert made["spec"] == {
        "type": "NodePort",
        "selector": {"a": "b"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30081}],
    }


def test_an_address_for_outside_comes_first() -> None:
    rows = [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "ExternalIP", "address": "192.0.2.1"}]
    assert node_address([{"status": {"addresses": rows}}]) == "192.0.2.1"
    assert node_address([{"status": {"addresses": rows[:1]}}]) == "10.0.0.1"
    with pytest.raises(Unavailable, match="E2E_NODE_ADDRESS"):
        node_address([{"status": {}}])


def test_settings_replace_variables_of_the_operator_and_nothing_else() -> None:
    settings = {"LEASE_SECONDS": "3", "LOG_FORMAT": "text"}
    told = with_settings(BUNDLE.read_text(), operator="o:1", engine="e:1", settings=settings)
    before = [row for row in yaml.safe_load_all(BUNDLE.read_text()) if row]
    after = list(yaml.safe_load_all(told))
    (changed,) = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed[1]["kind"] == "Deployment"
    container = changed[1]["spec"]["template"]["spec"]["containers"][0]
    given = {row["name"]: row.get("value") for row in container["env"]}
    assert (container["image"], given["ENGINE_IMAGE"], given["LEASE_SECONDS"], given["LOG_FORMAT"]) == (
        "o:1",
        "e:1",
        "3",
        "text",
    )
    assert "OPERATOR_NAMESPACE" in given


@pytest.fixture
def light(tmp_path: Path) -> Iterator[tuple[Program, str]]:
    """A light engine and its address."""
    port = free_port()
    environment = ["HOST=127.0.0.1", f"PORT={port}"]
    program = Program("light", ["/usr/bin/env", *environment, sys.executable, "-IS", LIGHT_ENGINE], folder=tmp_path)
    program.start()
    program.await_ready(lambda: answers(f"127.0.0.1:{port}"))
    yield program, f"127.0.0.1:{port}"
    program.stop(kill=True)


def answers(address: str) -> bool:
    try:
        return bool(ask(address, QUESTION))
    except Cut:
        return False


def test_a_stream_is_read_to_its_end_also_when_the_engine_is_told_to_leave(light: tuple[Program, str]) -> None:
    program, address = light
    assert ask(address, QUESTION) == " 0 1 2 3 4"
    stream = Stream(address, Question("long", 200))
    assert stream.runs
    program.stop(seconds=30)
    assert stream.finish().endswith(" 199")


def test_a_stream_that_is_cut_says_so(light: tuple[Program, str]) -> None:
    program, address = light
    stream = Stream(address, Question("long", 2000))
    program.stop(kill=True)
    with pytest.raises(Cut):
        stream.finish()
    with pytest.raises(Cut, match="refused"):
        ask(address, QUESTION)


def test_a_crowd_counts_what_is_whole_and_tells_of_the_rest(light: tuple[Program, str]) -> None:
    _, address = light
    right, wrong = QUESTION, Question("count", 6)
    with Crowd(address, {right: " 0 1 2 3 4"}, clients=2) as crowd:
        crowd.wait_started(10)
    assert crowd.faults == []
    assert crowd.tally.whole == crowd.tally.started >= 10
    with Crowd(address, {wrong: "something else"}, clients=1) as crowd:
        crowd.wait_started(1)
    assert crowd.tally.whole == 0
    assert "another text" in crowd.faults[0]
