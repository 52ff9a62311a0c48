from __future__ import annotations

import copy

import pytest

from children import FakeServer, cpu_tuning, gpu_tuning, service
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.errors import NameTaken
from pagedserve_operator.kinds import CHILDREN, KEDA_AUTOSCALER, OPTIONAL
from pagedserve_operator.names import MANAGER, REPLICAS_MANAGER
from pagedserve_operator.plan import Plan, plan
from pagedserve_operator.spec import Json

KEYS = child_keys("chat")
DEPLOYMENT = ("Deployment", "chat")
AUTOSCALER = ("HorizontalPodAutoscaler", "chat")
EVERYTHING = {
    "autoscaling": {},
    "model": {"uri": "hf://example/model-8b", "chatTemplate": "{{ messages }}"},
    "cache": {"newClaim": {"size": "50Gi", "storageClassName": "shared"}},
    "networkPolicy": {"enabled": True},
    "monitoring": {"serviceMonitor": True},
}
BY_KEDA = {**EVERYTHING, "autoscaling": {"backend": "KEDA"}}
MADE = tuple(kind for kind in CHILDREN if kind != KEDA_AUTOSCALER)
"""Of EVERYTHING."""


def planned(server: FakeServer, spec: Json | None = None, **metadata: str) -> Plan:
    owner = service(spec, **metadata)
    children = desired(owner, gpu_tuning(), Facts(served_kinds=OPTIONAL))
    return plan(owner, children, server.observe(KEYS))


def settled(spec: Json | None = None) -> FakeServer:
    server = FakeServer()
    settle(server, spec)
    return server


def settle(server: FakeServer, spec: Json | None = None) -> list[Plan]:
    plans = []
    while not (next_plan := planned(server, spec)).empty:
        server.execute(next_plan)
        plans.append(next_plan)
        assert len(plans) < 5, "no end"
    return plans


def replicas_applied(plans: list[Plan]) -> list[int]:
    return [
        apply.manifest["spec"]["replicas"]
        for each in plans
        for apply in each.applies
        if apply.manager == REPLICAS_MANAGER
    ]


def test_every_kind_of_child_is_made_and_then_left_alone():
    server = settled(EVERYTHING)
    assert {kind for kind, _ in server.objects} == set(MADE)
    assert planned(server, EVERYTHING).empty
    assert planned(server, EVERYTHING).summary == "nothing to do"


def test_what_is_off_makes_no_comparison_differ():
    # B3: a feature that is off but has a default must not look like a difference.
    server = settled({"networkPolicy": {"enabled": False, "allowFrom": []}, "disruption": {"enabled": False}})
    assert ("NetworkPolicy", "chat") not in server.objects
    assert ("PodDisruptionBudget", "chat") not in server.objects


def test_files_are_there_before_the_pods_and_the_count_before_the_autoscaler():
    kinds = [apply.key[0] for apply in planned(FakeServer(), EVERYTHING).applies]
    assert kinds[:6] == [
        "ConfigMap",
        "PersistentVolumeClaim",
        "Service",
        "Deployment",
        "Deployment",
        "HorizontalPodAutoscaler",
    ]


@pytest.mark.parametrize("kind", MADE)
def test_a_child_that_was_deleted_comes_back(kind: str):
    server = settled(EVERYTHING)
    key = next(key for key in KEYS if key[0] == kind)
    del server.objects[key]
    assert planned(server, EVERYTHING).applies[0].key == key
    settle(server, EVERYTHING)
    assert key in server.objects


@pytest.mark.parametrize(("before", "after"), [(EVERYTHING, BY_KEDA), (BY_KEDA, EVERYTHING)], ids=["to KEDA", "back"])
def test_one_autoscaler_is_gone_before_the_other_is_made_and_the_count_stays(before: Json, after: Json):
    server = settled(before)
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 6
    scalers = {AUTOSCALER, (KEDA_AUTOSCALER, "chat")}
    seen = []
    while not (following := planned(server, after)).empty or following.waiting:
        assert DEPLOYMENT not in {apply.key for apply in following.applies}
        server.execute(following)
        seen.append(len(scalers & set(server.objects)))
        assert len(seen) < 5, "no end"
    assert seen == [0, 1]
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 6


def test_an_autoscaler_waits_for_what_keda_has_to_let_go_of():
    server = settled(BY_KEDA)
    leaving = server.objects[KEDA_AUTOSCALER, "chat"]["metadata"]
    leaving["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    held = planned(server, EVERYTHING)
    assert held.empty
    assert held.waiting == (f"{KEDA_AUTOSCALER} chat",)


def test_only_replicas_follow_an_apply_of_the_same_plan():
    first = planned(FakeServer())
    assert [apply.manager for apply in first.applies if apply.follows] == [REPLICAS_MANAGER]


@pytest.mark.parametrize(("count", "managers"), [(1, [REPLICAS_MANAGER, MANAGER]), (5, [MANAGER, REPLICAS_MANAGER])])
def test_fewer_replicas_are_written_before_a_new_template_and_more_after_it(count: int, managers: list[str]):
    server = settled({"replicas": 3})
    changed = planned(server, {"replicas": count, "env": [{"name": "ATTENTION", "value": "reference"}]})
    assert [apply.manager for apply in changed.applies] == managers
    assert [apply.follows for apply in changed.applies] == [False, count > 3]


def test_an_apply_says_which_field_it_is_for():
    server = settled()
    server.objects[DEPLOYMENT]["spec"]["progressDeadlineSeconds"] = 1
    (apply,) = planned(server).applies
    assert apply.why == "spec.progressDeadlineSeconds"


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ({}, 1),
        ({"replicas": 3}, 3),
        ({"replicas": 0}, 0),
        ({"autoscaling": {}}, 2),
        ({"autoscaling": {"minReplicas": 4}}, 4),
    ],
)
def test_replicas_are_set_once_at_creation(spec: Json, count: int):
    server = FakeServer()
    assert replicas_applied(settle(server, spec)) == [count]
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == count


