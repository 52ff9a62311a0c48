"""Hundreds of streams while engines are replaced, taken away and added, and the operator is killed."""

from __future__ import annotations

from e2e.installation import Installation
from e2e.killer import Killer
from e2e.pair import Pair
from e2e.providers.provider import Provider
from e2e.streams import Crowd
from e2e.waiting import restarts, staying, uids, wait_served

WANTED = 200


def test_two_hundred_streams_end_whole_through_rollout_scale_down_and_crashes_of_the_operator(
    provider: Provider, installation: Installation, pair: Pair
) -> None:
    world, name = pair.world, pair.name
    old = uids(world.pods(name))
    with Crowd(pair.address, pair.texts) as crowd:
        crowd.wait_started(10)
        world.edit(name, env=[{"name": "NUM_THREADS", "value": "1"}, {"name": "LOG_LEVEL", "value": "warning"}])
        wait_served(world, name)
        assert not old & uids(staying(world.pods(name)))
        provider.cluster.kubectl("-n", world.namespace, "scale", f"psvc/{name}", "--replicas=1")
        world.client.wait(lambda: len(world.pods(name)) == 1, "one engine is left", seconds=180)
        with Killer(provider, installation) as killer:
            world.edit(name, replicas=2, env=[{"name": "NUM_THREADS", "value": "1"}])
            wait_served(world, name)
            crowd.wait_started(max(10, WANTED - crowd.tally.started))
    print(f"\n{crowd.tally}, {len(killer.kills)} kills of the operator")
    assert crowd.faults == []
    assert crowd.tally.whole == crowd.tally.started >= WANTED
    assert killer.kills
    assert restarts(world.pods(name)) == 0
    installation.wait_available()
