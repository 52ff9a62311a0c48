from __future__ import annotations

import json
from pathlib import Path

import pytest

from children import cpu_tuning, gpu_tuning, service
from pagedserve_operator.desired import (
    Facts,
    decide_rollout,
    desired,
    grace_seconds,
    needs_free_gpus,
    pod_template,
    startup_budget_seconds,
    template_hash,
)
from pagedserve_operator.desired.environment import RESERVED
from pagedserve_operator.desired.resources import memory_request_mib
from pagedserve_operator.engine_metrics import ENGINE_METRICS
from pagedserve_operator.errors import SpecError, UnsupportedModelURI
from pagedserve_operator.fields import quantity
from pagedserve_operator.kinds import OPTIONAL
from pagedserve_operator.spec import Json
from pagedserve_operator.tuning import Tuning

GOLDEN = Path(__file__).parents[1] / "golden/operator/pod_templates.json"
HUB = {"uri": "hf://example/model-8b"}
GOLDEN_SPECS: dict[str, tuple[Json, Tuning, Facts]] = {
    "a model from the hub on a GPU": ({}, gpu_tuning(), Facts()),
    "two GPUs, keys, token, template": (
        {
            "model": {**HUB, "chatTemplate": "{{ messages }}", "maxModelLen": 4096, "servedName": "chat"},
            "gpu": {"count": 2, "nodeSelector": {"pool": "gpu"}},
            "auth": {"apiKeysSecretRef": {"name": "keys"}, "hfTokenSecretRef": {"name": "hub"}},
            "env": [{"name": "LOG_LEVEL", "value": "debug"}],
        },
        gpu_tuning(count=2),
        Facts(secrets_hash="0123456789abcdef"),
    ),
    "a small model on a CPU": ({"gpu": {"type": "cpu"}, "replicas": 2}, cpu_tuning(), Facts()),
    "a model on a claim with a sidecar": (
        {
            "model": {"uri": "pvc://weights/llama"},
            "cache": {"newClaim": {"size": "10Gi"}},
            "podTemplate": {"sidecars": [{"name": "proxy", "image": "example/proxy:1"}], "labels": {"team": "a"}},
        },
        gpu_tuning(),
        Facts(),
    ),
}


def template(spec: Json | None = None, tuning: Tuning | None = None, facts: Facts | None = None) -> Json:
    return pod_template(service(spec), tuning or gpu_tuning(), facts or Facts())


def engine(spec: Json | None = None, tuning: Tuning | None = None) -> Json:
    found: Json = template(spec, tuning)["spec"]["containers"][0]
    return found


def environment(spec: Json | None = None, tuning: Tuning | None = None) -> dict[str, str]:
    return {row["name"]: row.get("value", "") for row in engine(spec, tuning)["env"]}


def child(kind: str, spec: Json | None = None, tuning: Tuning | None = None, facts: Facts | None = None) -> Json:
    facts = facts or Facts(served_kinds=OPTIONAL)
    return next(row for row in desired(service(spec), tuning or gpu_tuning(), facts) if row["kind"] == kind)


@pytest.mark.parametrize("name", GOLDEN_SPECS)
def test_a_new_operator_rolls_no_running_pod(name: str):
    # A5. A change here restarts every model at the operator's upgrade: think twice before the golden file follows.
    spec, tuning, facts = GOLDEN_SPECS[name]
    found = pod_template(service(spec), tuning, facts)
    golden = json.loads(GOLDEN.read_text())[name]
    assert found == golden["template"]
    assert template_hash(found) == golden["hash"]


@pytest.mark.parametrize(
    ("now", "facts"),
    [
        ({"autoscaling": {}}, Facts()),
        ({"replicas": 7}, Facts()),
        ({"monitoring": {"podMonitor": False}}, Facts(served_kinds=OPTIONAL)),
        ({"rollout": {"strategy": "Surge"}}, Facts(surge=1)),
        ({"service": {"port": 8000}, "networkPolicy": {"enabled": True}}, Facts()),
    ],
    ids=["autoscaling", "replicas", "monitoring", "rollout", "service"],
)
def test_what_is_beside_the_pods_rolls_none(now: Json, facts: Facts):
    assert template(now, facts=facts) == template()


def test_secrets_and_the_chat_template_roll_the_pods_but_api_keys_do_not():
    assert template(facts=Facts(secrets_hash="a")) != template(facts=Facts(secrets_hash="b"))
    one, other = ({"model": {**HUB, "chatTemplate": text}} for text in ("a", "b"))
    assert template(one) != template(other)
    keys = template({"auth": {"apiKeysSecretRef": {"name": "keys"}}})
    assert "annotations" not in keys["metadata"]


