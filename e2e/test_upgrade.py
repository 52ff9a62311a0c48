"""From the frozen first release to this tree: a new operator leads, and no engine is replaced or restarted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2e.installation import BUNDLE, NAMESPACE, QUICK, Installation
from e2e.providers.provider import Provider
from e2e.waiting import namespaced, restarts, uids, wait_served

from control_client import Client
from operator_world import MODEL, World

JSON = dict[str, Any]
FIRST_RELEASE = Path(__file__).parent / "fixtures" / "first-release" / "install.yaml"
SEEN = "example.com/seen"
OWN_APIS = {"custom.metrics.k8s.io"}


def specs_of(light: JSON) -> dict[str, JSON]:
    """Resources of every shape that the first release knew."""
    return {
        "plain": {},
        "scaled": {"autoscaling": {"minReplicas": 2, "maxReplicas": 3}},
        "guarded": {"networkPolicy": {"enabled": True}, "limits": {"maxQueue": 7}, "service": {"port": 8000}},
        "keyed": {"auth": {"hfTokenSecretRef": {"name": "hub"}, "apiKeysSecretRef": {"name": "keys"}}},
        "templated": {"model": {**MODEL, **light.get("model", {}), "chatTemplate": "{{ messages }}"}},
        "asleep": {"gpu": {"type": "NVIDIA-L4"}, "replicas": 0},
    }


def test_an_upgrade_from_the_first_release_rolls_no_engine(own_provider: Provider) -> None:
    provider, images = own_provider, own_provider.images
    provider.load_images([images.first_operator])
    installation = Installation(provider.cluster)
    first = FIRST_RELEASE.read_text(encoding="utf-8")
    installation.apply(first, images, operator=images.first_operator, settings=QUICK)
    with namespaced(provider, "upgrade") as world:
        world.secret("hub", token="hf_first")
        world.secret("keys", **{"api-keys": "one"})
        light = provider.light()
        specs = specs_of(light)
        for name, spec in specs.items():
            world.create(name, **{**light, **spec})
        for name in specs:
            wait_served(world, name) if name != "asleep" else world.wait(name, "TuningResolved")
        before = {name: _state(world, name) for name in specs}
        assert _own_apis(world.client) == set(), "that is no first release"
        leaders = uids(installation.pods())
        installation.apply(BUNDLE.read_text(encoding="utf-8"), images, settings=QUICK)
        assert not leaders & uids(installation.pods())
        # All of them are the new operator's: what changes is done, and still no engine is touched.
        for name in specs:
            world.edit(name, service={"annotations": {SEEN: "true"}})
        for name in specs:
            world.wait_child("Service", name, _is_seen, "has the annotation")
        assert {name: _state(world, name) for name in specs} == before
        world.client.wait(lambda: _own_apis(world.client) == OWN_APIS, "the new operator serves metrics", every=1.0)


def _state(world: World, name: str) -> tuple[JSON, set[str], int]:
    """What must not move: the Deployment's spec, and which pods run."""
    pods = world.pods(name)
    return world.child("Deployment", name)["spec"], uids(pods), restarts(pods)


def _is_seen(service: JSON) -> bool:
    return SEEN in (service["metadata"].get("annotations") or {})


def _own_apis(client: Client) -> set[str]:
    """What the API server leads to the operator; the first release serves nothing of the kind."""
    rows = client.list("apiregistration.k8s.io/v1", "APIService")
    return {row["spec"]["group"] for row in rows if (row["spec"].get("service") or {}).get("namespace") == NAMESPACE}
