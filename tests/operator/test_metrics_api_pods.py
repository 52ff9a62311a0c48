from __future__ import annotations

from typing import Any

import pytest

from metrics_world import engine_pod as pod
from pagedserve_operator.metrics_api.pods import ENGINES, live_engines
from pagedserve_operator.names import child_labels

JSON = dict[str, Any]


def test_a_ready_engine_counts() -> None:
    (found,) = live_engines([pod()])
    assert (found.namespace, found.name) == ("models", "chat-6d-x")
    assert (found.uid, found.address) == ("uid-chat-6d-x", "10.0.0.1")


@pytest.mark.parametrize(
    "other",
    [
        pod(metadata={"deletionTimestamp": "2026-06-01T12:00:00Z"}),
        pod(status={"conditions": [{"type": "Ready", "status": "False"}]}),
        pod(status={"conditions": []}),
        pod(status={"phase": "Pending"}),
        pod(status={"phase": "Failed"}),
        pod(status={"phase": "Succeeded"}),
        pod(status={"podIP": ""}),
        pod(status={"podIP": None}),
        pod(metadata={"ownerReferences": []}),
        pod(metadata={"ownerReferences": [{"kind": "ReplicaSet", "name": "other-6d", "controller": True}]}),
        pod(metadata={"ownerReferences": [{"kind": "Job", "name": "chat-6d", "controller": True}]}),
        pod(metadata={"ownerReferences": [{"kind": "ReplicaSet", "name": "chat-6d"}]}),
        pod(metadata={"labels": {}}),
        {},
        {"metadata": None, "status": "strange"},
    ],
    ids=[
        "it is being deleted",
        "it isn't ready",
        "its readiness isn't known",
        "it is pending",
        "it has failed",
        "it is done",
        "it has no address",
        "it has no address yet",
        "nobody made it",
        "another resource's ReplicaSet made it",
        "something else made it",
        "its owner doesn't control it",
        "it names no resource",
        "it is empty",
        "it is nonsense",
    ],
)
def test_a_pod_does_not_count_where(other: JSON) -> None:
    assert live_engines([other]) == ()


def test_engines_come_in_the_order_of_their_names() -> None:
    assert [engine.name for engine in live_engines([pod("b"), pod("a")])] == ["a", "b"]


def test_engines_are_selected_by_labels_that_every_child_has() -> None:
    wanted = dict(part.split("=") for part in ENGINES.split(","))
    assert wanted.items() <= child_labels("chat").items()