def test_the_operator_never_fights_the_autoscaler_over_replicas():
    # A1, A2: neither a resync nor an update touches the count while autoscaling.
    server = settled({"autoscaling": {}})
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 7
    assert planned(server, {"autoscaling": {}}).empty
    plans = settle(server, {"autoscaling": {}, "limits": {"maxQueue": 7}})
    assert replicas_applied(plans) == []
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 7


def test_the_manager_of_everything_else_never_owns_replicas():
    for spec in ({}, {"replicas": 3}, {"autoscaling": {}}):
        for apply in planned(FakeServer(), spec).applies:
            assert (apply.manager == REPLICAS_MANAGER) == ("replicas" in apply.manifest.get("spec", {}))


def test_turning_autoscaling_on_and_off_and_on_never_resets_replicas():
    # A2, A3, B8.
    server = settled({"replicas": 5})
    assert replicas_applied(settle(server, {"autoscaling": {}})) == []
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 8
    assert replicas_applied(settle(server)) == []
    assert AUTOSCALER not in server.objects
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 8
    assert replicas_applied(settle(server, {"autoscaling": {}})) == []
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 8


def test_a_late_write_of_the_autoscaler_is_corrected():
    # B8: the autoscaler may still write once after its deletion.
    server = settled({"autoscaling": {}})
    off = planned(server, {"replicas": 3})
    assert [delete.kind for delete in off.deletes] == ["HorizontalPodAutoscaler"]
    server.execute(off)
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 9
    assert replicas_applied(settle(server, {"replicas": 3})) == [3]
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 3


def test_a_fixed_count_that_was_scaled_by_hand_is_put_back():
    server = settled({"replicas": 3})
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 1
    assert replicas_applied(settle(server, {"replicas": 3})) == [3]


def test_without_a_stated_count_scaling_the_deployment_by_hand_holds():
    server = settled()
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 4
    assert planned(server).empty


@pytest.mark.parametrize("kind", ["HorizontalPodAutoscaler", "NetworkPolicy", "ServiceMonitor", "ConfigMap"])
def test_a_child_that_is_no_longer_asked_for_goes(kind: str):
    server = settled(EVERYTHING)
    settle(server)
    assert kind not in {key[0] for key in server.objects}


def test_only_the_very_object_is_deleted():
    server = settled(EVERYTHING)
    uid = server.objects[AUTOSCALER]["metadata"]["uid"]
    (delete,) = (delete for delete in planned(server).deletes if delete.kind == "HorizontalPodAutoscaler")
    assert delete.uid == uid


def test_what_pods_mount_goes_only_after_the_deployment_has_let_go_of_it():
    server = settled(EVERYTHING)
    first, second = settle(server)
    assert DEPLOYMENT in {apply.key for apply in first.applies}
    assert {"ConfigMap", "PersistentVolumeClaim"}.isdisjoint({delete.kind for delete in first.deletes})
    assert {delete.kind for delete in second.deletes} == {"ConfigMap", "PersistentVolumeClaim"}


def test_an_object_of_somebody_else_is_neither_changed_nor_pruned():
    server = settled()
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "chat-chat-template", "uid": "x"}}
    server.objects["ConfigMap", "chat-chat-template"] = foreign
    assert planned(server).empty
    with pytest.raises(NameTaken, match="ConfigMap chat-chat-template exists and isn't this resource's"):
        planned(server, EVERYTHING)


def test_the_owner_of_a_taken_name_is_told():
    server = FakeServer()
    reference = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "y", "controller": True}
    server.objects["Service", "chat"] = {
        "kind": "Service",
        "metadata": {"name": "chat", "uid": "x", "ownerReferences": [reference]},
    }
    with pytest.raises(NameTaken, match="it belongs to ReplicaSet web"):
        planned(server)


def test_children_of_an_earlier_resource_of_the_same_name_are_waited_for():
    server = settled()
    again = planned(server, uid="another")
    assert "Deployment chat" in again.waiting
    assert again.empty


def test_a_child_that_is_being_deleted_is_waited_for():
    server = settled({"replicas": 2})
    server.objects[DEPLOYMENT]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    server.objects[DEPLOYMENT]["spec"]["replicas"] = 0
    found = planned(server, {"replicas": 2})
    assert found.empty
    assert found.waiting == ("Deployment chat",)


