"""The API server is killed under load: whoever streams notices nothing, and afterwards changes take effect again."""

from __future__ import annotations

from e2e.installation import Installation
from e2e.pair import Pair
from e2e.providers.provider import Provider
from e2e.streams import Crowd
from e2e.waiting import restarts, staying, uids, wait_served


def test_streams_outlive_the_api_server_and_the_operator_goes_on(
    provider: Provider, installation: Installation, pair: Pair
) -> None:
    world, name = pair.world, pair.name
    before = uids(world.pods(name))
    with Crowd(pair.address, pair.texts) as crowd:
        crowd.wait_started(6)
        provider.restart_apiserver()
        crowd.wait_started(12)
        installation.wait_available()
        assert uids(staying(world.pods(name))) == before
        assert restarts(world.pods(name)) == 0
        # Nothing that pods are made from: engines stay.
        world.edit(name, disruption={"enabled": False})
        world.wait_gone("PodDisruptionBudget", name)
        wait_served(world, name)
    print(f"\n{crowd.tally}")
    assert crowd.faults == []
    assert crowd.tally.whole == crowd.tally.started
    assert uids(world.pods(name)) == before
    world.edit(name, disruption=None)