def test_secrets_are_mounted_as_folders_so_that_a_rotation_reaches_the_engine():
    spec = {"auth": {"apiKeysSecretRef": {"name": "keys", "key": "all"}, "hfTokenSecretRef": {"name": "hub"}}}
    assert environment(spec)["API_KEY_FILE"] == "/etc/pagedserve/api-keys/api-keys"
    assert environment(spec)["HF_TOKEN_FILE"] == "/etc/pagedserve/hf-token/token"
    assert all("subPath" not in mount for mount in engine(spec)["volumeMounts"])
    (volume,) = (row for row in template(spec)["spec"]["volumes"] if row["name"] == "api-keys")
    assert volume["secret"]["items"] == [{"key": "all", "path": "api-keys"}]


def test_only_a_stated_length_is_passed_because_the_engine_ends_where_it_does_not_fit():
    assert "MAX_MODEL_LEN" not in environment()
    assert environment({"model": {**HUB, "maxModelLen": 4096}})["MAX_MODEL_LEN"] == "4096"


def test_what_was_decided_is_passed_to_the_engine():
    found = environment({"tuning": {"safetyMargin": 0.1}, "limits": {"requestTimeoutSeconds": 30}})
    expected = {
        "MODEL": "hf://example/model-8b",
        "DTYPE": "bfloat16",
        "NUM_BLOCKS": "716",
        "MAX_BATCH_TOKENS": "2048",
        "BLOCK_SIZE": "32",
        "SAFETY_MARGIN": "0.1",
        "USE_CUDA_GRAPH": "true",
        "TENSOR_PARALLEL_SIZE": "1",
        "REQUEST_TIMEOUT_SECONDS": "30",
        "DRAIN_SECONDS": "120",
        "LOG_FORMAT": "json",
    }
    assert expected.items() <= found.items()
    assert environment(tuning=cpu_tuning())["DEVICE"] == "cpu"


@pytest.mark.parametrize("name", RESERVED)
def test_env_may_not_contradict_a_field(name: str):
    with pytest.raises(SpecError, match=rf"spec\.env\[0\]: {name} is the operator's: set spec\."):
        template({"env": [{"name": name, "value": "1"}]})


def test_env_comes_last_and_replaces_what_has_no_field():
    rows = engine({"env": [{"name": "LOG_FORMAT", "value": "text"}, {"name": "A", "value": "b"}]})["env"]
    assert rows[-2:] == [{"name": "LOG_FORMAT", "value": "text"}, {"name": "A", "value": "b"}]
    assert len({row["name"] for row in rows}) == len(rows)
    with pytest.raises(SpecError, match=r"spec\.env\[1\]: A is there twice"):
        template({"env": [{"name": "A", "value": "b"}, {"name": "A", "value": "c"}]})


@pytest.mark.parametrize(
    ("uri", "model", "claim"),
    [
        ("hf://a/b", "hf://a/b", None),
        ("random:///models/config.json", "random:///models/config.json", None),
        ("/models/a.gguf", "/models/a.gguf", None),
        ("pvc://weights", "/models", "weights"),
        ("pvc://weights/a//b/", "/models/a/b", "weights"),
    ],
)
def test_the_model_is_found_where_its_uri_says(uri: str, model: str, claim: str | None):
    spec = {"model": {"uri": uri}}
    assert environment(spec)["MODEL"] == model
    claims = [row["persistentVolumeClaim"] for row in template(spec)["spec"]["volumes"] if row["name"] == "models"]
    assert claims == ([{"claimName": claim, "readOnly": True}] if claim else [])


@pytest.mark.parametrize("uri", ["s3://bucket/model", "https://example.com/model", "oci://registry/model"])
def test_a_scheme_that_nothing_reads_is_refused(uri: str):
    with pytest.raises(UnsupportedModelURI, match=r"spec\.model\.uri: .* isn't supported: write hf://"):
        template({"model": {"uri": uri}})


@pytest.mark.parametrize("uri", ["pvc://", "pvc://Upper/a", "pvc://weights/../../etc"])
def test_a_claim_must_be_named_and_not_left(uri: str):
    with pytest.raises(SpecError, match=r"spec\.model\.uri: .* write pvc://claim/path"):
        template({"model": {"uri": uri}})


