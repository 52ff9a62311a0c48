from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_world import (
    CANT_FIT,
    IMAGE,
    NOW,
    TUNING,
    autoscaler,
    condition,
    crashing_pod,
    creating_pod,
    deployment,
    loading_pod,
    look,
    message_of,
    pod,
    ready_pod,
    resource,
    row_of,
    told,
    unscheduled_pod,
    verdict,
    waiting_pod,
)
from pagedserve_operator.errors import ChildRejected, ModelDoesNotFit, SecretNotFound, SpecError
from pagedserve_operator.status import Observation, compute, differs

NEW = {"revision": "2", "reason": "ReplicaSetUpdated"}


def ready_pods(count: int, **more: Any) -> list[dict[str, Any]]:
    return [ready_pod(f"llama-1-{number}", **more) for number in range(count)]


WORLDS = {
    "nothing exists yet": (None, [], ("False", "PodsStarting"), ("True", "PodsStarting"), "False"),
    "the only pod is being created": (
        deployment(1, reason="ReplicaSetUpdated"),
        [creating_pod()],
        ("False", "PodsStarting"),
        ("True", "PodsStarting"),
        "False",
    ),
    "the only pod loads the model": (
        deployment(1, reason="ReplicaSetUpdated"),
        [loading_pod()],
        ("False", "ModelLoading"),
        ("True", "ModelLoading"),
        "False",
    ),
    "the only pod is ready": (deployment(1), ready_pods(1), ("True", "Available"), ("False", "Complete"), "False"),
    "two of three are ready, the third loads": (
        deployment(3),
        [*ready_pods(2), loading_pod("b")],
        ("True", "Available"),
        ("True", "ModelLoading"),
        "False",
    ),
    "one of three is ready, the others load": (
        deployment(3),
        [*ready_pods(1), loading_pod("b"), loading_pod("c")],
        ("False", "ModelLoading"),
        ("True", "ModelLoading"),
        "False",
    ),
    "two of three are ready, the third crashes": (
        deployment(3),
        [*ready_pods(2), crashing_pod("b")],
        ("True", "Available"),
        ("False", "CrashLoop"),
        "True",
    ),
    "the only pod crashes": (
        deployment(1),
        [crashing_pod()],
        ("False", "CrashLoop"),
        ("False", "CrashLoop"),
        "True",
    ),
    "the model turns out too big in the engine": (
        deployment(1),
        [crashing_pod(message=CANT_FIT)],
        ("False", "ModelDoesNotFit"),
        ("False", "ModelDoesNotFit"),
        "True",
    ),
    "no GPU is free at the first start": (
        deployment(1, reason="ReplicaSetUpdated"),
        [unscheduled_pod()],
        ("False", "InsufficientGPU"),
        ("False", "InsufficientGPU"),
        "True",
    ),
    "a rollout can't get its GPU": (
        deployment(2, updated=1, **NEW),
        [*ready_pods(1, template="t1"), unscheduled_pod("b", template="t2", born=10)],
        ("True", "Available"),
        ("False", "RolloutBlocked"),
        "True",
    ),
    "a rollout in place waits for the old pod's drain": (
        deployment(2, updated=1, **NEW),
        [
            *ready_pods(1, template="t1"),
            ready_pod("old", template="t1", leaving=100),
            unscheduled_pod("b", template="t2", born=10),
        ],
        ("True", "Available"),
        ("True", "RollingOut"),
        "False",
    ),
    "a rollout goes on and all old pods answer": (
        deployment(2, updated=1, **NEW),
        [*ready_pods(2, template="t1"), loading_pod("b", template="t2", born=10)],
        ("True", "Available"),
        ("True", "RollingOut"),
        "False",
    ),
    "the old template crashes while the cure is loading": (
        deployment(1, updated=1, **NEW),
        [crashing_pod("old", template="t1"), loading_pod("b", template="t2", born=10)],
        ("False", "ModelLoading"),
        ("True", "RollingOut"),
        "False",
    ),
    "the progress deadline has passed at the first start": (
        deployment(1, reason="ProgressDeadlineExceeded"),
        [loading_pod()],
        ("False", "StartupTimeout"),
        ("False", "StartupTimeout"),
        "True",
    ),
    "a crashing pod explains a missed deadline": (
        deployment(1, reason="ProgressDeadlineExceeded"),
        [crashing_pod()],
        ("False", "CrashLoop"),
        ("False", "CrashLoop"),
        "True",
    ),
    "pods can't be made": (
        deployment(1, refusal='pods "llama-1-x2x" is forbidden: exceeded quota'),
        [],
        ("False", "PodsRejected"),
        ("False", "PodsRejected"),
        "True",
    ),
    "somebody scaled to zero": (deployment(0), [], ("False", "ScaledToZero"), ("False", "Complete"), "False"),
    "the image can't be pulled": (
        deployment(1),
        [waiting_pod("ImagePullBackOff", f'Back-off pulling image "{IMAGE}": ErrImagePull: not found')],
        ("False", "ImagePullFailed"),
        ("False", "ImagePullFailed"),
        "True",
    ),
}


