"""Kopf decorators only: every event means "look at this key again", and nothing is decided here.

Only event handlers are used: kopf's create, update and timer handlers would write annotations and finalizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import kopf

from pagedserve_operator.keys import Changes, key_of_resource, keys_of_child
from pagedserve_operator.kinds import AUTOSCALER, CHILDREN, KEDA_AUTOSCALER, KINDS, OPTIONAL
from pagedserve_operator.names import KIND, LABEL_MANAGED_BY, MANAGER, Key

Wake = Callable[[Iterable[Key]], None]
Body = Mapping[str, Any]
Look = Callable[[Body, bool], None]
"""Gets the object and whether it was deleted."""

_OURS: Final = f"{LABEL_MANAGED_BY}={MANAGER}"


def watched(*, nodes: bool) -> tuple[str, ...]:
    """Kinds that are watched wherever the operator runs."""
    always = (KIND, *(kind for kind in CHILDREN if kind not in OPTIONAL), "Pod")
    return (*always, "Node") if nodes else always


def register(
    registry: kopf.OperatorRegistry,
    settings: kopf.OperatorSettings,
    *,
    wake: Wake,
    autoscaler_changed: Look,
    node_changed: Look | None,
) -> None:
    """Handlers for the resource, its children and pods, and (where ``node_changed`` is given) nodes."""
    _on_event(registry, KIND, lambda body, _: wake([key_of_resource(body)]))
    # Somebody else's autoscaler on our Deployment matters too: these are watched without a selector.
    _on_event(registry, AUTOSCALER, autoscaler_changed)
    for kind in {*CHILDREN, "Pod"} - {AUTOSCALER}:
        _on_event(registry, kind, _waking_if_seen(wake) if kind == KEDA_AUTOSCALER else _waking(wake))
        settings.watching.label_selectors[_place(kind)] = _OURS
    if node_changed is not None:
        _on_event(registry, "Node", node_changed)


def _waking(wake: Wake) -> Look:
    return lambda body, _: wake(keys_of_child(body))


def _waking_if_seen(wake: Wake) -> Look:
    changes = Changes()

    def look(body: Body, deleted: bool) -> None:
        # KEDA notes at each question when it last found anything to do.
        if changes.saw(body, deleted):
            wake(keys_of_child(body))

    return look


def _on_event(registry: kopf.OperatorRegistry, kind: str, look: Look) -> None:
    async def handler(event: Mapping[str, Any], **_: Any) -> None:
        look(event["object"], event["type"] == "DELETED")

    kopf.on.event(*_place(kind), id=f"look-{KINDS[kind].plural}", registry=registry)(handler)


def _place(kind: str) -> tuple[str, str, str]:
    place = KINDS[kind]
    return place.group, place.version, place.plural
