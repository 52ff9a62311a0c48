from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine_world import (
    CANT_FIT,
    GPU,
    IMAGE,
    NOW,
    ago,
    condition,
    crashing_pod,
    creating_pod,
    engine,
    loading_pod,
    pod,
    ready_pod,
    unscheduled_pod,
    waiting_pod,
)
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.errors import MemoryPlanError
from pagedserve_engine.memory import MemoryInputs, plan_memory
from pagedserve_operator.status.pods import Survey, examine, survey


def survey_of(*pods: dict[str, Any], wanted: int = 1, updated: int | None = None, after: float = 0) -> Survey:
    return survey(pods, wanted=wanted, updated=updated, gpu=GPU, now=NOW + timedelta(seconds=after))


SINGLE = {
    "an unknown tag": (
        waiting_pod("ErrImagePull", f'failed to pull and unpack image "{IMAGE}": not found'),
        "ImagePullFailed",
        f'image {IMAGE} can\'t be pulled: failed to pull and unpack image "{IMAGE}": not found',
    ),
    "the same in back-off": (
        waiting_pod(
            "ImagePullBackOff",
            f'Back-off pulling image "{IMAGE}": ErrImagePull: failed to pull and unpack image "{IMAGE}": not found',
        ),
        "ImagePullFailed",
        f'image {IMAGE} can\'t be pulled: failed to pull and unpack image "{IMAGE}": not found',
    ),
    "back-off of an older kubelet": (
        waiting_pod("ImagePullBackOff", f'Back-off pulling image "{IMAGE}"'),
        "ImagePullFailed",
        f"image {IMAGE} can't be pulled",
    ),
    "an impossible image name": (
        waiting_pod("InvalidImageName", 'Failed to apply default image tag "A:B:C"'),
        "ImagePullFailed",
        "Failed to apply default image tag",
    ),
    "an image that may not be pulled": (
        waiting_pod("ErrImageNeverPull", 'Container image "x" is not present with pull policy of Never'),
        "ImagePullFailed",
        "pull policy of Never",
    ),
    "a Secret that is gone": (
        waiting_pod("CreateContainerConfigError", 'secret "hub" not found'),
        "ContainerConfigError",
        'the engine can\'t be created: secret "hub" not found',
    ),
    "a container that can't be created": (
        waiting_pod("CreateContainerError", "context deadline exceeded"),
        "ContainerConfigError",
        "context deadline exceeded",
    ),
    "a container that can't be started": (
        waiting_pod("RunContainerError", "nvidia-container-cli: initialization error"),
        "CrashLoop",
        "the engine can't be started (RunContainerError): nvidia-container-cli: initialization error",
    ),
    "an engine that says why it ends": (
        crashing_pod(message="MODEL is 'x': no such file or folder"),
        "CrashLoop",
        "the engine ended with exit code 1: MODEL is 'x': no such file or folder; restarted at least 2 times",
    ),
    "an engine that says nothing": (
        crashing_pod(exit_code=139, restarts=0),
        "CrashLoop",
        "the engine ended with exit code 139: it left no termination message: see its logs",
    ),
    "too little memory for the container": (
        crashing_pod(exit_code=137, reason="OOMKilled", restarts=120),
        "CrashLoop",
        "exit code 137 (OOMKilled): it took more memory than its limit: raise spec.resources.limits.memory; restarted "
        "at least 100 times",
    ),
    "an engine whose weights don't fit": (crashing_pod(message=CANT_FIT), "ModelDoesNotFit", CANT_FIT),
    "an engine that never got through its startup probe": (
        crashing_pod(exit_code=137, lasted=620),
        "StartupTimeout",
        "wasn't ready within its 600 s: raise spec.lifecycle.startupTimeoutSeconds",
    ),
    "an engine that its liveness probe stopped after a day": (
        crashing_pod(exit_code=0, reason="Completed", lasted=86400, restarts=1),
        "CrashLoop",
        "the engine ended with exit code 0: it was stopped, as a failed liveness probe does: see its logs",
    ),
    "loading": (loading_pod(), "ModelLoading", "it has 600 s"),
    "a startup probe that just went through": (
        pod(containerStatuses=[engine(started=True, state={"running": {"startedAt": ago(60)}})]),
        "ModelLoading",
        "loads the model",
    ),
    "a readiness probe that fails after it was well": (
        pod(
            conditions=[condition("Ready", "False", since=30)],
            containerStatuses=[engine(started=True, state={"running": {"startedAt": ago(250)}})],
        ),
        "NotReady",
        "readiness probe fails now",
    ),
    "a node that went silent": (
        pod(containerStatuses=[engine(ready=True, started=True, state={"running": {}})]),
        "NotReady",
        "does its node still report?",
    ),
    "creating": (creating_pod(), "PodsStarting", "its image is pulled"),
    "an init container at work": (
        pod(
            phase="Pending",
            initContainerStatuses=[{"name": "prepare", "ready": False, "state": {"running": {"startedAt": ago(9)}}}],
            containerStatuses=[engine(state={"waiting": {"reason": "PodInitializing"}})],
        ),
        "PodsStarting",
        "",
    ),
    "an init container that fails": (
        pod(
            phase="Pending",
            initContainerStatuses=[
                {
                    "name": "prepare",
                    "ready": False,
                    "state": {"terminated": {"exitCode": 2, "reason": "Error", "message": "no space left"}},
                }
            ],
            containerStatuses=[engine(state={"waiting": {"reason": "PodInitializing"}})],
        ),
        "CrashLoop",
        "container prepare ended with exit code 2: no space left",
    ),
    "a sidecar that fails beside a loading engine": (
        pod(
            containerStatuses=[
                {
                    "name": "shipper",
                    "ready": False,
                    "restartCount": 4,
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"exitCode": 3, "reason": "Error"}},
                },
                engine(state={"running": {"startedAt": ago(20)}}),
            ]
        ),
        "CrashLoop",
        "container shipper ended with exit code 3",
    ),
    "no free GPU": (
        unscheduled_pod(),
        "InsufficientGPU",
        "no node has 1 free NVIDIA-L4 (nvidia.com/gpu); the scheduler says: Insufficient nvidia.com/gpu; node(s) "
        "didn't match Pod's node affinity/selector.",
    ),
    "no free MIG slice": (
        unscheduled_pod(message="0/1 nodes are available: 1 Insufficient nvidia.com/mig-1g.10gb."),
        "InsufficientGPU",
        "(nvidia.com/mig-1g.10gb)",
    ),
    "no node of that product": (
        unscheduled_pod(message="0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
        "Unschedulable",
        "(spec.gpu pins the pods to NVIDIA-L4)",
    ),
    "a claim that is not bound": (
        unscheduled_pod(message="0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        "Unschedulable",
        "unbound immediate PersistentVolumeClaims",
    ),
    "a taint": (
        unscheduled_pod(message="0/2 nodes are available: 2 node(s) had untolerated taint {gpu: a, b: c}."),
        "Unschedulable",
        "untolerated taint {gpu: a, b: c}",
    ),
    "eviction": (
        pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        "PodFailed",
        "it ended for good (Evicted: The node was low on resource: memory.)",
    ),
    "a node's shutdown": (pod(phase="Failed", reason="NodeShutdown"), "PodFailed", "(NodeShutdown)"),
}


@pytest.mark.parametrize("world", SINGLE)
def test_one_pod_is_diagnosed_as(world: str) -> None:
    made, reason, detail = SINGLE[world]
    cause = examine(made, gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.reason == reason
    assert detail in cause.detail


def test_every_reason_is_one_that_a_condition_may_have() -> None:
    # The CRD's pattern of a reason is one word.
    assert all(reason.isalpha() for _, reason, _ in SINGLE.values())


def test_a_ready_pod_needs_no_cause() -> None:
    assert examine(ready_pod(), gpu=GPU, now=NOW) is None


@pytest.mark.parametrize("seen", ["back-off", "running"])
def test_all_moments_of_a_crash_loop_read_the_same(seen: str) -> None:
    told = examine(crashing_pod(message="out of luck", seen=seen), gpu=GPU, now=NOW)
    ended = examine(crashing_pod(message="out of luck", seen="ended"), gpu=GPU, now=NOW)
    assert told == ended


def test_restarts_are_told_in_steps() -> None:
    details = {examine(crashing_pod(restarts=count), gpu=GPU, now=NOW) for count in range(10, 20)}
    assert len(details) == 1


def test_node_counts_of_the_scheduler_do_not_change_the_message() -> None:
    few = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    many = "0/40 nodes are available: 40 Insufficient nvidia.com/gpu. preemption: 0/40 nodes are available."
    one, other = (examine(unscheduled_pod(message=message), gpu=GPU, now=NOW) for message in (few, many))
    assert one == other


def test_ports_that_change_with_every_try_are_left_out() -> None:
    messages = [f"lookup hub: read udp 10.0.0.9:{port}->10.96.0.10:53: i/o timeout" for port in (41111, 52222)]
    one, other = (examine(waiting_pod("ErrImagePull", message), gpu=GPU, now=NOW) for message in messages)
    assert one == other


def test_without_a_tuning_the_missing_resource_is_still_named() -> None:
    cause = examine(unscheduled_pod(), gpu=None, now=NOW)
    assert cause is not None
    assert cause.reason == "InsufficientGPU"
    assert "free nvidia.com/gpu" in cause.detail


def test_a_load_beyond_its_budget_is_late_and_the_next_look_was_due_then() -> None:
    loading = loading_pod(running_for=100)
    cause = examine(loading, gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.recheck is not None
    late = examine(loading, gpu=GPU, now=cause.recheck)
    assert late is not None
    assert late.reason == "StartupTimeout"


def test_a_pod_that_is_created_for_too_long_is_stuck() -> None:
    creating = creating_pod(born=100)
    cause = examine(creating, gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.recheck is not None
    stuck = examine(creating, gpu=GPU, now=cause.recheck)
    assert stuck is not None
    assert stuck.reason == "StartupTimeout"
    assert "kubectl describe pod" in stuck.detail


def test_an_engine_whose_restart_answers_again_is_ready() -> None:
    made = ready_pod()
    made["status"]["containerStatuses"][0]["lastState"] = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    assert examine(made, gpu=GPU, now=NOW) is None


def test_pods_that_are_being_deleted_neither_count_nor_trouble() -> None:
    found = survey_of(ready_pod("a", leaving=60), crashing_pod("b", leaving=60), ready_pod("c"))
    assert (found.ready, found.findings) == (1, ())


def test_failed_pods_are_forgotten_once_a_replacement_is_ready() -> None:
    evicted = pod("a", phase="Failed", reason="Evicted")
    assert survey_of(evicted, creating_pod("b")).trouble == "PodFailed"
    assert survey_of(evicted, ready_pod("b")).findings == ()


def test_pods_that_failed_long_ago_explain_nothing() -> None:
    evicted = pod("a", phase="Failed", reason="Evicted", born=7200)
    assert survey_of(evicted, loading_pod("b")).trouble == ""


def test_a_pod_that_failed_while_ready_does_not_count_as_ready() -> None:
    assert survey_of(ready_pod(phase="Failed")).ready == 0


def test_the_most_telling_trouble_comes_first() -> None:
    found = survey_of(
        unscheduled_pod("a"), crashing_pod("b"), waiting_pod("ErrImagePull", name="c"), loading_pod("d"), wanted=4
    )
    assert [finding.pod for finding in found.findings] == ["c", "b", "a", "d"]
    assert found.trouble == "ImagePullFailed"
    assert found.wait == "ModelLoading"


def test_each_draining_pod_excuses_one_that_waits_for_its_gpu() -> None:
    waiting = [unscheduled_pod(name, template="t2", born=10) for name in ("b", "c")]
    one = survey_of(ready_pod("a", leaving=60), *waiting, wanted=2)
    assert [finding.cause.reason for finding in one.findings] == ["InsufficientGPU", "WaitingForDrain"]
    both = survey_of(ready_pod("a", leaving=60), ready_pod("z", leaving=60), *waiting, wanted=2)
    assert both.trouble == ""


def test_a_pod_that_never_ends_its_drain_excuses_none_for_long() -> None:
    world = (ready_pod("a", leaving=60), unscheduled_pod("b"))
    (due,) = survey_of(*world).rechecks()
    assert due == NOW + timedelta(seconds=120)
    assert survey_of(*world, after=120).trouble == "InsufficientGPU"


def test_a_draining_pod_excuses_no_missing_node() -> None:
    homeless = unscheduled_pod("b", message="0/2 nodes are available: 2 node(s) didn't match Pod's node affinity.")
    assert survey_of(ready_pod("a", leaving=60), homeless).trouble == "Unschedulable"


def test_a_rollout_without_a_gpu_is_blocked_only_beside_pods_of_the_old_template() -> None:
    new = unscheduled_pod("b", template="t2", born=10)
    assert survey_of(ready_pod("a", template="t1"), new, updated=1).trouble == "RolloutBlocked"
    assert survey_of(new, updated=1).trouble == "InsufficientGPU"
    assert survey_of(ready_pod("a", template="t1"), new).trouble == "InsufficientGPU"


def test_during_a_rollout_the_newest_template_is_judged() -> None:
    old = [crashing_pod("a", template="t1", born=900), crashing_pod("a2", template="t1", born=5)]
    assert survey_of(*old, loading_pod("b", template="t2", born=10), updated=1).trouble == ""
    assert survey_of(*old, updated=1).trouble == "CrashLoop"


def test_during_a_rollback_the_older_template_is_judged_which_is_wanted_again() -> None:
    back = [ready_pod("a", template="t1", born=900), crashing_pod("c", template="t1", born=10)]
    assert survey_of(*back, ready_pod("b", template="t2", born=300), wanted=3, updated=2).trouble == "CrashLoop"


def test_the_names_in_a_story_are_few_and_sorted() -> None:
    found = survey_of(*(crashing_pod(name) for name in "edcba"), wanted=5)
    assert found.story("CrashLoop").startswith("pods a, b, c and 2 more: the engine ended")
    assert found.story("Unschedulable") == ""


GIB = 1 << 30
LLAMA_8B = CacheLayout.build(["full"] * 32, window=None, num_kv_heads=8, head_dim=128, block_size=32, dtype_bytes=2)
ROOMY = MemoryInputs(
    total=80 * GIB,
    max_memory_percent=0.9,
    weights=15 * GIB,
    activation_bytes_per_token=GIB / 2048,
    static_buffers=0,
    graphs=GIB,
    layout=LLAMA_8B,
    num_blocks=1024,
    max_batch_tokens=2048,
    max_model_len="auto",
    model_max_len=131072,
    max_num_seqs=256,
    device_type="cuda",
)
SHORTAGES = {
    "weights": {"weights": 73 * GIB},
    "no room for a cache": {"free": 16 * GIB + GIB // 4},
    "an explicit length": {"max_model_len": 65536},
}


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_the_engines_own_words_are_understood_for(shortage: str) -> None:
    with pytest.raises(MemoryPlanError) as refusal:
        plan_memory(replace(ROOMY, **SHORTAGES[shortage]))  # type: ignore[arg-type]
    cause = examine(crashing_pod(message=refusal.value.message), gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.reason == "ModelDoesNotFit"


def test_the_loaders_words_for_weights_beyond_the_device_are_understood() -> None:
    phrase = "don't fit into the memory"
    loader = find_spec("pagedserve_engine.model.loader")
    assert loader is not None
    assert loader.origin is not None
    assert phrase in Path(loader.origin).read_text()
    cause = examine(crashing_pod(message=f"the weights of m {phrase} of cuda:0"), gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.reason == "ModelDoesNotFit"


def test_a_device_that_failed_is_no_matter_of_size() -> None:
    cause = examine(crashing_pod(message="CUDA error: an illegal memory access was encountered"), gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.reason == "CrashLoop"


@pytest.mark.parametrize("end", [{"exit_code": 1}, {"exit_code": 137, "reason": "OOMKilled"}])
def test_an_engine_that_failed_by_itself_after_its_budget_was_not_too_slow(end: dict[str, Any]) -> None:
    cause = examine(crashing_pod(lasted=620, **end), gpu=GPU, now=NOW)
    assert cause is not None
    assert cause.reason == "CrashLoop"
