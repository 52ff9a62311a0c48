"""A resource that is deleted takes everything along that was made for it, with or without an operator."""

from __future__ import annotations

from e2e.installation import Installation
from e2e.providers.provider import Provider
from e2e.waiting import JSON, objects_in, wait_served

from operator_world import MODEL, World

EVERYTHING: JSON = {
    "autoscaling": {"minReplicas": 1, "maxReplicas": 2},
    "networkPolicy": {"enabled": True},
    "auth": {"apiKeysSecretRef": {"name": "keys"}},
}


def test_deletion_leaves_nothing(provider: Provider, installation: Installation, world: World) -> None:
    world.secret("keys", **{"api-keys": "one"})
    before = objects_in(world.client, world.namespace)
    model = {**MODEL, **provider.light().get("model", {}), "chatTemplate": "{{ messages }}"}
    for name in ("operated", "orphaned"):
        world.create(name, **{**provider.light(), **EVERYTHING, "model": model})
    for name in ("operated", "orphaned"):
        wait_served(world, name)
    kinds = {kind for kind, name in objects_in(world.client, world.namespace) - before if "operated" in name}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy", "ConfigMap", "Pod"} <= kinds
    world.delete("operated")
    world.client.wait(lambda: not _named(world, "operated"), "nothing is left of it", seconds=120, every=1.0)
    with installation.held():
        world.delete("orphaned")
        world.client.wait(lambda: not _named(world, "orphaned"), "nothing is left of it", seconds=120, every=1.0)
    assert objects_in(world.client, world.namespace) == before


def _named(world: World, name: str) -> set[tuple[str, str]]:
    return {found for found in objects_in(world.client, world.namespace) if name in found[1]}
