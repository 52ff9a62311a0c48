from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine_world import (
    TUNING,
    autoscaler,
    condition,
    crashing_pod,
    creating_pod,
    deployment,
    loading_pod,
    look,
    ready_pod,
    resource,
    told,
    unscheduled_pod,
)
from pagedserve_operator.errors import GPUTypeRequired

Json = dict[str, Any]
World = dict[str, Any]
ROLL = {"revision": "2", "reason": "ReplicaSetUpdated"}


def walk(*worlds: World, **spec: Any) -> list[list[tuple[str, str]]]:
    """The events of each look, every one at the status that the one before left."""
    status: Json = {}
    found = []
    for world in worlds:
        outcome = look(resource(status=status, **{**spec, **world.pop("spec", {})}), **world)
        status = outcome.status
        found.append(told(outcome))
    return found


def running(*pods: Json, **more: Any) -> World:
    return {"deployment": deployment(max(1, len(pods)), **more), "pods": list(pods)}


def test_a_life_without_trouble_is_told_in_two_events() -> None:
    assert walk(
        {},
        {"deployment": deployment(reason="ReplicaSetUpdated", seen=0)},
        running(creating_pod(), reason="ReplicaSetUpdated"),
        running(loading_pod(), reason="ReplicaSetUpdated"),
        running(ready_pod(), reason="ReplicaSetUpdated"),
        running(ready_pod()),
    ) == [[("Normal", "TuningResolved")], [], [], [], [("Normal", "Available")], []]


def test_a_life_without_trouble_changes_the_status_few_times() -> None:
    status: Json = {}
    writes = 0
    for world in (
        {},
        {"deployment": deployment(reason="ReplicaSetUpdated", seen=0)},
        {"deployment": deployment(reason="ReplicaSetUpdated"), "pods": []},
        running(creating_pod(), reason="ReplicaSetUpdated"),
        running(loading_pod(), reason="ReplicaSetUpdated"),
        running(ready_pod(), reason="ReplicaSetUpdated"),
        running(ready_pod()),
    ):
        outcome = look(resource(status=status), **world)
        writes += outcome.status != status
        status = outcome.status
    assert writes == 4


def test_the_tuning_is_told_with_its_memory() -> None:
    (note,) = look(resource()).events
    assert "NVIDIA-L4" in note.message
    assert "900 blocks of 32 tokens" in note.message
    assert "Of 23034 MiB: weights 15300, runtime 1000, activations 500, graphs 300, cache 3600, left over 2334." in (
        note.message
    )
    assert TUNING.gpu.reason in note.message


def test_a_new_decision_is_told_and_the_same_one_in_other_words_is_not() -> None:
    bigger = replace(TUNING, sizing=replace(TUNING.sizing, num_blocks=950))
    reworded = replace(bigger, gpu=replace(TUNING.gpu, reason="said otherwise"), shape_source="elsewhere")
    assert walk({}, {"tuning": bigger}, {"tuning": reworded})[1:] == [[("Normal", "TuningResolved")], []]


def test_a_gpu_that_turns_up_is_told() -> None:
    missing = {"problem": GPUTypeRequired("set spec.gpu.type"), "tuning": None}
    assert walk(missing, {}) == [
        [("Warning", "GPUTypeRequired")],
        [("Normal", "TuningResolved"), ("Normal", "Recovered")],
    ]


def test_trouble_is_told_when_it_begins_changes_and_ends() -> None:
    assert walk(
        running(unscheduled_pod()),
        running(crashing_pod()),
        running(crashing_pod(restarts=40)),
        running(ready_pod()),
    ) == [
        [("Normal", "TuningResolved"), ("Warning", "InsufficientGPU")],
        [("Warning", "CrashLoop")],
        [],
        [("Normal", "Available")],
    ]


def test_one_crashing_pod_of_many_is_told_while_the_resource_stays_ready() -> None:
    well = [ready_pod("a"), ready_pod("b")]
    assert walk(running(*well, ready_pod("c")), running(*well, crashing_pod("c")), running(*well, ready_pod("c"))) == [
        [("Normal", "TuningResolved")],
        [("Warning", "CrashLoop")],
        [("Normal", "Recovered")],
    ]


def test_one_cause_is_told_once_although_two_conditions_carry_it() -> None:
    assert walk(running(ready_pod()), running(crashing_pod()))[1] == [("Warning", "CrashLoop")]


