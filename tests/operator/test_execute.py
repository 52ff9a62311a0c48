"""Writes go in the plan's order, on what they were planned on, and one that is refused keeps no other back."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from children import gpu_tuning, service
from pagedserve_operator.cluster import Cluster
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.errors import ChildRejected, Conflict, Rejected, Unavailable
from pagedserve_operator.execute import Children, execute
from pagedserve_operator.names import Key
from pagedserve_operator.plan import ChildKey, Plan, plan

Json = dict[str, Any]
KEY = Key("models", "chat")
DEPLOYMENT = ("Deployment", "chat")
POLICY = ("NetworkPolicy", "chat")


class Server:
    """Takes writes of a plan, but for those in ``refusals``; notes each with the version that it was planned on."""

    def __init__(self, refusals: dict[ChildKey, Exception] | None = None) -> None:
        self.refusals = refusals or {}
        self.writes: list[tuple[str, ChildKey, Json | None]] = []

    async def apply(self, manifest: Json, *, manager: str, planned_on: Json | None) -> Json:
        key = (manifest["kind"], manifest["metadata"]["name"])
        return self._write("apply", key, planned_on and planned_on["metadata"], manifest)

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        self._write("delete", (kind, name), {"uid": uid}, {})

    def _write(self, verb: str, key: ChildKey, planned_on: Json | None, manifest: Json) -> Json:
        self.writes.append((verb, key, planned_on))
        if key in self.refusals:
            raise self.refusals[key]
        spec = {"replicas": 1, **manifest.get("spec", {})} if key[0] == "Deployment" else manifest.get("spec")
        metadata = {**manifest.get("metadata", {}), "uid": "made", "resourceVersion": str(len(self.writes))}
        return {**manifest, "metadata": metadata, "spec": spec}


def carried_out(server: Server, made: Plan, children: Children) -> tuple[Children, ChildRejected | None]:
    return asyncio.run(execute(cast(Cluster, server), KEY, made, children))


def planned(spec: Json, children: Children | None = None) -> tuple[Plan, Children]:
    owner = service(spec)
    there = {**dict.fromkeys(child_keys("chat")), **(children or {})}
    return plan(owner, desired(owner, gpu_tuning(), Facts()), there), there


def old_policy() -> Json:
    metadata = {"uid": "old", "resourceVersion": "7", "ownerReferences": [service().owner.reference()]}
    return {"kind": "NetworkPolicy", "metadata": metadata}


def test_a_creation_is_followed_by_the_count_on_the_very_object_that_was_made() -> None:
    server = Server()
    left, refused = carried_out(server, *planned({"replicas": 3}))
    writes = [planned_on for _, key, planned_on in server.writes if key == DEPLOYMENT]
    assert (writes, refused) == ([None, {"uid": "made"}], None)
    assert left[DEPLOYMENT] is not None


def test_a_count_that_the_server_has_given_already_is_not_written() -> None:
    server = Server()
    carried_out(server, *planned({"replicas": 1}))
    assert [key for _, key, _ in server.writes].count(DEPLOYMENT) == 1


def test_a_refused_child_keeps_no_other_back_and_is_told_once_with_the_servers_words() -> None:
    server = Server({DEPLOYMENT: Rejected("exceeded quota", status=403)})
    left, refused = carried_out(server, *planned({"replicas": 3, "autoscaling": None}))
    assert str(refused) == "the API server refused Deployment chat: exceeded quota"
    assert [key for _, key, _ in server.writes].count(DEPLOYMENT) == 1
    assert left[DEPLOYMENT] is None
    assert left["PodDisruptionBudget", "chat"] is not None


def test_a_refused_deletion_keeps_no_child_back_and_is_told() -> None:
    server = Server({POLICY: Rejected("policy forbids it", status=403)})
    left, refused = carried_out(server, *planned({}, {POLICY: old_policy()}))
    assert server.writes[0] == ("delete", POLICY, {"uid": "old"})
    assert str(refused) == "the API server refused to delete NetworkPolicy chat: policy forbids it"
    assert left[POLICY] == old_policy()
    assert left[DEPLOYMENT] is not None


@pytest.mark.parametrize("error", [Conflict("moved", status=409), Unavailable("busy", status=503)])
def test_what_may_pass_at_the_next_look_ends_this_one(error: Exception) -> None:
    server = Server({("Service", "chat"): error})
    with pytest.raises(type(error)):
        carried_out(server, *planned({}))
    assert DEPLOYMENT not in [key for _, key, _ in server.writes]