@pytest.mark.parametrize("world", WORLDS)
def test_conditions_tell_the_truth_when(world: str) -> None:
    deployed, pods, ready, progressing, degraded = WORLDS[world]
    outcome = look(resource(), deployment=deployed, pods=pods)
    assert verdict(outcome) == ready
    assert verdict(outcome, "Progressing") == progressing
    assert verdict(outcome, "Degraded")[0] == degraded


@pytest.mark.parametrize("world", WORLDS)
def test_a_second_look_at_the_same_world_changes_and_tells_nothing_when(world: str) -> None:
    deployed, pods, *_ = WORLDS[world]
    first = look(resource(), deployment=deployed, pods=pods)
    later = look(resource(status=first.status), deployment=deployed, pods=pods, now=NOW + timedelta(seconds=20))
    assert not differs(first.status, later.status)
    assert later.events == ()


def test_the_status_carries_what_the_resource_shows() -> None:
    outcome = look(resource(generation=4, service={"port": 9000}), deployment=deployment(2), pods=ready_pods(2))
    status = outcome.status
    assert status["observedGeneration"] == 4
    assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (2, 2, 2)
    assert status["selector"] == "app.kubernetes.io/instance=llama,app.kubernetes.io/name=pagedserve-engine"
    assert status["url"] == "http://llama.models.svc:9000"
    assert status["image"] == IMAGE
    assert status["tuning"]["numBlocks"] == 900
    assert {row["observedGeneration"] for row in status["conditions"]} == {4}


def test_the_usual_port_is_left_out_of_the_url() -> None:
    assert look(resource(), deployment=deployment()).status["url"] == "http://llama.models.svc"


def test_there_is_no_url_before_there_is_a_service() -> None:
    assert "url" not in look(resource(), child_service=None).status


def test_a_transition_time_moves_with_the_status_alone() -> None:
    first = look(resource(), deployment=deployment(), pods=[creating_pod()])
    later = NOW + timedelta(seconds=60)
    second = look(resource(status=first.status), deployment=deployment(), pods=[loading_pod()], now=later)
    assert row_of(second)["reason"] != row_of(first)["reason"]
    assert row_of(second)["lastTransitionTime"] == row_of(first)["lastTransitionTime"] == "2026-05-04T12:00:00Z"
    third = look(resource(status=second.status), deployment=deployment(), pods=ready_pods(1), now=later)
    assert row_of(third)["lastTransitionTime"] == "2026-05-04T12:01:00Z"


def test_ready_names_the_old_generation_until_the_deployments_controller_has_seen_the_new_one() -> None:
    first = look(resource(generation=1), deployment=deployment(), pods=ready_pods(1))
    raw = resource(generation=2, status=first.status)
    second = look(raw, deployment=deployment(generation=2, seen=1), pods=ready_pods(1))
    assert verdict(second) == ("True", "Available")
    assert row_of(second)["observedGeneration"] == 1
    assert verdict(second, "Progressing") == verdict(first, "Progressing")
    third = look(raw, deployment=deployment(generation=2), pods=ready_pods(1))
    assert row_of(third)["observedGeneration"] == 2


def test_a_deployment_that_nobody_has_seen_is_never_ready() -> None:
    assert verdict(look(resource(), deployment=deployment(seen=0), pods=ready_pods(1))) == ("False", "PodsStarting")


def test_a_problem_with_a_new_spec_leaves_what_runs_ready_for_the_old_one() -> None:
    first = look(resource(generation=1), deployment=deployment(), pods=ready_pods(1))
    raw = resource(generation=2, status=first.status)
    problem = ModelDoesNotFit("spec.model.uri: 3.2 GiB short; set spec.gpu.count to 2")
    second = look(raw, deployment=deployment(), pods=ready_pods(1), problem=problem)
    assert verdict(second) == ("True", "Available")
    assert row_of(second)["observedGeneration"] == 1
    assert verdict(second, "TuningResolved") == ("False", "ModelDoesNotFit")
    assert verdict(second, "Degraded") == ("True", "ModelDoesNotFit")
    assert "3.2 GiB short" in message_of(second, "Degraded")
    assert second.status["observedGeneration"] == 2
    assert second.status["tuning"] == first.status["tuning"]
    assert told(second) == [("Warning", "ModelDoesNotFit")]


