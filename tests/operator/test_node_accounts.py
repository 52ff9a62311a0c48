"""A pod on the node stand-in has its service account: the API server's own token, where clients look for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from control_cluster import Cluster
from loopback import claimed_subnet
from missing import skip_without
from node_stand_in import NodeStandIn, why_not
from node_volumes import ACCOUNT_PATH, account_place, why_no_account

JSON = dict[str, Any]

WHO = """
import asyncio, json, os
from kubernetes.aio import client, config
async def main():
    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        review = client.V1SelfSubjectReview()
        answer = await client.AuthenticationV1Api(api).create_self_subject_review(review)
    place = os.environ["PLACE"]
    print(json.dumps([answer.status.user_info.username, answer.status.user_info.extra, open(place).read()]), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def node(control_plane: Cluster, namespace: str, tmp_path: Path) -> Iterator[NodeStandIn]:
    if reason := why_not() or why_no_account():
        skip_without(reason)
    script = tmp_path / "who.py"
    script.write_text(WHO)
    images = {"who:test": [sys.executable, str(script)]}
    with (
        claimed_subnet() as subnet,
        NodeStandIn(control_plane.client(), f"node-{namespace}", images=images, subnet=subnet, logs=tmp_path) as node,
    ):
        yield node


@pytest.fixture
def run(control_plane: Cluster, namespace: str, node: NodeStandIn) -> Callable[..., JSON]:
    """Create the pod ``who`` on the node."""

    def create(**spec: Any) -> JSON:
        env = [{"name": "PLACE", "value": f"{ACCOUNT_PATH}/namespace"}]
        container = {"name": "who", "image": "who:test", "env": env}
        metadata = {"name": "who", "namespace": namespace}
        whole = {"nodeName": node.name, "containers": [container], **spec}
        return control_plane.client().create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": whole})

    return create


def log_of(node: NodeStandIn) -> str:
    """What the container wrote, once the node has seen the pod."""
    try:
        return node.log("who", "who")
    except LookupError:
        return ""


def told(control_plane: Cluster, node: NodeStandIn) -> list[Any]:
    found: list[Any] = control_plane.client().wait(
        lambda: [json.loads(line) for line in log_of(node).splitlines() if line.startswith("[")],
        "the container says who it is",
    )
    return found


def test_a_container_speaks_as_its_account_and_its_token_is_bound_to_the_pod(
    control_plane: Cluster, namespace: str, node: NodeStandIn, run: Callable[..., JSON]
) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "robot", "namespace": namespace}}
    control_plane.client().create(account)
    pod = run(serviceAccountName="robot")
    ((user, extra, place),) = told(control_plane, node)
    assert user == f"system:serviceaccount:{namespace}:robot"
    assert extra["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]
    assert place == namespace
    assert not Path(ACCOUNT_PATH, "token").exists(), "another process sees it, too"


def test_a_container_that_wants_no_account_has_none(
    control_plane: Cluster, node: NodeStandIn, run: Callable[..., JSON]
) -> None:
    run(automountServiceAccountToken=False)
    client = control_plane.client()
    client.wait(lambda: "ConfigException" in log_of(node), "the container finds no account")


def test_logs_of_pods_that_are_gone_are_kept(
    control_plane: Cluster, namespace: str, node: NodeStandIn, run: Callable[..., JSON], tmp_path: Path
) -> None:
    run()
    told(control_plane, node)
    client = control_plane.client()
    client.delete("v1", "Pod", "who", namespace=namespace, grace_seconds=0)
    client.wait(lambda: list(tmp_path.glob(f"{namespace}_who_*_who.log")), "the log is kept")


def test_a_node_that_is_lost_says_nothing_any_more(
    control_plane: Cluster, namespace: str, node: NodeStandIn, run: Callable[..., JSON]
) -> None:
    run()
    told(control_plane, node)
    (pid,) = node.pids("who").values()
    node.lose()
    assert not Path(f"/proc/{pid}").exists()
    client = control_plane.client()
    assert client.get("v1", "Pod", "who", namespace=namespace)["status"]["phase"] == "Running"
    client.delete("v1", "Pod", "who", namespace=namespace)
    assert client.find("v1", "Pod", "who", namespace=namespace) is not None, "nobody is there to end it"


def test_the_folders_that_were_made_for_accounts_go_with_the_last_who_needs_them(tmp_path: Path) -> None:
    place = tmp_path / "secrets" / "account"
    with account_place(place):
        assert place.is_dir()
    assert not place.parent.exists()
    with account_place(place), ExitStack() as others:
        others.enter_context(account_place(place))
        others.close()
        assert place.is_dir(), "the first still needs it"
    assert not place.parent.exists()
    with ExitStack() as others:
        with account_place(place):
            others.enter_context(account_place(place))
        assert place.is_dir(), "the second still needs it"


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    with account_place(tmp_path):
        pass
    assert tmp_path.is_dir()
