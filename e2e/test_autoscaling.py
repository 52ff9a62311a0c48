"""The autoscaler follows the engines' own load, by the metrics that the operator serves, and lets streams end."""

from __future__ import annotations

import time

from e2e.installation import Installation
from e2e.pair import ENV
from e2e.providers.provider import LIFECYCLE, Provider
from e2e.streams import Crowd, Question, ask
from e2e.waiting import JSON, wait_answers, wait_served

from operator_world import World, condition_of

AUTOSCALING: JSON = {
    "minReplicas": 1,
    "maxReplicas": 3,
    "metrics": [{"name": "runningRequests", "averageValue": "2"}],
    "behavior": {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Pods", "value": 2, "periodSeconds": 15}],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 0,
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
    },
}
QUESTION = Question("Once upon a time", 600)


def test_the_autoscaler_goes_up_and_down_with_the_engines_load(
    provider: Provider, installation: Installation, world: World
) -> None:
    world.create("chat", model=provider.small_model(), autoscaling=AUTOSCALING, lifecycle=LIFECYCLE, env=ENV)
    wait_served(world, "chat")
    world.wait("chat", "ScalingActive", seconds=120)
    address = wait_answers(world.client, provider.address(world.namespace, "chat"))
    texts = {QUESTION: ask(address, QUESTION)}
    begun = time.monotonic()
    with Crowd(address, texts, clients=6) as crowd:
        world.client.wait(lambda: _wanted(world) == 3, "three engines are wanted", seconds=120)
        print(f"\n3 replicas wanted {time.monotonic() - begun:.1f} s after the load began (bar 30)")
        world.client.wait(lambda: _ready(world) == 3, "three engines are ready", seconds=300)
    ended = time.monotonic()
    world.client.wait(lambda: _wanted(world) == 1, "one engine is wanted", seconds=180)
    print(f"1 replica wanted {time.monotonic() - ended:.1f} s after the last stream ended; {crowd.tally}")
    world.client.wait(lambda: len(world.pods("chat")) == 1, "one engine is left", seconds=180)
    assert crowd.faults == []
    assert condition_of(world.get("chat"), "ScalingActive")["status"] == "True"


def _wanted(world: World) -> int:
    found = world.child("HorizontalPodAutoscaler", "chat")
    return int(found.get("status", {}).get("desiredReplicas", 0))


def _ready(world: World) -> int:
    return int(world.child("Deployment", "chat").get("status", {}).get("readyReplicas", 0))
