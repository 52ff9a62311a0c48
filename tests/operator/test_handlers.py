from __future__ import annotations

import asyncio
from typing import Any

import kopf
import pytest

from pagedserve_operator import handlers
from pagedserve_operator.kinds import AUTOSCALER, CHILDREN, KEDA_AUTOSCALER, KINDS
from pagedserve_operator.names import KIND, Key, child_labels

CHAT = Key("models", "chat")


class Heard:
    """Handlers as registered, and what they said."""

    def __init__(self, *, nodes: bool = True) -> None:
        self.registry, self.settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
        self.woken: list[set[Key]] = []
        self.nodes: list[tuple[str, bool]] = []
        self.scalers: list[tuple[str, bool]] = []
        handlers.register(
            self.registry,
            self.settings,
            wake=lambda keys: self.woken.append(set(keys)),
            autoscaler_changed=lambda scaler, deleted: self.scalers.append((scaler["metadata"]["name"], deleted)),
            node_changed=self._node_changed if nodes else None,
        )

    @property
    def kinds(self) -> set[str]:
        plurals = {kind.plural: kind.name for kind in KINDS.values()}
        return {plurals[str(handler.selector.any_name or handler.selector.plural)] for handler in self._handlers()}

    def tell(self, kind: str, body: dict[str, Any], event: str = "MODIFIED") -> None:
        (found,) = [handler for handler in self._handlers() if handler.id == f"look-{KINDS[kind].plural}"]
        asyncio.run(found.fn(event={"type": event, "object": body}))

    def _handlers(self) -> list[Any]:
        return list(self.registry._watching._handlers)

    def _node_changed(self, body: Any, deleted: bool) -> None:
        self.nodes.append((body["metadata"]["name"], deleted))


def body(**metadata: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "models", "name": "chat", **metadata}}


def test_everything_that_a_verdict_depends_on_is_watched() -> None:
    assert Heard().kinds == {KIND, *CHILDREN, "Pod", "Node"}


def test_without_leave_to_read_nodes_none_is_watched() -> None:
    assert "Node" not in Heard(nodes=False).kinds


def test_secrets_are_never_watched() -> None:
    assert "Secret" not in Heard().kinds


@pytest.mark.parametrize("event", ["ADDED", "MODIFIED", "DELETED", None])
def test_whatever_happens_to_a_resource_wakes_its_key(event: str) -> None:
    heard = Heard()
    heard.tell(KIND, body(), event)
    assert heard.woken == [{CHAT}]


@pytest.mark.parametrize("kind", sorted({*CHILDREN, "Pod"} - {AUTOSCALER}))
def test_whatever_happens_to_a_child_wakes_its_owner(kind: str) -> None:
    heard = Heard()
    heard.tell(kind, body(labels=child_labels("chat")), "DELETED")
    assert heard.woken == [{CHAT}]


def test_what_keda_notes_all_the_time_wakes_nobody() -> None:
    heard = Heard()
    for moment in range(3):
        status = {"lastActiveTime": str(moment), "conditions": [{"type": "Ready", "status": "True"}]}
        heard.tell(KEDA_AUTOSCALER, {**body(labels=child_labels("chat")), "status": status})
    assert heard.woken == [{CHAT}]
    refused = {"conditions": [{"type": "Ready", "status": "False"}]}
    heard.tell(KEDA_AUTOSCALER, {**body(labels=child_labels("chat")), "status": refused})
    assert heard.woken == [{CHAT}] * 2


def test_every_autoscaler_is_handed_on_with_whether_it_went() -> None:
    heard = Heard()
    heard.tell(AUTOSCALER, body(name="somebody-elses"))
    heard.tell(AUTOSCALER, body(name="somebody-elses"), "DELETED")
    assert heard.scalers == [("somebody-elses", False), ("somebody-elses", True)]


def test_only_our_own_children_are_listed_but_for_autoscalers() -> None:
    selectors = Heard().settings.watching.label_selectors
    for kind in (*CHILDREN, "Pod"):
        place = (KINDS[kind].group, KINDS[kind].version, KINDS[kind].plural)
        ours = "app.kubernetes.io/managed-by=pagedserve-operator"
        assert selectors.get(place) == (None if kind == AUTOSCALER else ours), kind


def test_a_node_is_handed_on_with_whether_it_went() -> None:
    heard = Heard()
    heard.tell("Node", {"metadata": {"name": "n1"}})
    heard.tell("Node", {"metadata": {"name": "n1"}}, "DELETED")
    assert heard.nodes == [("n1", False), ("n1", True)]


def test_no_handler_writes_to_what_it_watches() -> None:
    # Kopf's change handlers and timers would add finalizers and annotations.
    heard = Heard()
    for kind in ("_changing", "_spawning", "_indexing"):
        assert not list(getattr(heard.registry, kind)._handlers), kind