def test_names_and_paths_that_are_taken_are_refused():
    with pytest.raises(SpecError, match=r"spec\.podTemplate\.volumes\[0\]\.name: 'tmp' is taken"):
        template({"podTemplate": {"volumes": [{"name": "tmp", "emptyDir": {}}]}})
    mount = {"name": "a", "mountPath": "/dev/shm"}
    with pytest.raises(SpecError, match=r"spec\.podTemplate\.volumeMounts\[0\]\.mountPath: '/dev/shm' is taken"):
        template({"podTemplate": {"volumes": [{"name": "a", "emptyDir": {}}], "volumeMounts": [mount]}})


def test_liveness_waits_for_a_model_that_loads():
    # A8: the startup probe's budget follows the weights, and liveness begins only after it.
    for weights, seconds in ((500, 300), (15_300, 580), (140_000, 4320)):
        found = engine(tuning=gpu_tuning(weights_mib=weights))
        startup = found["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] == seconds
        assert startup["httpGet"]["path"] == found["readinessProbe"]["httpGet"]["path"] == "/health/ready"
        assert found["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_the_progress_deadline_lies_beyond_the_startup_budget():
    # A9.
    for lifecycle in ({}, {"startupTimeoutSeconds": 7200}):
        owner = service({"lifecycle": lifecycle})
        budget = startup_budget_seconds(15_300, owner.spec.lifecycle)
        deployment = child("Deployment", {"lifecycle": lifecycle})
        assert deployment["spec"]["progressDeadlineSeconds"] > budget


def test_the_grace_period_outlasts_pre_stop_and_drain():
    # A7.
    lifecycle = {"preStopSeconds": 20, "drainSeconds": 600}
    pod = template({"lifecycle": lifecycle})["spec"]
    assert pod["terminationGracePeriodSeconds"] == grace_seconds(service({"lifecycle": lifecycle}).spec.lifecycle) > 620
    assert pod["containers"][0]["lifecycle"] == {"preStop": {"sleep": {"seconds": 20}}}
    assert "lifecycle" not in engine({"lifecycle": {"preStopSeconds": 0}})


@pytest.mark.parametrize("tuning", [gpu_tuning(), gpu_tuning(count=4), cpu_tuning()], ids=["GPU", "4 GPUs", "CPU"])
def test_memory_that_is_flat_never_holds_replicas_up(tuning: Tuning):
    # ceil(2 · use ÷ target) must be able to come down to 1.
    parts = tuning.sizing.breakdown
    flat = parts.total - parts.left_over if tuning.gpu.is_cpu else 3072 * tuning.gpu.count
    assert 2 * flat / memory_request_mib(tuning) / 0.8 <= 1


def test_resources_of_the_user_win_and_no_request_exceeds_its_limit():
    spec = {"resources": {"requests": {"cpu": "500m"}, "limits": {"memory": "2Gi"}}}
    found = engine(spec)["resources"]
    assert found["requests"]["cpu"] == "500m"
    assert quantity(found["requests"]["memory"]) == quantity(found["limits"]["memory"]) == 2 << 30
    assert found["limits"]["nvidia.com/gpu"] == "1"


def test_pods_are_pinned_to_the_gpu_that_they_are_sized_for():
    pod = template()["spec"]
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    expression = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-L4"]}
    assert required == {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    # B1: no affinity and no tolerations on a CPU.
    assert {"affinity", "tolerations"}.isdisjoint(template(tuning=cpu_tuning())["spec"])


def test_sidecars_outlive_the_engine():
    pod = template({"podTemplate": {"sidecars": [{"name": "proxy", "image": "example/proxy:1"}]}})["spec"]
    assert pod["initContainers"][0]["restartPolicy"] == "Always"
    assert [container["name"] for container in pod["containers"]] == ["engine"]


@pytest.mark.parametrize(
    ("spec", "tuning", "free", "surge"),
    [
        ({}, gpu_tuning(), 0, 0),
        ({}, gpu_tuning(), 1, 1),
        ({}, gpu_tuning(count=2), 1, 0),
        ({}, cpu_tuning(), 0, 1),
        ({"rollout": {"strategy": "Surge"}}, gpu_tuning(), 0, 1),
        ({"rollout": {"strategy": "InPlace"}}, cpu_tuning(), 0, 0),
        ({"rollout": {"strategy": "Recreate"}}, cpu_tuning(), 0, None),
        ({"cache": {"newClaim": {"size": "1Gi", "accessMode": "ReadWriteOnce"}}}, cpu_tuning(), 0, 0),
    ],
)
def test_a_rollout_never_waits_for_a_gpu_that_is_not_there(spec: Json, tuning: Tuning, free: int, surge: int | None):
    # A4.
    running: Json = {"metadata": {"annotations": {}}}
    assert decide_rollout(service(spec), tuning, Facts(), deployment=running, free_gpus=free) == surge
    strategy = child("Deployment", spec, tuning, Facts(surge=surge))["spec"]["strategy"]
    limits = strategy.get("rollingUpdate", {"maxSurge": 0, "maxUnavailable": 1})
    assert limits["maxSurge"] + limits["maxUnavailable"] == 1


def test_a_decision_stays_with_its_template():
    # The GPU that was free is taken by the very pod that it was meant for.
    running = child("Deployment", facts=Facts(surge=1))
    same, other = service(), service({"limits": {"maxQueue": 7}})
    assert not needs_free_gpus(same, gpu_tuning(), Facts(), deployment=running)
    assert decide_rollout(same, gpu_tuning(), Facts(), deployment=running, free_gpus=0) == 1
    assert needs_free_gpus(other, gpu_tuning(), Facts(), deployment=running)
    assert decide_rollout(other, gpu_tuning(), Facts(), deployment=running, free_gpus=0) == 0


def test_a_spare_pod_that_finds_no_place_is_given_up():
    running = child("Deployment", facts=Facts(surge=1))
    assert decide_rollout(service(), gpu_tuning(), Facts(), deployment=running, blocked=True) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"surge":"1","template":"x"}', '{"surge":null}'])
def test_an_unreadable_decision_is_made_again(text: str):
    running: Json = {"metadata": {"annotations": {"pagedserve.dev/rollout": text}}}
    assert decide_rollout(service(), gpu_tuning(), Facts(), deployment=running, free_gpus=1) == 1


def test_autoscaling_is_quick_up_and_slow_down_by_default():
    spec = child("HorizontalPodAutoscaler", {"autoscaling": {}})["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
    targets = {row["containerResource"]["name"]: row["containerResource"]["target"] for row in spec["metrics"]}
    assert {name: target["averageUtilization"] for name, target in targets.items()} == {"cpu": 70, "memory": 80}
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    assert (up["stabilizationWindowSeconds"], down["stabilizationWindowSeconds"]) == (60, 300)
    assert up["policies"] == [{"type": "Percent", "value": 100, "periodSeconds": 60}]
    assert down["policies"] == [{"type": "Percent", "value": 50, "periodSeconds": 60}]


def test_engine_metrics_scale_by_the_names_that_the_engine_exports():
    documented = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    rows = [{"name": name} for name in ENGINE_METRICS]
    for metric in child("HorizontalPodAutoscaler", {"autoscaling": {"metrics": rows}})["spec"]["metrics"]:
        assert f"`{metric['pods']['metric']['name']}`" in documented
    with pytest.raises(SpecError, match=r"spec\.autoscaling\.metrics\[0\]\.name: 'gpu' is no metric"):
        child("HorizontalPodAutoscaler", {"autoscaling": {"metrics": [{"name": "gpu"}]}})


def test_every_child_has_its_labels_and_its_owner():
    spec = {"autoscaling": {}, "networkPolicy": {"enabled": True}, "monitoring": {"serviceMonitor": True}}
    for row in desired(service(spec), gpu_tuning(), Facts(served_kinds=OPTIONAL)):
        assert row["metadata"]["labels"]["app.kubernetes.io/instance"] == "chat"
        assert [reference["name"] for reference in row["metadata"]["ownerReferences"]] == ["chat"]


def test_nobody_else_may_connect_unless_named():
    (rule,) = child("NetworkPolicy", {"networkPolicy": {"enabled": True}})["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {}}]


def test_an_operator_that_reads_metrics_may_connect_to_guarded_engines():
    facts = Facts(metrics_reader="pagedserve-system")
    (rule,) = child("NetworkPolicy", {"networkPolicy": {"enabled": True}}, facts=facts)["spec"]["ingress"]
    assert rule["from"] == [
        {"podSelector": {}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "pagedserve-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "pagedserve-operator"}},
        },
    ]


def test_pods_need_no_privilege():
    pod = template()["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_equal_inputs_give_equal_children():
    assert desired(service(), gpu_tuning(), Facts()) == desired(service(), gpu_tuning(), Facts())