def test_a_pruned_child_that_is_on_its_way_out_is_not_deleted_again():
    server = settled({"autoscaling": {}})
    server.objects[AUTOSCALER]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert planned(server).empty


def test_children_that_nobody_owns_any_more_are_adopted():
    # kubectl delete --cascade=orphan, then the same resource again; or the reference was removed by hand.
    server = settled()
    for found in server.objects.values():
        del found["metadata"]["ownerReferences"]
        for entry in found["metadata"]["managedFields"]:
            entry["fieldsV1"].get("f:metadata", {}).pop("f:ownerReferences", None)
    settle(server)
    assert all(found["metadata"]["ownerReferences"] for found in server.objects.values())


def test_an_existing_claim_only_grows():
    server = settled({"cache": {"newClaim": {"size": "50Gi"}}})
    found = server.objects["PersistentVolumeClaim", "chat-model-cache"]
    found["spec"] |= {"storageClassName": "standard", "volumeName": "pv-1"}
    smaller = {"cache": {"newClaim": {"size": "10Gi", "storageClassName": "fast", "accessMode": "ReadWriteOnce"}}}
    settle(server, smaller)
    asked = planned(server, smaller)
    assert [note.split(":")[0] for note in asked.notes] == [
        "spec.cache.newClaim.accessMode",
        "spec.cache.newClaim.storageClassName",
        "spec.cache.newClaim.size",
    ]
    assert found["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "standard",
        "volumeName": "pv-1",
        "resources": {"requests": {"storage": "50Gi"}},
    }
    settle(server, {"cache": {"newClaim": {"size": "60Gi"}}})
    assert found["spec"]["resources"]["requests"]["storage"] == "60Gi"
    assert found["spec"]["storageClassName"] == "standard"


def test_an_autoscaler_is_written_once():
    # B9.
    server = settled({"autoscaling": {}})
    before = copy.deepcopy(server.objects[AUTOSCALER])
    settle(server, {"autoscaling": {}})
    assert server.objects[AUTOSCALER] == before


def test_changing_the_model_length_rolls_out():
    # B5.
    server = settled()
    (apply,) = planned(server, {"model": {"uri": "hf://example/model-8b", "maxModelLen": 4096}}).applies
    assert apply.key == DEPLOYMENT
    assert "env[MAX_MODEL_LEN]" in apply.why


def test_labels_of_the_resource_reach_no_selector():
    # A22, B2: two fixed labels for ever.
    server = settled({"podTemplate": {"labels": {"team": "a"}}})
    selector = copy.deepcopy(server.objects[DEPLOYMENT]["spec"]["selector"])
    settle(server, {"podTemplate": {"labels": {"team": "b"}}})
    assert server.objects[DEPLOYMENT]["spec"]["selector"] == selector
    assert server.objects[DEPLOYMENT]["spec"]["template"]["metadata"]["labels"]["team"] == "b"


def test_nothing_is_planned_for_kinds_that_the_cluster_lacks():
    owner = service(EVERYTHING)
    children = desired(owner, cpu_tuning(), Facts())
    found = plan(owner, children, dict.fromkeys(child_keys("chat", frozenset())))
    assert OPTIONAL.isdisjoint({apply.key[0] for apply in found.applies})
    assert all(apply.manager in (MANAGER, REPLICAS_MANAGER) for apply in found.applies)


@pytest.mark.parametrize(("spec", "count"), [({"replicas": 3}, 3), ({"autoscaling": {"minReplicas": 4}}, 4)])
def test_an_operator_that_died_before_it_set_the_count_sets_it_later(spec: Json, count: int):
    server = FakeServer()
    first = planned(server, spec)
    server.execute(Plan(applies=tuple(apply for apply in first.applies if apply.manager == MANAGER)))
    assert server.objects[DEPLOYMENT]["spec"]["replicas"] == 1
    assert replicas_applied(settle(server, spec)) == [count]


def test_a_service_whose_port_was_edited_by_hand_is_made_anew():
    # The edited port is another's, and two ports can't share a name.
    server = settled()
    found = server.objects["Service", "chat"]
    found["spec"]["ports"][0]["port"] = 8000
    ours = found["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"]["f:ports"]
    theirs = {"k:" + '{"port":8000,"protocol":"TCP"}': ours.popitem()[1]}
    entry = {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:ports": theirs}}}
    found["metadata"]["managedFields"].append(entry)
    assert [delete.kind for delete in planned(server).deletes] == ["Service"]
    settle(server)
    assert [row["port"] for row in server.objects["Service", "chat"]["spec"]["ports"]] == [80]


def test_another_port_beside_ours_survives():
    server = settled()
    found = server.objects["Service", "chat"]
    found["spec"]["ports"].append({"name": "theirs", "port": 9000, "protocol": "TCP"})
    theirs = {"k:" + '{"port":9000,"protocol":"TCP"}': {".": {}, "f:name": {}}}
    entry = {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:ports": theirs}}}
    found["metadata"]["managedFields"].append(entry)
    assert planned(server).empty