def test_becoming_unready_for_a_reason_that_passes_is_told() -> None:
    assert walk(running(ready_pod()), running(loading_pod()))[1] == [("Warning", "ModelLoading")]


def test_scaling_to_zero_is_no_warning() -> None:
    assert walk(running(ready_pod()), {"deployment": deployment(0)})[1] == [("Normal", "ScaledToZero")]


def rolled(pods: Sequence[Json], *, updated: int, surge: int = 1, **more: Any) -> World:
    return {"deployment": deployment(2, updated=updated, surge=surge, **{**ROLL, **more}), "pods": list(pods)}


def test_a_rollout_is_told_at_its_begin_and_its_end() -> None:
    old = [ready_pod("a"), ready_pod("b")]
    new = [ready_pod("c", template="t2", born=20), ready_pod("d", template="t2", born=10)]
    assert walk(
        running(*old),
        rolled([*old, loading_pod("c", template="t2", born=20)], updated=1),
        rolled([*old[:1], *new[:1]], updated=1),
        rolled(new, updated=2),
        rolled(new, updated=2, reason="NewReplicaSetAvailable"),
    )[1:] == [[("Normal", "RolloutStarted")], [], [], [("Normal", "RolloutFinished")]]


def test_a_blocked_rollout_is_told_once_and_goes_on() -> None:
    old = [ready_pod("a"), ready_pod("b")]
    blocked = unscheduled_pod("c", template="t2", born=20)
    new = [ready_pod("c", template="t2", born=20), ready_pod("d", template="t2", born=10)]
    assert walk(
        running(*old),
        rolled([*old, blocked], updated=1),
        rolled([*old, blocked], updated=1),
        rolled([old[0], new[0]], updated=1),
        rolled(new, updated=2, reason="NewReplicaSetAvailable"),
    )[1:] == [
        [("Normal", "RolloutStarted"), ("Warning", "RolloutBlocked")],
        [],
        [("Normal", "Recovered")],
        [("Normal", "RolloutFinished")],
    ]


@pytest.mark.parametrize(("surge", "gap"), [(0, True), (1, False), ("25%", False), ("0%", True)])
def test_a_single_replica_without_surge_is_told_to_leave_a_gap(surge: Any, gap: bool) -> None:
    drained = [ready_pod("a", leaving=100), unscheduled_pod("b", template="t2", born=5)]
    notes = walk(running(ready_pod("a"), surge=surge), running(*drained[1:], surge=surge, **ROLL))[1]
    assert (("Warning", "RolloutGap") in notes) is gap


def test_recreating_leaves_a_gap_too() -> None:
    deployed = deployment(1, **ROLL)
    deployed["spec"]["strategy"] = {"type": "Recreate"}
    notes = walk(running(ready_pod()), {"deployment": deployed, "pods": [creating_pod(template="t2")]})[1]
    assert ("Warning", "RolloutGap") in notes


def test_suspending_and_resuming_are_told() -> None:
    suspended = {**running(ready_pod()), "spec": {"suspend": True}}
    assert walk(running(ready_pod()), suspended, running(ready_pod()))[1:] == [
        [("Normal", "Suspended")],
        [("Normal", "Resumed")],
    ]


def test_an_operator_that_starts_again_tells_nothing() -> None:
    world = running(ready_pod("a"), crashing_pod("b"), unscheduled_pod("c"))
    assert walk(world, world)[1] == []


WORKS = autoscaler(condition("AbleToScale", "True"), condition("ScalingActive", "True"))
BLIND = autoscaler(
    condition("AbleToScale", "True"),
    condition("ScalingActive", "False", reason="FailedGetPodsMetric", message="no metrics returned"),
)


def test_an_autoscaler_is_told_when_it_stops_and_goes_on() -> None:
    worlds = [{**running(ready_pod()), "hpa": hpa} for hpa in (None, WORKS, BLIND, BLIND, WORKS)]
    assert walk(*worlds, autoscaling={})[1:] == [
        [],
        [("Warning", "MetricsUnavailable")],
        [],
        [("Normal", "ScalingActive")],
    ]


def test_a_second_autoscaler_is_told_once() -> None:
    worlds = [{**running(ready_pod()), "hpa": WORKS, "foreign": foreign} for foreign in ([], ["keda"], ["keda"])]
    assert walk(*worlds, autoscaling={})[1:] == [[("Warning", "AutoscalerConflict")], []]
