"""Rollouts of real engines: whoever streams gets the whole answer, and whoever asks is answered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from control_cluster import Cluster
from missing import skip_without
from node_stand_in import why_not
from operator_world import World, condition_of

pytest.importorskip("torch", reason="the engine needs torch")

from real_engine import LIFECYCLE, LONG, SECONDS, Asking, Stream, addresses, engine_world, health, tiny, wait_served


@pytest.fixture(scope="module")
def world(control_plane: Cluster) -> Iterator[World]:
    if reason := why_not():
        skip_without(reason)
    with engine_world(control_plane) as (world, _):
        yield world


@pytest.fixture(scope="module")
def pair(world: World) -> str:
    """The name of a resource with two engines, whose rollouts need no room."""
    world.create("pair", model=tiny(), replicas=2, lifecycle=LIFECYCLE, rollout={"strategy": "InPlace"})
    wait_served(world, "pair")
    return "pair"


def test_a_rolling_update_cuts_no_stream_and_fails_no_request(world: World, pair: str) -> None:
    ready = condition_of(world.get(pair), "Ready")
    old = {pod["metadata"]["uid"] for pod in world.pods(pair)}
    with Asking(world, pair) as asking:
        asking.wait_answers(1)
        streams = [Stream(address) for address in addresses(world, pair)]
        assert len(streams) == 2
        world.edit(pair, env=[{"name": "LOG_LEVEL", "value": "debug"}])
        leaving = _wait_draining(world, streams)
        assert leaving.runs
        assert leaving.address not in addresses(world, pair)
        wait_served(world, pair)
        asking.wait_answers(2)
    assert [stream.finish() for stream in streams] == [LONG, LONG]
    assert asking.failures == []
    assert condition_of(world.get(pair), "Ready")["lastTransitionTime"] == ready["lastTransitionTime"]
    assert not old & {pod["metadata"]["uid"] for pod in world.pods(pair) if "deletionTimestamp" not in pod["metadata"]}


def test_a_scale_down_cuts_no_stream_and_fails_no_request(control_plane: Cluster, world: World, pair: str) -> None:
    with Asking(world, pair) as asking:
        asking.wait_answers(1)
        streams = [Stream(address) for address in addresses(world, pair)]
        assert len(streams) == 2
        control_plane.kubectl("-n", world.namespace, "scale", f"psvc/{pair}", "--replicas=1")
        leaving = _wait_draining(world, streams)
        assert leaving.runs
        assert [stream.finish() for stream in streams] == [LONG, LONG]
        world.client.wait(lambda: len(world.pods(pair)) == 1, "one engine is left", seconds=SECONDS)
        asking.wait_answers(2)
    assert asking.failures == []
    assert addresses(world, pair) == [stream.address for stream in streams if stream is not leaving]


def _wait_draining(world: World, streams: list[Stream]) -> Stream:
    """The first stream whose engine takes no more requests."""

    def draining() -> Stream | None:
        return next((stream for stream in streams if health(stream.address) != 200), None)

    return world.client.wait(draining, "an engine drains", seconds=SECONDS)
