"""Twenty resources come, change and go while the operator is killed every five seconds; then all is as was asked."""

from __future__ import annotations

import random
import threading
import time

from e2e.installation import Installation
from e2e.killer import Killer
from e2e.providers.provider import Provider
from e2e.waiting import JSON, objects_in, staying, wait_served

from operator_world import World

NAMES = tuple(f"churn-{number}" for number in range(20))
KILLS = 7
PACE_SECONDS = 0.3
SECONDS = 300.0
"""Many times what so many kills take."""


class Churn:
    """A user who never rests; ``wanted`` holds the spec that each resource was left with."""

    def __init__(self, world: World, provider: Provider) -> None:
        self.wanted: dict[str, JSON] = {}
        self.changes = 0
        self._world = world
        self._light = provider.light()
        self._chance = random.Random(7)

    def step(self) -> None:
        """Create one that isn't there; change one that is, or now and then delete it."""
        name = self._chance.choice(NAMES)
        spec: JSON = {
            "replicas": self._chance.choice((1, 1, 2)),
            "limits": {"maxQueue": self._chance.randrange(1, 1000)},
            "networkPolicy": {"enabled": self._chance.random() < 0.5},
        }
        self.changes += 1
        if name not in self.wanted:
            self._world.create(name, **{**self._light, **spec})
            self.wanted[name] = spec
        elif self._chance.random() < 0.2:
            self._world.delete(name)
            del self.wanted[name]
        else:
            self._world.edit(name, **spec)
            self.wanted[name] = spec

    def fill(self) -> None:
        """All twenty are there."""
        while len(self.wanted) < len(NAMES):
            self.step()


def test_twenty_resources_churn_while_the_operator_is_killed_every_five_seconds(
    provider: Provider, installation: Installation, world: World
) -> None:
    before = objects_in(world.client, world.namespace)
    churn, pace = Churn(world, provider), threading.Event()
    with Killer(provider, installation) as killer:
        deadline = time.monotonic() + SECONDS
        while len(killer.kills) < KILLS:
            killer.check()
            assert time.monotonic() < deadline, f"{len(killer.kills)} kills in {SECONDS:.0f} s: {killer.missed!r}"
            churn.step()
            pace.wait(PACE_SECONDS)
        churn.fill()
    print(f"\n{churn.changes} changes, {len(killer.kills)} kills of the operator")
    installation.wait_available()
    for name, spec in churn.wanted.items():
        wait_served(world, name)
        deployment = world.child("Deployment", name)
        given = {row["name"]: row.get("value") for row in _container(deployment)["env"]}
        assert (deployment["spec"]["replicas"], given["MAX_QUEUE"]) == (
            spec["replicas"],
            str(spec["limits"]["maxQueue"]),
        )
        assert (world.find("NetworkPolicy", name) is not None) == spec["networkPolicy"]["enabled"]
        world.client.wait(lambda n=name, s=spec: len(world.pods(n)) == s["replicas"], f"{name} has its pods")
        assert len(staying(world.pods(name))) == spec["replicas"]
    for name in NAMES:
        world.delete(name)
    world.client.wait(lambda: _only(world, before), "nothing is left of them", seconds=120, every=1.0)


def _container(deployment: JSON) -> JSON:
    found: JSON = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def _only(world: World, before: set[tuple[str, str]]) -> bool:
    return objects_in(world.client, world.namespace) <= before
