"""Engines that can't run, for real: the condition says what the engine said, and a better spec heals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from control_cluster import Cluster
from missing import skip_without
from node_stand_in import why_not
from operator_world import World, condition_of

pytest.importorskip("torch", reason="the engine needs torch")

from real_engine import LIFECYCLE, SECONDS, engine_world, tiny, wait_served

JSON = dict[str, Any]


@pytest.fixture(scope="module")
def world(control_plane: Cluster) -> Iterator[World]:
    if reason := why_not():
        skip_without(reason)
    with engine_world(control_plane) as (world, _):
        yield world


def test_an_engine_that_cannot_start_says_why_until_the_spec_is_cured(world: World) -> None:
    windows = {**tiny()["architecture"], "layerTypes": ["sliding", "sliding"], "slidingWindow": 32}
    endless = {**tiny()["architecture"], "maxPositionEmbeddings": 131072}
    lost = "/nowhere/small-135M"
    cases: dict[str, tuple[JSON, JSON, str, str]] = {
        "lost": (tiny(uri=lost), {}, "CrashLoop", f"MODEL is '{lost}': no such file or folder"),
        "long": (
            tiny(architecture=endless, maxModelLen=100_000),
            {},
            "CrashLoop",
            "MAX_MODEL_LEN is 100000 and the model holds 8192 tokens",
        ),
        "large": (
            tiny(architecture=windows, maxModelLen=8000),
            {"numBlocks": 16, "maxBatchTokens": 64},
            "ModelDoesNotFit",
            "MAX_MODEL_LEN is 8000: one sequence of that length takes",
        ),
    }
    for name, (model, tuning, *_) in cases.items():
        world.create(name, model=model, tuning=tuning, lifecycle=LIFECYCLE)
    for name, (*_, reason, message) in cases.items():
        refused = world.wait(name, "Ready", "False", reason=reason, seconds=SECONDS)
        assert message in condition_of(refused, "Ready")["message"]
        assert condition_of(refused, "TuningResolved")["status"] == "True"
        assert condition_of(refused, "Degraded")["reason"] == reason
        assert "Available" not in world.events(name)
    world.delete("long")
    world.delete("large")
    world.edit("lost", model={"uri": tiny()["uri"]})
    cured = wait_served(world, "lost")
    assert condition_of(cured, "Degraded")["status"] == "False"
    world.delete("lost")


def test_an_image_that_cannot_be_pulled_is_named(world: World) -> None:
    world.create("unpulled", image={"repository": "registry.example/engines/lost", "tag": "v9"})
    refused = world.wait("unpulled", "Ready", "False", reason="ImagePullFailed", seconds=SECONDS)
    assert "image registry.example/engines/lost:v9 can't be pulled" in condition_of(refused, "Ready")["message"]
    world.delete("unpulled")
