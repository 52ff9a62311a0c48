"""What the kind provider leaves behind, whoever breaks it off: nothing of its own, and everything of others."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from e2e.interrupts import end_in_order_on_sigterm, uninterrupted
from e2e.providers import kind as provider
from e2e.providers.kind import SPARE, Kind, run, why_no_daemon
from e2e.providers.kind_plan import GPUS, BadVariable, KindPlan, Step
from e2e.providers.provider import Unavailable, find_kubectl

from control_cluster import Cluster, Unsupported
from fake_kind import FakeKind

MINE = "mine"


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKind:
    fake = FakeKind(tmp_path / "programs")
    monkeypatch.setenv("PATH", str(fake.folder), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return fake


def start() -> None:
    with Kind(KindPlan(cluster=MINE)):
        raise AssertionError("it started")


def test_a_client_without_its_daemon_is_no_daemon(kind: FakeKind) -> None:
    assert why_no_daemon() == ""
    kind.tell("docker", "version", "echo Cannot connect >&2; exit 1")
    assert why_no_daemon() == "no Docker daemon answers (Cannot connect)"


def test_ctrl_c_in_a_start_deletes_the_cluster_and_a_second_one_does_not_stop_that(kind: FakeKind) -> None:
    kind.tell("kind", "create", f"echo {MINE} >> clusters; kill -INT $PPID; exec sleep 60")
    kind.tell("kind", "delete", "kill -INT $PPID; kill -TERM $PPID; kill -INT $$")
    with pytest.raises(KeyboardInterrupt):
        start()
    assert kind.clusters == []
    assert not list(kind.folder.parent.glob("pagedserve-kind-*"))


def test_a_start_that_fails_deletes_the_cluster(kind: FakeKind) -> None:
    kind.tell("kind", "load", "echo no such image >&2; exit 1")
    with pytest.raises(Unavailable, match="load images into the nodes: `kind load docker-image` failed: no such image"):
        start()
    assert kind.clusters == []


def test_somebodys_cluster_of_that_name_stays(kind: FakeKind) -> None:
    kind.add(MINE)
    with pytest.raises(Unavailable, match="a kind cluster mine already: give this one another name by KIND_CLUSTER"):
        start()
    assert kind.clusters == [MINE]
    assert "delete" not in " ".join(kind.calls)


def test_a_machine_without_kubectl_gets_one_before_the_cluster_starts(
    kind: FakeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(kind.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(kind.folder))
    built = kind.folder / "go"
    built.write_text("#!/bin/sh\n[ $1 != env ] && { echo no space left >&2; exit 1; }; echo go9.9.9\n")
    built.chmod(0o755)
    with pytest.raises(Unavailable, match="no kubectl on the PATH, and none can be built"):
        start()
    assert not [call for call in kind.calls if "create" in call]
    (kind.folder / "kubectl").touch(mode=0o755)
    assert find_kubectl() == kind.folder / "kubectl"


def test_a_cluster_that_was_not_begun_is_not_deleted(kind: FakeKind) -> None:
    kind.tell("docker", "image", "echo No such image >&2; exit 1")
    with pytest.raises(Unavailable, match="`make images VARIANT=cpu` builds it"):
        start()
    assert kind.calls[-1].startswith("docker image inspect")


@pytest.fixture
def cluster(kind: FakeKind, control_plane: Cluster) -> Cluster:
    """What the provider finds behind the kubeconfig that it gets."""
    if not control_plane.started_here:
        pytest.skip("the provider changes the nodes of its cluster")
    shutil.copy(control_plane.kubeconfig, kind.folder / "admin.kubeconfig")
    return control_plane


def test_a_spare_node_is_lent_and_taken_back(kind: FakeKind, cluster: Cluster) -> None:
    client = cluster.client()
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "spare", "labels": {SPARE: "true"}}}
    client.create(node)
    client.patch(node, {"status": {"capacity": {"cpu": "1"}}}, subresource="status")
    try:
        with Kind(KindPlan(cluster=MINE)) as started:
            with started.node(labels={"pool": "a"}, gpus=2) as name:
                lent = client.get("v1", "Node", name)
                assert (lent["metadata"]["labels"], lent["status"]["capacity"][GPUS]) == ({"pool": "a"}, "2")
                with pytest.raises(Unsupported, match="no spare node left"):
                    started.add_node(labels={})
            back = client.get("v1", "Node", name)
            assert (back["metadata"]["labels"], back["status"]["capacity"][GPUS]) == ({SPARE: "true"}, "0")
            with started.node(labels={}):
                client.delete("v1", "Node", name)
    finally:
        client.delete("v1", "Node", "spare")


def test_light_engines_are_built_and_loaded_once(kind: FakeKind, cluster: Cluster) -> None:
    with Kind(KindPlan(cluster=MINE)) as started:
        assert started.light() == started.light()
        assert started.light()["image"] == {"repository": "pagedserve/engine", "tag": "light"}
    assert len([call for call in kind.calls if "docker build" in call]) == 1
    assert len([call for call in kind.calls if "load" in call and "engine:light" in call]) == 1


def test_only_a_cluster_that_is_left_in_good_order_is_kept(kind: FakeKind, cluster: Cluster) -> None:
    folder = kind.folder.parent / "kept"
    with pytest.raises(ZeroDivisionError), Kind(KindPlan(cluster=MINE), keep=True, folder=folder):
        raise ZeroDivisionError
    assert kind.clusters == []
    assert not folder.exists()
    with Kind(KindPlan(cluster=MINE), keep=True, folder=folder) as started:
        assert started.cluster.kubectl("get", "namespaces").stdout
    assert kind.clusters == [MINE]
    assert (folder / "kubeconfig").exists()


def test_a_variable_that_cannot_be_read_ends_the_start_before_anything_is_there(kind: FakeKind) -> None:
    with pytest.raises(BadVariable):
        Kind(KindPlan(cluster=MINE, kubelet_config="[1]")).__enter__()
    assert [call.split()[:2] for call in kind.calls] == [["docker", "version"]]
    assert not list(kind.folder.parent.glob("pagedserve-kind-*"))


def test_a_command_that_takes_too_long_is_named(kind: FakeKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_SECONDS", 0.05)
    kind.tell("docker", "kill", "exec sleep 60")
    with pytest.raises(Unavailable, match="cut the power: `docker kill node` takes longer"):
        run(Step("cut the power", ("docker", "kill", "node")))


def test_sigterm_ends_in_order() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_in_order_on_sigterm()
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
