from __future__ import annotations

import asyncio
from typing import Any

from pagedserve_operator.kinds import AUTOSCALER, KEDA_AUTOSCALER, OPTIONAL
from pagedserve_operator.names import Key, Owner
from pagedserve_operator.observe import World, observe

JSON = dict[str, Any]
CHAT = Owner(Key("models", "chat"), "isvc")


class Objects:
    """An API server with these objects."""

    def __init__(self, *objects: JSON) -> None:
        self._objects = {(row["kind"], row["metadata"]["name"]): row for row in objects}

    async def get(self, kind: str, namespace: str, name: str) -> JSON | None:
        return self._objects.get((kind, name))

    async def list(self, kind: str, namespace: str | None = None, *, selector: str | None = None) -> list[JSON]:
        return []

    async def served_kinds(self) -> frozenset[str]:
        return OPTIONAL


def observed(*objects: JSON) -> World:
    names = [row["metadata"]["name"] for row in objects if row["kind"] == AUTOSCALER]
    return asyncio.run(observe(Objects(*objects), CHAT, autoscalers=names))  # type: ignore[arg-type]


def scaler(name: str, *, owner: str = "", target: str = "chat") -> JSON:
    references = [{"kind": "ScaledObject", "name": "chat", "uid": owner, "controller": True}] if owner else []
    return {
        "kind": AUTOSCALER,
        "metadata": {"name": name, "ownerReferences": references},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": target}},
    }


SCALED_OBJECT: JSON = {
    "kind": KEDA_AUTOSCALER,
    "metadata": {"name": "chat", "uid": "so", "ownerReferences": [CHAT.reference()]},
}
THEIRS: JSON = {"kind": KEDA_AUTOSCALER, "metadata": {"name": "chat", "uid": "so"}}
"""Somebody else's, of the name that ours would have."""


def test_ours_is_no_stranger() -> None:
    seen = observed(scaler("chat")).observation()
    assert seen.hpa is not None
    assert seen.foreign_hpas == ()


def test_another_one_on_our_deployment_is() -> None:
    assert observed(scaler("chat"), scaler("theirs")).observation().foreign_hpas == ("theirs",)
    assert observed(scaler("theirs", target="other")).observation().foreign_hpas == ()


def test_what_keda_makes_of_our_scaled_object_stands_for_ours() -> None:
    seen = observed(SCALED_OBJECT, scaler("keda-hpa-chat", owner="so")).observation()
    assert seen.foreign_hpas == ()
    assert seen.hpa is not None
    assert seen.hpa["metadata"]["name"] == "keda-hpa-chat"
    assert seen.scaled_object == SCALED_OBJECT


def test_what_keda_makes_of_another_one_is_a_stranger() -> None:
    seen = observed(SCALED_OBJECT, scaler("keda-hpa-other", owner="another")).observation()
    assert seen.foreign_hpas == ("keda-hpa-other",)
    assert seen.hpa is None
    assert observed(scaler("keda-hpa-chat", owner="so")).observation().foreign_hpas == ("keda-hpa-chat",)


def test_a_scaled_object_of_our_name_is_ours_by_its_owner_alone() -> None:
    """PAINS 18."""
    seen = observed(THEIRS, scaler("keda-hpa-chat", owner="so")).observation()
    assert seen.foreign_hpas == ("keda-hpa-chat",)
    assert seen.hpa is None
    assert seen.scaled_object is None
