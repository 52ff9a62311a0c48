"""The GPU that a node is labelled with decides the engine's numbers, and the decision stands until the spec changes."""

from __future__ import annotations

import itertools
import uuid

from e2e.providers.provider import Provider
from e2e.waiting import JSON

from operator_world import World

POOL = "e2e.pagedserve.dev/tuning"


def labels_of(product: str, memory_mib: int) -> dict[str, str]:
    """As GPU feature discovery writes them."""
    return {
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.product": product,
        "nvidia.com/gpu.memory": str(memory_mib),
        "nvidia.com/gpu.count": "1",
        "nvidia.com/gpu.replicas": "1",
    }


def test_the_numbers_follow_the_nodes_label_and_stand_until_the_spec_changes(provider: Provider, world: World) -> None:
    pool = {POOL: uuid.uuid4().hex[:8]}
    with provider.node(labels={**pool, **labels_of("NVIDIA-L4", 23034)}, gpus=1) as node:
        # No engine is started: there is no such GPU.
        spec: JSON = {"gpu": {"type": "auto", "nodeSelector": pool}, "replicas": 0}
        world.create("first", **spec)
        first = world.wait("first", "TuningResolved")["status"]["tuning"]
        assert (first["gpu"]["product"], first["gpu"]["memoryMiB"]) == ("NVIDIA-L4", 23034)
        manifest = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
        world.client.patch(manifest, {"metadata": {"labels": labels_of("NVIDIA-H100-80GB-HBM3", 81559)}})
        larger = _decided_for_the_new_label(world, spec)
        assert larger["numBlocks"] > first["numBlocks"]
        assert world.get("first")["status"]["tuning"] == first
        world.edit("first", limits={"maxNumSeqs": 8})
        world.client.wait(lambda: _product(world.get("first")) == larger["gpu"]["product"], "it is decided anew")
        container = world.child("Deployment", "first")["spec"]["template"]["spec"]["containers"][0]
        given = {row["name"]: row.get("value") for row in container["env"]}
        assert given["NUM_BLOCKS"] == str(world.get("first")["status"]["tuning"]["numBlocks"])


def _decided_for_the_new_label(world: World, spec: JSON) -> JSON:
    """What a new resource gets; the operator hears of the label in its own time."""
    numbers = itertools.count()

    def decided() -> JSON | None:
        name = f"later-{next(numbers)}"
        world.create(name, **spec)
        tuning: JSON = world.wait(name, "TuningResolved")["status"]["tuning"]
        return tuning if "H100" in tuning["gpu"]["product"] else None

    return world.client.wait(decided, "a resource is sized for the new label")


def _product(resource: JSON) -> str:
    return str(resource["status"]["tuning"]["gpu"]["product"])
