"""The operator as its administrator meets it: a process with metrics, probes, logs, signals and exit statuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from control_cluster import Cluster
from crd import ROOT
from fake_nodes import FakeNodes
from operator_world import World, install_crd
from operators import OperatorProcess
from pagedserve_operator.__main__ import main
from pagedserve_operator.kinds import CHILDREN, KINDS, OPTIONAL
from pagedserve_operator.names import KIND, LEASE_NAME
from tuning_cases import gfd, node

SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
ENDING_SECONDS = 15.0
Labels = tuple[tuple[str, str], ...]


@pytest.fixture
def process(control_plane: Cluster, namespace: str, fake_nodes: FakeNodes, tmp_path: Path) -> Iterator[OperatorProcess]:
    """A running operator of one namespace, with its Lease in it."""
    install_crd(control_plane)
    fake_nodes.add_node("operability")
    settings = {"WATCH_NAMESPACE": namespace, "OPERATOR_NAMESPACE": namespace, "READ_NODES": "true"}
    with OperatorProcess(control_plane.kubeconfig, tmp_path, **settings) as running:
        yield running


@pytest.fixture
def world(control_plane: Cluster, namespace: str) -> World:
    return World(control_plane.client(), namespace)


def test_a_day_of_an_operator_is_measured_logged_and_ended(process: OperatorProcess, world: World) -> None:
    world.create("chat")
    world.create("broken", model={"uri": "s3://bucket/model"})
    world.wait_ready("chat")
    world.wait("broken", "Degraded", reason="UnsupportedModelURI")
    assert process.get("/healthz") == (200, "ok")
    assert process.get("/readyz") == (200, "ok")
    shows_looks_and_calls(process)
    shows_watches(process)
    shows_resources(process, world)
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < ENDING_SECONDS
    lease = world.child("Lease", LEASE_NAME)
    assert not lease["spec"].get("holderIdentity")
    tells_lines_of_json(process, world)


def shows_looks_and_calls(process: OperatorProcess) -> None:
    metrics = process.metrics()

    def total(name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(value for (found, given), value in metrics.items() if found == name and wanted <= set(given))

    looks = {result: total("pagedserve_operator_reconciles_total", result=result) for result in ("changed", "refused")}
    assert min(looks.values()) >= 1, looks
    assert total("pagedserve_operator_reconcile_seconds_count") >= sum(looks.values())
    for verb, code in (("apply", "201"), ("get", "200"), ("get", "404"), ("watch", "200"), ("patch", "200")):
        assert total("pagedserve_operator_api_calls_total", verb=verb, code=code) >= 1, (verb, code)
    for name in ("queue_depth", "queue_oldest_seconds"):
        assert metrics[f"pagedserve_operator_{name}", ()] >= 0
    assert metrics["pagedserve_operator_leading", ()] == 1


def shows_watches(process: OperatorProcess) -> None:
    ages = {
        dict(labels)["kind"]: value
        for (name, labels), value in process.metrics().items()
        if name == "pagedserve_operator_watch_event_age_seconds"
    }
    assert {KIND, "Pod", "Node", *CHILDREN} - OPTIONAL <= set(ages) <= set(KINDS)
    assert all(0 <= age < 180 for age in ages.values()), ages


def shows_resources(process: OperatorProcess, world: World) -> None:
    def counted(condition: str, status: str) -> float:
        labels: Labels = (("condition", condition), ("status", status))
        return process.metrics().get(("pagedserve_operator_resources", labels), 0)

    assert counted("Ready", "True") == 1
    assert counted("Degraded", "True") == 1
    world.delete("broken")
    world.client.wait(lambda: counted("Degraded", "True") == 0, "a resource that is gone is counted no more")


def tells_lines_of_json(process: OperatorProcess, world: World) -> None:
    lines = [json.loads(line) for line in process.log.read_text(encoding="utf-8").splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert not [line for line in lines if line["level"] == "error" or "traceback" in line]
    mine = [line for line in lines if line.get("resource") == f"{world.namespace}/chat"]
    assert any("apply Deployment chat" in line["message"] for line in mine)


def test_sigint_ends_it_as_sigterm_does(process: OperatorProcess, world: World) -> None:
    world.client.wait(lambda: process.metrics()["pagedserve_operator_leading", ()] == 1, "it leads")
    process.signal(signal.SIGINT)
    world.client.wait(lambda: not process.running, "it ended", seconds=ENDING_SECONDS)
    assert not world.child("Lease", LEASE_NAME)["spec"].get("holderIdentity")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagedserve_operator", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_bad_setting_ends_it_at_once_and_is_named() -> None:
    done = run("run", WORKERS="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pagedserve-operator: WORKERS must be a whole number, not 'many'\n"


@pytest.mark.parametrize("arguments", [(), ("walk",), ("run", "--fast"), ("size",)])
def test_what_is_asked_wrongly_is_answered_with_the_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: pagedserve-operator" in capsys.readouterr().err


def test_a_kubeconfig_that_is_not_there_is_named_with_its_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    assert main(["run"]) == 2
    # The client library warns in a line of its own.
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pagedserve-operator: KUBECONFIG: the kubeconfig {tmp_path / 'missing'} can't be used")


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A saved list of nodes; nothing is fetched from the hub."""
    monkeypatch.setenv("FETCH_MODEL_CONFIG", "false")
    listed = [
        node("n1", labels={**gfd("NVIDIA-L4", 23034), "topology.kubernetes.io/region": "eu-west"}, gpu=8),
        node("n2", labels=gfd("NVIDIA-A100-SXM4-40GB-MIG-3g.20gb", 19968), gpu=2),
    ]
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": listed}))
    return str(file)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.stem)
