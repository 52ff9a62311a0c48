from __future__ import annotations

from typing import Any

import pytest

from pagedserve_operator.keys import (
    Autoscalers,
    Nodes,
    key_of_resource,
    keys_of_autoscaler,
    keys_of_child,
    signature_of_node,
)
from pagedserve_operator.names import Key, Owner, child_labels
from tuning_cases import gfd, node

CHAT = Key("models", "chat")
REFERENCE = Owner(CHAT, "uid-1").reference()


def child(**metadata: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "models", "name": "chat", **metadata}}


def test_a_resource_is_its_own_key() -> None:
    assert key_of_resource(child()) == CHAT


CHILDREN: dict[str, tuple[dict[str, Any], set[Key]]] = {
    "owned and labelled": (child(ownerReferences=[REFERENCE], labels=child_labels("chat")), {CHAT}),
    "its reference removed by hand": (child(labels=child_labels("chat")), {CHAT}),
    "its labels removed by hand": (child(ownerReferences=[REFERENCE]), {CHAT}),
    "labelled for another": (
        child(ownerReferences=[REFERENCE], labels=child_labels("other")),
        {CHAT, Key("models", "other")},
    ),
    "a pod that a ReplicaSet owns": (
        child(ownerReferences=[{"apiVersion": "apps/v1", "kind": "ReplicaSet"}], labels=child_labels("chat")),
        {CHAT},
    ),
    "owned by a kind of the same name in another group": (
        child(ownerReferences=[{**REFERENCE, "apiVersion": "serving.kserve.io/v1beta1"}]),
        set(),
    ),
    "somebody else's with our instance label": (child(labels={"app.kubernetes.io/instance": "chat"}), set()),
    "ours without an instance": (child(labels={"app.kubernetes.io/managed-by": "pagedserve-operator"}), set()),
    "with null for references and labels": (child(ownerReferences=None, labels=None), set()),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_wakes_whom_it_may_belong_to(name: str) -> None:
    body, keys = CHILDREN[name]
    assert keys_of_child(body) == keys


AUTOSCALERS: dict[str, tuple[dict[str, Any], set[Key]]] = {
    "somebody else's on our Deployment": (
        {**child(), "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "chat"}}},
        {CHAT},
    ),
    "on another kind": ({**child(), "spec": {"scaleTargetRef": {"kind": "StatefulSet", "name": "chat"}}}, set()),
    "ours, turned to another target by hand": (
        {**child(labels=child_labels("chat")), "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "other"}}},
        {CHAT, Key("models", "other")},
    ),
    "without a spec": (child(), set()),
}


@pytest.mark.parametrize("name", AUTOSCALERS)
def test_an_autoscaler_wakes_also_the_resource_whose_deployment_it_scales(name: str) -> None:
    body, keys = AUTOSCALERS[name]
    assert keys_of_autoscaler(body) == keys


def test_a_heartbeat_leaves_a_nodes_signature_as_it_is() -> None:
    before = node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=2)
    after = node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=2)
    after["metadata"]["resourceVersion"] = "2"
    after["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:00:00Z"
    assert signature_of_node(before) == signature_of_node(after)


@pytest.mark.parametrize(
    "changed",
    [
        node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=3),
        node("n1", labels=gfd("NVIDIA-L40S", 46068), gpu=2),
        node("n1", labels=gfd("NVIDIA-L4", 23034)),
        {**node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=2), "spec": {"unschedulable": True}},
    ],
    ids=["more GPUs", "another product", "no GPU", "cordoned"],
)
def test_other_gpus_change_a_nodes_signature(changed: dict[str, Any]) -> None:
    assert signature_of_node(changed) != signature_of_node(node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=2))


def scaler(name: str, target: str) -> dict[str, Any]:
    reference = {"kind": "Deployment", "name": target}
    return {"metadata": {"namespace": "models", "name": name}, "spec": {"scaleTargetRef": reference}}


def test_an_autoscaler_is_worth_reading_for_whose_deployment_it_scales() -> None:
    autoscalers, chat = Autoscalers(), Key("models", "chat")
    assert autoscalers.near(chat) == {"chat"}
    autoscalers.saw(scaler("strange", "chat"), False)
    autoscalers.saw(scaler("other", "embed"), False)
    assert autoscalers.near(chat) == {"chat", "strange"}
    autoscalers.saw(scaler("strange", "chat"), True)
    assert autoscalers.near(chat) == {"chat"}


def test_an_autoscaler_that_never_was_can_go() -> None:
    autoscalers = Autoscalers()
    autoscalers.saw(scaler("strange", "chat"), True)
    assert autoscalers.near(Key("models", "chat")) == {"chat"}


def measured(scaled: dict[str, Any], percent: int) -> dict[str, Any]:
    """The autoscaler after one of its rounds."""
    metadata = {
        **scaled["metadata"],
        "resourceVersion": str(percent),
        "managedFields": [{"manager": "controller", "subresource": "status", "time": f"{percent}"}],
    }
    conditions = [{"type": "ScalingActive", "status": "True", "reason": "ValidMetricFound"}]
    metrics = [{"containerResource": {"current": {"averageUtilization": percent}}}]
    return {**scaled, "metadata": metadata, "status": {"currentMetrics": metrics, "conditions": conditions}}


def test_what_an_autoscaler_measures_wakes_nobody_and_what_it_concludes_does() -> None:
    autoscalers, first = Autoscalers(), measured(scaler("strange", "chat"), 50)
    assert autoscalers.saw(first, False)
    assert not autoscalers.saw(measured(scaler("strange", "chat"), 60), False)
    failing = measured(scaler("strange", "chat"), 61)
    failing["status"]["conditions"][0]["status"] = "False"
    assert autoscalers.saw(failing, False)
    assert autoscalers.saw(measured(scaler("strange", "embed"), 62), False)
    edited = measured(scaler("strange", "embed"), 63)
    edited["metadata"]["labels"] = {"team": "a"}
    assert autoscalers.saw(edited, False)
    edited["metadata"]["managedFields"].append({"manager": "kubectl", "time": "64"})
    assert autoscalers.saw(edited, False)
    assert autoscalers.saw(edited, True)
    assert autoscalers.saw(edited, False)


def test_only_nodes_whose_gpus_change_are_told_and_those_that_went_are_forgotten() -> None:
    nodes, one = Nodes(), node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=2)
    assert nodes.saw(one, deleted=False)
    assert not nodes.saw(one, deleted=False)
    assert nodes.saw(node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=3), deleted=False)
    assert nodes.saw(one, deleted=True)
    assert not nodes.saw(one, deleted=True)
    assert not len(nodes)
