"""A node that is lost takes an engine with it: the Service goes on with the other, and a new one is made elsewhere."""

from __future__ import annotations

import uuid

from e2e.providers.provider import Provider
from e2e.streams import Cut, Question, ask
from e2e.waiting import staying, wait_answers, wait_served

from operator_world import World, condition_of

POOL = "e2e.pagedserve.dev/lost"
QUESTION = Question("Who is there?", 3)


def test_a_lost_nodes_engine_leaves_the_service_and_comes_back_elsewhere(provider: Provider, world: World) -> None:
    pool = {POOL: uuid.uuid4().hex[:8]}
    with provider.node(labels=pool) as doomed, provider.node(labels=pool) as spare:
        selector = {"gpu": {"type": "cpu", "nodeSelector": pool}}
        world.create("chat", **{**provider.light(), **selector, "replicas": 2})
        wait_served(world, "chat")
        address = wait_answers(world.client, provider.address(world.namespace, "chat"))
        assert _nodes(world) == {doomed, spare}, "the engines aren't spread"
        provider.lose_node(doomed)
        world.client.wait(lambda: _ready_nodes(world) == {spare}, "the lost engine is out of the Service", seconds=120)
        # A Service's proxy hears of it a moment later.
        world.client.wait(lambda: all(_answers(address) for _ in range(20)), "every question is answered")
        assert condition_of(world.get("chat"), "Ready")["status"] == "True"
        # As a cloud's controller does once the machine is gone for good.
        world.client.delete("v1", "Node", doomed)
        world.client.wait(lambda: _replaced(world, spare), "both engines run on the other node", seconds=180)
        wait_served(world, "chat")
        assert _answers(address)


def _nodes(world: World) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in staying(world.pods("chat"))}


def _ready_nodes(world: World) -> set[str]:
    slices = world.client.list(
        "discovery.k8s.io/v1", "EndpointSlice", namespace=world.namespace, labels="kubernetes.io/service-name=chat"
    )
    endpoints = [endpoint for part in slices for endpoint in part.get("endpoints") or ()]
    return {str(endpoint.get("nodeName")) for endpoint in endpoints if endpoint["conditions"].get("ready")}


def _replaced(world: World, node: str) -> bool:
    pods = world.pods("chat")
    return len(pods) == 2 and {pod["spec"].get("nodeName") for pod in pods} == {node}


def _answers(address: str) -> bool:
    try:
        return bool(ask(address, QUESTION))
    except Cut:
        return False