PROBLEMS = {
    "the model does not fit": (ModelDoesNotFit("spec.gpu: too small"), "False"),
    "a Secret is missing": (SecretNotFound("spec.auth: make it"), "Unknown"),
    "a field can't be": (SpecError("spec.env[0]", "is set by the operator"), "Unknown"),
}


@pytest.mark.parametrize("world", PROBLEMS)
def test_a_resource_that_never_ran_says_why_when(world: str) -> None:
    problem, tuned = PROBLEMS[world]
    outcome = look(resource(), problem=problem, tuning=None, child_service=None)
    for kind, status in (("Ready", "False"), ("Progressing", "False"), ("Degraded", "True"), ("TuningResolved", tuned)):
        assert verdict(outcome, kind) == (status, problem.reason)
    assert message_of(outcome) == str(problem)
    assert told(outcome) == [("Warning", problem.reason)]


def test_a_spec_that_can_not_be_read_keeps_the_facts_of_what_runs() -> None:
    first = look(resource(), deployment=deployment(), pods=ready_pods(1))
    raw = resource(generation=2, status=first.status)
    problem = SpecError("spec.replicas", "must be a whole number")
    second = look(raw, deployment=deployment(), pods=ready_pods(1), service=None, tuning=None, problem=problem)
    assert verdict(second) == ("True", "Available")
    assert [second.status[name] for name in ("url", "image", "tuning")] == [
        first.status[name] for name in ("url", "image", "tuning")
    ]


def test_a_rejected_child_does_not_hide_that_the_model_loads() -> None:
    outcome = look(resource(), deployment=deployment(), pods=[loading_pod()], problem=ChildRejected("HPA: forbidden"))
    assert verdict(outcome, "Progressing") == ("True", "ModelLoading")
    assert verdict(outcome, "Degraded") == ("True", "ChildRejected")


def test_crashing_pods_and_a_problem_are_both_told() -> None:
    outcome = look(resource(), deployment=deployment(), pods=[crashing_pod()], problem=SecretNotFound("make Secret a"))
    assert verdict(outcome) == ("False", "CrashLoop")
    assert verdict(outcome, "Degraded") == ("True", "SecretNotFound")
    assert "CrashLoop" in message_of(outcome, "Degraded")


def test_suspending_keeps_the_facts_and_says_so() -> None:
    first = look(resource(), deployment=deployment(), pods=ready_pods(1))
    raw = resource(generation=2, status=first.status, suspend=True)
    second = look(raw, deployment=deployment(), pods=ready_pods(1))
    assert verdict(second, "Progressing") == ("False", "Suspended")
    assert verdict(second) == ("True", "Available")
    assert row_of(second)["observedGeneration"] == 1
    assert told(second) == [("Normal", "Suspended")]
    crashed = look(resource(status=second.status, suspend=True), deployment=deployment(), pods=[crashing_pod()])
    assert verdict(crashed) == ("False", "CrashLoop")


def test_a_resource_made_suspended_says_so() -> None:
    outcome = look(resource(suspend=True), tuning=None)
    assert verdict(outcome) == ("False", "Suspended")
    assert verdict(outcome, "TuningResolved") == ("Unknown", "Suspended")
    assert outcome.events == ()


def test_messages_name_a_few_pods_and_stay_short() -> None:
    pods = [crashing_pod(f"llama-{number:03}", message="boom " * 900) for number in range(200)]
    outcome = look(resource(), deployment=deployment(200), pods=pods)
    assert "pods llama-000, llama-001, llama-002 and 197 more" in message_of(outcome)
    assert all(len(row["message"]) <= 1024 for row in outcome.status["conditions"])
    assert all(len(note.message) <= 1024 for note in outcome.events)


def test_the_order_in_which_pods_are_listed_says_nothing() -> None:
    pods = [crashing_pod("c"), unscheduled_pod("b"), crashing_pod("a", message="out of luck"), loading_pod("d")]
    forth, back = (look(resource(), deployment=deployment(4), pods=listed) for listed in (pods, pods[::-1]))
    assert forth.status == back.status


def test_a_rejected_pods_message_does_not_change_with_every_try() -> None:
    outcomes = [
        look(resource(), deployment=deployment(refusal=f'pods "llama-1-{name}" is forbidden: exceeded quota: gpus'))
        for name in ("abc", "xyz")
    ]
    assert outcomes[0].status == outcomes[1].status
    assert "exceeded quota: gpus" in message_of(outcomes[0])


def test_the_next_look_comes_when_the_startup_budget_ends() -> None:
    outcome = look(resource(), deployment=deployment(), pods=[loading_pod(running_for=60)])
    assert outcome.look_again_seconds == 600 - 60 + 60
    assert look(resource(), deployment=deployment(), pods=ready_pods(1)).look_again_seconds is None