def test_a_sample_is_sized_without_a_cluster(file: Path, nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", str(file), "--nodes", nodes]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    for word in ("GPU", "numBlocks", "maxBatchTokens", "weights", "left over", "total"):
        assert word in told.out, word


def test_several_resources_of_one_file_are_all_sized(
    nodes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("\n---\n".join(sample.read_text(encoding="utf-8") for sample in SAMPLES))
    assert main(["size", str(file), "--nodes", nodes]) == 0
    assert capsys.readouterr().out.count("numBlocks") == len(SAMPLES)


RESOURCE = "apiVersion: pagedserve.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\nspec: "
BAD = {
    "no YAML": ("spec: [", "the file: is no YAML"),
    "no object": ("- a\n- b\n", "the file: must hold objects"),
    "nothing": ("", "kind: the file holds no InferenceService"),
    "another kind": ("kind: Pod\n", "kind: the file holds no InferenceService"),
    "no model": (f"{RESOURCE}{{}}", "spec.model.uri: is missing"),
    "a quoted number": (f"{RESOURCE}{{model: {{uri: a}}, replicas: '2'}}", "spec.replicas: must be a whole number"),
    "no GPU to be seen": (f"{RESOURCE}{{model: {{uri: a-8B}}}}", "spec.gpu.type"),
    "an unknown GPU": (f"{RESOURCE}{{model: {{uri: a-8B}}, gpu: {{type: H9000}}}}", "H9000"),
    "a model of unknown size": (
        f"{RESOURCE}{{model: {{uri: hf://a/b}}, gpu: {{type: L4}}}}",
        "spec.model.architecture",
    ),
    "a model that does not fit": (f"{RESOURCE}{{model: {{uri: hf://a/b-70B}}, gpu: {{type: T4}}}}", "GiB"),
    "a metadata that is text": ("kind: InferenceService\nmetadata: a\n", "metadata: must be an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_answered_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FETCH_MODEL_CONFIG", "false")
    text, word = BAD[name]
    (tmp_path / "bad.yaml").write_text(text)
    answered_in_one_line([str(tmp_path / "bad.yaml")], word, capsys)


def test_a_file_that_cannot_be_read_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00kind")
    answered_in_one_line([str(tmp_path / "missing.yaml")], "missing.yaml", capsys)
    answered_in_one_line([str(tmp_path)], str(tmp_path), capsys)
    answered_in_one_line([str(tmp_path / "binary")], "binary", capsys)
    answered_in_one_line([str(SAMPLES[0]), "--nodes", str(tmp_path / "missing.yaml")], "missing.yaml", capsys)
    (tmp_path / "odd.yaml").write_text("items: 5")
    answered_in_one_line([str(SAMPLES[0]), "--nodes", str(tmp_path / "odd.yaml")], "--nodes", capsys)
    (tmp_path / "odder.yaml").write_text("items: [{spec: 5}]")
    answered_in_one_line([str(SAMPLES[0]), "--nodes", str(tmp_path / "odder.yaml")], "--nodes", capsys)


def answered_in_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("pagedserve-operator: ")
    assert word in told.err
    assert told.err.count("\n") == 1
