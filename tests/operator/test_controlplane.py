"""What the operator's tests rely on: a control plane that is real, refuses, remembers, and keeps a record."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from control_client import ApiError
from control_cluster import Cluster, Unsupported
from control_processes import Program, ProgramFailed
from controlplane import ControlPlane, NoControlPlane, find_control_plane


def test_it_serves_the_release_that_was_built(control_plane: Cluster) -> None:
    version = control_plane.client().request("GET", "/version")
    assert (version["major"], int(version["minor"]) >= 30) == ("1", True)
    assert f"Server Version: {version['gitVersion']}" in control_plane.kubectl("version").stdout


def test_a_user_may_do_what_rbac_allows_and_nothing_else(control_plane: Cluster, namespace: str) -> None:
    user = f"system:serviceaccount:{namespace}:reader"
    reader = control_plane.client(control_plane.kubeconfig_for(user))
    with pytest.raises(ApiError, match=f'User "{user}" cannot list resource "configmaps"'):
        reader.list("v1", "ConfigMap", namespace=namespace)
    control_plane.kubectl("-n", namespace, "create", "role", "reader", "--verb=list", "--resource=configmaps")
    group = f"--group=system:serviceaccounts:{namespace}"
    control_plane.kubectl("-n", namespace, "create", "rolebinding", "reader", "--role=reader", group)
    reader.wait(lambda: reader.list("v1", "ConfigMap", namespace=namespace), "the reader may list")
    with pytest.raises(ApiError, match="forbidden"):
        reader.list("v1", "Secret", namespace=namespace)


def test_an_unknown_token_is_nobodys(control_plane: Cluster, tmp_path: Path) -> None:
    forged = tmp_path / "kubeconfig"
    forged.write_text(control_plane.kubeconfig.read_text().replace(str(control_plane.token), "forged"))
    with pytest.raises(ApiError, match="Unauthorized"):
        control_plane.client(forged).list("v1", "Namespace")


def test_a_service_account_token_of_the_server_is_accepted(control_plane: Cluster, namespace: str) -> None:
    token = control_plane.kubectl("-n", namespace, "create", "token", "default").stdout.strip()
    who = control_plane.kubectl("auth", "whoami", "-o=jsonpath={.status.userInfo.username}", f"--token={token}")
    assert who.stdout == f"system:serviceaccount:{namespace}:default"


def test_the_audit_log_names_each_write_and_who_asked(control_plane: Cluster, namespace: str) -> None:
    client = control_plane.client(user_agent="audited/1")
    client.create(_config_map("before", namespace))
    mark = control_plane.audit.mark()
    client.create(_config_map("a", namespace))
    client.apply(_config_map("a", namespace, colour="blue"))
    client.get("v1", "ConfigMap", "a", namespace=namespace)
    with pytest.raises(ApiError):
        client.create(_config_map("a", namespace))
    entries = [entry for entry in control_plane.audit.since(mark) if entry.user_agent == "audited/1"]
    told = [(entry.verb, entry.resource, entry.name, entry.code, entry.is_write) for entry in entries]
    assert told == [
        ("create", "configmaps", "a", 201, True),
        ("patch", "configmaps", "a", 200, True),
        ("get", "configmaps", "a", 200, False),
        ("create", "configmaps", "a", 409, True),
    ]
    assert {(entry.user, entry.namespace) for entry in entries} == {("admin", namespace)}


def test_the_audit_log_leaves_out_the_control_planes_own_writes(control_plane: Cluster, namespace: str) -> None:
    mark = control_plane.audit.mark()
    control_plane.client().create(_deployment("quiet", namespace, replicas=1))
    _wait_for_pods(control_plane, namespace, 1)
    assert [(entry.verb, entry.resource) for entry in control_plane.audit.writes(mark)] == [("create", "deployments")]


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
def test_a_restarted_api_server_keeps_its_data_and_its_address(
    control_plane: Cluster, namespace: str, kill: bool
) -> None:
    client, url = control_plane.client(), control_plane.url
    made = client.create(_config_map("kept", namespace))
    control_plane.stop_apiserver(kill=kill)
    with pytest.raises(OSError, match="refused"):
        client.get("v1", "ConfigMap", "kept", namespace=namespace)
    control_plane.start_apiserver()
    assert client.get("v1", "ConfigMap", "kept", namespace=namespace) == made
    assert control_plane.url == url
    # The controllers find it again, too.
    client.create(_deployment("after", namespace, replicas=1))
    _wait_for_pods(control_plane, namespace, 1)


def test_a_paused_api_server_answers_once_it_is_resumed(control_plane: Cluster, namespace: str) -> None:
    control_plane.pause_apiserver()
    get = [sys.executable, "-c", "import socket,sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).close()"]
    try:
        # The kernel takes connections all the same: this is a hang, not a refusal.
        subprocess.run([*get, control_plane.url.rpartition(":")[2]], check=True)
        assert _state_of(control_plane) == psutil.STATUS_STOPPED
    finally:
        control_plane.resume_apiserver()
    assert control_plane.client().get("v1", "Namespace", namespace)["status"]["phase"] == "Active"


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_deletion_takes_along_what_names_its_owner(control_plane: Cluster, namespace: str, propagation: str) -> None:
    client = control_plane.client()
    owner = client.create(_deployment("owner", namespace, replicas=2))
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "owner", "uid": owner["metadata"]["uid"]}
    owned = _config_map("owned", namespace)
    owned["metadata"]["ownerReferences"] = [{**reference, "blockOwnerDeletion": True}]
    client.create(owned)
    client.create(_config_map("free", namespace))
    _wait_for_pods(control_plane, namespace, 2)
    client.delete("apps/v1", "Deployment", "owner", namespace=namespace, propagation=propagation)
    for kind, version in (("Deployment", "apps/v1"), ("ReplicaSet", "apps/v1"), ("Pod", "v1")):
        client.wait(lambda k=kind, v=version: not client.list(v, k, namespace=namespace), f"no {kind} is left")
    client.wait_gone("v1", "ConfigMap", "owned", namespace=namespace)
    assert client.get("v1", "ConfigMap", "free", namespace=namespace)


def test_the_autoscaler_acts(control_plane: Cluster, namespace: str) -> None:
    client = control_plane.client()
    client.create(_deployment("scaled", namespace, replicas=1))
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "scaled"}
    spec = {"scaleTargetRef": target, "minReplicas": 3, "maxReplicas": 5}
    scaler = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "spec": spec}
    client.create({**scaler, "metadata": {"name": "scaled", "namespace": namespace}})
    _wait_for_pods(control_plane, namespace, 3)


def test_a_program_that_ends_early_is_explained_by_its_log(tmp_path: Path) -> None:
    program = Program("broken", ["/bin/sh", "-c", "echo cannot find my shoes >&2; exit 3"], folder=tmp_path)
    program.start()
    with pytest.raises(ProgramFailed, match=r"broken ended while it started.*\n.*cannot find my shoes"):
        program.await_ready(lambda: False)
    program.stop()


def test_programs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    script = (
        f"import sys, os, pathlib; sys.path.insert(0, {str(support)!r})\n"
        "from control_processes import Program\n"
        "program = Program('sleeper', ['sleep', '1000'], folder=pathlib.Path(sys.argv[1]))\n"
        "program.start(); print(program.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True).stdout
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(told)).wait(60)
    assert not psutil.pid_exists(int(told))


def test_a_given_cluster_is_preferred_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    given = find_control_plane({"KUBECONFIG": str(tmp_path / "mine"), "KUBEBUILDER_ASSETS": str(tmp_path)})
    assert not given.started_here
    with pytest.raises(Unsupported, match=r"mine offers no stop of its API server: leave KUBECONFIG unset"):
        given.restart_apiserver()
    with pytest.raises(Unsupported, match="audit log"):
        given.audit.mark()


def test_complete_assets_are_preferred_to_the_built_programs(tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"):
        (tmp_path / name).touch()
    chosen = find_control_plane({"KUBEBUILDER_ASSETS": str(tmp_path)})
    assert isinstance(chosen, ControlPlane)
    assert chosen.program_folder == tmp_path


def test_without_any_control_plane_the_cure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NoControlPlane, match=r"run `python e2e/controlplane/build\.py`"):
        find_control_plane({})


def _config_map(name: str, namespace: str, **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _deployment(name: str, namespace: str, *, replicas: int) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"containers": [{"name": "engine", "image": "engine"}], "nodeSelector": {"nowhere": ""}}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def _wait_for_pods(control_plane: Cluster, namespace: str, count: int) -> None:
    client = control_plane.client()
    client.wait(lambda: len(client.list("v1", "Pod", namespace=namespace)) == count, f"{count} pods are there")


def _state_of(control_plane: Cluster) -> str:
    assert isinstance(control_plane, ControlPlane)
    status: str = psutil.Process(control_plane.programs["kube-apiserver"].pid).status()
    return status