def test_a_status_is_compared_by_value() -> None:
    status = look(resource(), deployment=deployment(), pods=ready_pods(1)).status
    turned = {**status, "conditions": status["conditions"][::-1]}
    assert not differs(turned, status)
    assert differs({**status, "readyReplicas": 0}, status)
    assert differs(None, status)
    assert differs({"conditions": "odd"}, status)


def test_there_is_no_scaling_condition_without_autoscaling() -> None:
    outcome = look(resource(), deployment=deployment(), foreign=["keda"])
    assert "ScalingActive" not in {row["type"] for row in outcome.status["conditions"]}


def test_a_spec_that_can_not_be_read_keeps_what_was_known_of_its_autoscaler() -> None:
    working = autoscaler(
        condition("AbleToScale", "True"), condition("ScalingActive", "True", reason="ValidMetricFound")
    )
    first = look(resource(autoscaling={}), deployment=deployment(), pods=ready_pods(1), hpa=working)
    raw = resource(status=first.status)
    second = look(
        raw, deployment=deployment(), pods=ready_pods(1), hpa=working, service=None, problem=SpecError("spec.x", "no")
    )
    assert verdict(second, "ScalingActive") == ("True", "Active")


scalars = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(["True", "False", "Failed"])
)
NAMES = """
status conditions type reason message containerStatuses initContainerStatuses state lastState waiting running terminated
startedAt finishedAt exitCode metadata name labels creationTimestamp deletionTimestamp spec replicas containers ready
startupProbe failureThreshold periodSeconds phase started strategy rollingUpdate maxSurge
"""
names = st.sampled_from(NAMES.split())
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)
strange = st.dictionaries(names, junk, max_size=6)


@st.composite
def worn(draw: st.DrawFn, whole: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    """A real object of which any part may be missing or strange."""

    def wear(value: Any) -> Any:
        fate = draw(st.integers(0, 24))
        if fate == 0:
            return draw(junk)
        if isinstance(value, dict):
            return {name: wear(item) for name, item in value.items() if draw(st.integers(0, 14))}
        return [wear(item) for item in value] if isinstance(value, list) else value

    found = wear(draw(whole))
    return found if isinstance(found, dict) else {}


any_pod = st.sampled_from([pod for world in WORLDS.values() for pod in world[1]])
any_deployment = st.sampled_from([world[0] for world in WORLDS.values() if world[0] is not None])


@settings(max_examples=60, deadline=None)
@given(
    pods=st.lists(worn(any_pod) | strange, max_size=4),
    deployed=st.none() | worn(any_deployment) | strange,
    hpa=st.none() | strange,
    old=strange,
    problem=st.sampled_from([None, ModelDoesNotFit("no"), ChildRejected("no")]),
    tuned=st.booleans(),
)
def test_strange_objects_never_raise_and_never_flap(
    *, pods: list[Any], deployed: Any, hpa: Any, old: Any, problem: Any, tuned: bool
) -> None:
    raw = resource(status=old, autoscaling={})
    world = {
        "deployment": deployed,
        "pods": pods,
        "hpa": hpa,
        "problem": problem,
        "tuning": TUNING if tuned else None,
    }
    first = look(raw, **world)
    second = look({**raw, "status": first.status}, **world)
    assert not differs(first.status, second.status)
    assert second.events == ()
    for row in first.status["conditions"]:
        assert row["reason"]
        assert len(row["message"]) <= 1024


def test_a_resource_without_anything_still_gets_a_status() -> None:
    nothing = Observation(deployment=None, pods=(), hpa=None, foreign_hpas=(), service=None)
    outcome = compute({}, service=None, tuning=None, problem=SpecError("x", "y"), observation=nothing, now=NOW)
    assert verdict(outcome) == ("False", "InvalidSpec")


def test_a_pod_without_a_phase_is_about_to_start() -> None:
    assert verdict(look(resource(), deployment=deployment(), pods=[pod(phase="")])) == ("False", "PodsStarting")


def test_a_kubelet_in_back_off_does_not_take_back_what_it_said() -> None:
    failed = look(resource(), deployment=deployment(), pods=[waiting_pod("ErrImagePull", "not found")])
    silent = waiting_pod("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"')
    backed_off = look(resource(status=failed.status), deployment=deployment(), pods=[silent])
    assert not differs(failed.status, backed_off.status)
    assert "not found" in message_of(backed_off)


def test_a_complete_deployment_stays_complete_until_its_controller_has_seen_more() -> None:
    first = look(resource(), deployment=deployment(2), pods=ready_pods(2))
    scaled = look(resource(status=first.status), deployment=deployment(3, generation=2, seen=1), pods=ready_pods(2))
    assert verdict(scaled, "Progressing") == ("False", "Complete")
