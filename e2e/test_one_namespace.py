"""An operator of one namespace, with the rights of its overlay and no others."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import yaml
from e2e.installation import NAME, QUICK, Installation
from e2e.providers.provider import Provider
from e2e.waiting import namespaced, wait_served

from operator_world import World, condition_of

JSON = dict[str, Any]
OVERLAY = Path(__file__).parents[1] / "manifests" / "overlays" / "one-namespace"
USUAL = "models"
"""The overlay's namespace, which its users replace by theirs."""


def in_namespace(manifests: str, namespace: str) -> str:
    """The overlay with another namespace."""
    documents = [document for document in yaml.safe_load_all(manifests) if document]
    for document in documents:
        for place in (document["metadata"], *document.get("subjects", ())):
            if place.get("namespace") == USUAL:
                place["namespace"] = namespace
    return yaml.safe_dump_all(documents, sort_keys=False)


def test_an_operator_of_one_namespace_serves_it_with_its_own_rights_only(
    provider: Provider, installation: Installation, world: World
) -> None:
    manifests = in_namespace(provider.cluster.kubectl("kustomize", str(OVERLAY)).stdout, world.namespace)
    kinds = {document["kind"] for document in yaml.safe_load_all(manifests)}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding", "APIService"}
    with installation.held(), namespaced(provider, "elsewhere") as elsewhere:
        alone = Installation(provider.cluster, namespace=world.namespace)
        alone.apply(manifests, provider.images, settings=QUICK)
        elsewhere.create("foreign", **provider.light())
        world.create("chat", **provider.light())
        world.create("lost", gpu={"type": "auto"})
        wait_served(world, "chat")
        told = world.wait("lost", "TuningResolved", "False", reason="GPUTypeRequired")
        assert "spec.gpu.type" in condition_of(told, "TuningResolved")["message"]
        world.edit("chat", replicas=2)
        wait_served(world, "chat")
        assert "status" not in elsewhere.get("foreign")
        assert _refusals(provider, world) == []


def _refusals(provider: Provider, world: World) -> list[str]:
    """What was forbidden to the operator, by the API server's own record."""
    if not provider.cluster.started_here:
        return []
    user = f"system:serviceaccount:{world.namespace}:{NAME}"
    asked = [entry for entry in provider.cluster.audit.since() if entry.user == user]
    assert asked, f"{user} asked for nothing"
    return [f"{entry.verb} {entry.uri}" for entry in asked if entry.code == 403]


def test_the_overlay_moves_to_another_namespace_whole(provider: Provider) -> None:
    name = f"ns-{uuid.uuid4().hex[:4]}"
    moved = in_namespace(provider.cluster.kubectl("kustomize", str(OVERLAY)).stdout, name)
    assert f"namespace: {USUAL}" not in moved
