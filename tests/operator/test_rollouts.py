"""New pods replace old ones where every GPU is taken, where one is free, and where nothing may roll at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from control_client import JSON
from control_cluster import Cluster
from fake_nodes import GONE_AFTER, READY_AFTER, FakeNodes
from operator_world import World, condition_of, install_crd, settle
from operators import QUICK, OperatorThread

LOADING: JSON = {"annotations": {READY_AFTER: "700ms", GONE_AFTER: "500ms"}}
LOOKED_AT_SOON = QUICK.derive(secret_resync_seconds=0.5)


@pytest.fixture(scope="module")
def operator(control_plane: Cluster) -> Iterator[OperatorThread]:
    install_crd(control_plane)
    with OperatorThread(control_plane.kubeconfig, LOOKED_AT_SOON) as thread:
        yield thread


@pytest.fixture
def world(control_plane: Cluster, namespace: str, operator: OperatorThread) -> World:
    return World(control_plane.client(), namespace)


class Nodes:
    """Nodes of one test alone: what an earlier test has left behind may still look for a GPU."""

    def __init__(self, fakes: FakeNodes, pool: str) -> None:
        self._fakes = fakes
        self._labels = {"pool": pool}
        self._count = 0
        self.l4: JSON = {"type": "NVIDIA-L4", "nodeSelector": self._labels}
        self.cpu: JSON = {"type": "cpu", "nodeSelector": self._labels}

    def add(self, *, gpus: int = 0, cpu: str = "192") -> None:
        self._count += 1
        self._fakes.add_gpu_node(f"{self._labels['pool']}-{self._count}", gpus=gpus, cpu=cpu, labels=self._labels)


@pytest.fixture
def nodes(fake_nodes: FakeNodes, world: World) -> Iterator[Nodes]:
    yield Nodes(fake_nodes, world.namespace)
    # Pods that lose their node would wait for another one, and a pod that waits may take any GPU of the next test.
    world.delete_all()


def test_a_rollout_where_every_gpu_is_taken_completes_one_by_one(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=3)
    world.create("chat", gpu=nodes.l4, replicas=3, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) >= 2
    assert max(pods for _, pods in seen) <= 3
    assert world.events("chat").count("RolloutStarted") == world.events("chat").count("RolloutFinished") == 1


def test_a_rollout_surges_where_a_gpu_is_free(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=4)
    world.create("chat", gpu=nodes.l4, replicas=3, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) >= 3
    assert max(pods for _, pods in seen) == 4


def test_gpus_that_are_free_on_different_nodes_are_no_room_for_one_pod(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=3)
    nodes.add(gpus=3)
    world.create("chat", gpu={**nodes.l4, "count": 2}, replicas=2, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert max(pods for _, pods in seen) <= 2
    assert min(ready for ready, _ in seen) >= 1


def test_a_blocked_rollout_is_told_and_its_cure_helps(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=1)
    world.create("chat", gpu=nodes.l4, replicas=1, rollout={"strategy": "Surge"}, podTemplate=LOADING)
    world.wait_rolled("chat")
    world.edit("chat", limits={"maxQueue": 5})
    told = world.wait("chat", "Progressing", "False", reason="RolloutBlocked")
    assert "GPU" in condition_of(told, "Progressing")["message"]
    assert condition_of(told, "Ready")["status"] == "True"
    assert condition_of(told, "Degraded")["reason"] == "RolloutBlocked"
    world.edit("chat", rollout={"strategy": "Auto"})
    world.wait_rolled("chat")


def test_a_surge_that_finds_a_gpu_and_nothing_else_goes_on_in_place(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=4, cpu="10")
    world.create("chat", gpu=nodes.l4, replicas=2, resources={"requests": {"cpu": "4"}}, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) >= 1


def test_engines_on_cpus_go_on_in_place_where_there_is_no_room(world: World, nodes: Nodes) -> None:
    nodes.add(cpu="10")
    world.create("chat", gpu=nodes.cpu, replicas=2, resources={"requests": {"cpu": "4"}}, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) >= 1


def test_recreate_ends_all_pods_first(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=8)
    world.create("chat", gpu=nodes.l4, replicas=2, rollout={"strategy": "Recreate"}, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) == 0
    assert max(pods for _, pods in seen) <= 2


def test_engines_on_cpus_surge(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.create("chat", replicas=2, podTemplate=LOADING)
    world.wait_rolled("chat")
    seen = roll(world, "chat", limits={"maxQueue": 5})
    assert min(ready for ready, _ in seen) >= 2
    assert max(pods for _, pods in seen) == 3


def test_strategies_follow_the_spec_both_ways(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=8)
    world.create("chat", gpu=nodes.l4, replicas=1)
    world.wait_rolled("chat")
    for strategy, kind in (("Recreate", "Recreate"), ("Surge", "RollingUpdate"), ("Recreate", "Recreate")):
        world.edit("chat", rollout={"strategy": strategy})
        world.wait_child("Deployment", "chat", lambda child, kind=kind: child["spec"]["strategy"]["type"] == kind, kind)
    world.wait_rolled("chat")
    assert len(world.replicasets("chat")) == 1


def test_one_replica_without_room_is_told_to_leave_a_gap(world: World, nodes: Nodes) -> None:
    nodes.add(gpus=1)
    world.create("chat", gpu=nodes.l4, replicas=1, podTemplate=LOADING)
    world.wait_rolled("chat")
    world.edit("chat", limits={"maxQueue": 5})
    world.wait_rolled("chat")
    assert "RolloutGap" in world.events("chat")


def test_labels_of_the_resource_reach_no_selector_and_roll_nothing(
    control_plane: Cluster, world: World, operator: OperatorThread, nodes: Nodes
) -> None:
    nodes.add()
    world.create("chat")
    world.wait_rolled("chat")
    before = world.child("Deployment", "chat")
    for colour in ("blue", "green", None):
        labels = {"colour": colour, "app.kubernetes.io/instance": colour, "app.kubernetes.io/name": colour}
        world.client.patch(world.get("chat"), {"metadata": {"labels": labels, "annotations": {"colour": colour}}})
        settle(operator, control_plane, world)
    after = world.child("Deployment", "chat")
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    world.wait_rolled("chat")


def test_a_changed_hub_token_rolls_the_pods(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.secret("hub", token="one")
    world.create("chat", auth={"hfTokenSecretRef": {"name": "hub"}})
    expect_a_roll(world, "chat", lambda: world.secret("hub", token="two"))


def test_a_changed_secret_of_the_environment_rolls_the_pods(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.secret("other", password="one")
    reference = {"secretKeyRef": {"name": "other", "key": "password"}}
    world.create("chat", env=[{"name": "PASSWORD", "valueFrom": reference}])
    expect_a_roll(world, "chat", lambda: world.secret("other", password="two"))


def test_changed_api_keys_roll_nothing(
    control_plane: Cluster, world: World, operator: OperatorThread, nodes: Nodes
) -> None:
    nodes.add()
    world.secret("keys", **{"api-keys": "one"})
    world.create("chat", auth={"apiKeysSecretRef": {"name": "keys"}})
    world.wait_rolled("chat")
    pods = uids(world, "chat")
    world.secret("keys", **{"api-keys": "two"})
    settle(operator, control_plane, world)
    assert uids(world, "chat") == pods
    assert len(world.replicasets("chat")) == 1


def test_a_secret_that_is_missing_is_named_and_its_creation_heals(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.create("chat", auth={"hfTokenSecretRef": {"name": "hub"}})
    told = world.wait("chat", "Degraded", reason="SecretNotFound")
    message = condition_of(told, "Degraded")["message"]
    assert "spec.auth.hfTokenSecretRef" in message
    assert "'hub'" in message
    assert world.find("Deployment", "chat") is None
    world.secret("hub", wrong="key")
    world.client.wait(
        lambda: "has no key 'token'" in condition_of(world.get("chat"), "Degraded")["message"], "the key is named"
    )
    world.secret("hub", token="right")
    world.wait_rolled("chat")


def test_a_secret_that_goes_missing_later_stops_nothing_that_runs(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.secret("hub", token="one")
    world.create("chat", auth={"hfTokenSecretRef": {"name": "hub"}})
    world.wait_rolled("chat")
    pods = uids(world, "chat")
    world.client.delete("v1", "Secret", "hub", namespace=world.namespace)
    told = world.wait("chat", "Degraded", reason="SecretNotFound")
    assert condition_of(told, "Ready")["status"] == "True"
    world.secret("hub", token="one")
    world.wait_rolled("chat")
    assert uids(world, "chat") == pods


def test_each_argument_of_the_engine_rolls_out(world: World, nodes: Nodes) -> None:
    nodes.add()
    world.create("chat")
    world.wait_rolled("chat")
    world.edit("chat", model={"maxModelLen": 1024, "servedName": "other"}, limits={"maxNumSeqs": 7})
    world.wait_rolled("chat")
    environment = {row["name"]: row.get("value") for row in engine(world, "chat")["env"]}
    wanted = {"MAX_MODEL_LEN": "1024", "SERVED_MODEL_NAME": "other", "MAX_NUM_SEQS": "7"}
    assert {name: environment.get(name) for name in wanted} == wanted


def roll(world: World, name: str, **spec: Any) -> list[tuple[int, int]]:
    """Change the spec, and return (ready pods, pods that aren't being deleted) at every change of a pod meanwhile."""
    begin = {pod["metadata"]["uid"]: pod for pod in world.pods(name)}
    old = {uid: pod for uid, pod in begin.items() if not leaving(pod)}
    version = world.client.request("GET", world.client.path("v1", "Pod", namespace=world.namespace))["metadata"]
    world.edit(name, **spec)
    world.wait_rolled(name)
    world.client.wait(lambda: not set(old) & uids(world, name), "no old pod is left")
    seen, now = [], dict(old)
    for pod in world.pods_since(version["resourceVersion"], name):
        now[pod["metadata"]["uid"]] = pod
        alive = [pod for pod in now.values() if not leaving(pod)]
        seen.append((sum(is_ready(pod) for pod in alive), len(alive)))
    assert seen
    return seen


def expect_a_roll(world: World, name: str, act: Callable[[], object]) -> None:
    world.wait_rolled(name)
    before = uids(world, name)
    act()
    world.client.wait(lambda: not before & uids(world, name), "new pods have replaced the old ones")
    world.wait_rolled(name)


def engine(world: World, name: str) -> JSON:
    container: JSON = world.child("Deployment", name)["spec"]["template"]["spec"]["containers"][0]
    return container


def uids(world: World, name: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in world.pods(name)}


def leaving(pod: JSON) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def is_ready(pod: JSON) -> bool:
    return condition_of(pod, "Ready").get("status") == "True"
