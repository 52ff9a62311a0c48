"""Rows of what users of comparable operators suffer from that no single module's tests hold; names say which."""

from __future__ import annotations

import asyncio
import base64
import copy
from typing import Any

import pytest

from children import FakeServer, gpu_tuning, resource, service
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.errors import SpecError
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import Plan, plan
from pagedserve_operator.referenced import hash_of_referenced
from pagedserve_operator.spec import Json

DEPLOYMENT = ("Deployment", "chat")
SHARED = {"cache": {"newClaim": {"size": "50Gi"}}}


def planned(server: FakeServer, spec: Json | None = None) -> Plan:
    owner = service(spec)
    return plan(owner, desired(owner, gpu_tuning(), Facts()), server.observe(child_keys("chat")))


def settled(spec: Json | None = None) -> FakeServer:
    server = FakeServer()
    server.execute(planned(server, spec))
    assert planned(server, spec).empty
    return server


def pod_of(server: FakeServer) -> Json:
    found: Json = server.objects[DEPLOYMENT]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("left", [None, {}, {"nodeAffinity": None}, {"podAffinity": {}}])
def test_b1_a_node_affinity_that_is_missing_is_put_back(left: Json | None) -> None:
    server = settled()
    pod = pod_of(server)
    wanted = copy.deepcopy(pod["affinity"])
    pod["affinity"] = left
    (apply,) = planned(server).applies
    assert "affinity" in apply.why
    assert apply.manifest["spec"]["template"]["spec"]["affinity"] == wanted


@pytest.mark.parametrize("bad", ["", "much", "1e999999999", "-", "1GiB", None, {"a": 1}])
def test_b1_a_quantity_in_a_child_that_nobody_can_read_is_put_back(bad: Any) -> None:
    server = settled()
    requests = pod_of(server)["containers"][0]["resources"]["requests"]
    requests["memory"] = bad
    (apply,) = planned(server).applies
    assert "requests.memory" in apply.why


@pytest.mark.parametrize("bad", ["much", "1e999999999", "9" * 99, [1]])
@pytest.mark.parametrize("place", ["requests", "limits"])
def test_b1_a_bad_quantity_in_the_spec_is_named(place: str, bad: Any) -> None:
    with pytest.raises(SpecError, match=rf"^spec\.resources\.{place}\.memory: "):
        parse(resource({"resources": {place: {"memory": bad}}}))


def test_a5_the_hash_of_secrets_is_the_same_in_every_release() -> None:
    # It stands in the pod template: a change here restarts every engine with a token at the operator's upgrade.
    class Secrets:
        async def get(self, kind: str, namespace: str, name: str) -> Json:
            return {"data": {"token": base64.b64encode(b"hf_example").decode()}}

    spec = {"auth": {"hfTokenSecretRef": {"name": "hub"}}}
    assert asyncio.run(hash_of_referenced(service(spec), Secrets())) == "599576bbfc1860ce"


def test_a15_a_container_that_reports_nothing_holds_no_scaling_up() -> None:
    spec = {"autoscaling": {}, "podTemplate": {"sidecars": [{"name": "proxy", "image": "example/proxy:1"}]}}
    scaler = next(row for row in desired(service(spec), gpu_tuning(), Facts()) if "Autoscaler" in row["kind"])
    assert {row["containerResource"]["container"] for row in scaler["spec"]["metrics"]} == {"engine"}


def test_a24_all_replicas_share_one_cache_and_may_be_kept_from_the_hub() -> None:
    spec = {**SHARED, "replicas": 3, "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]}
    pod = pod_of(settled(spec))
    (volume,) = [row for row in pod["volumes"] if "persistentVolumeClaim" in row]
    assert volume["persistentVolumeClaim"]["claimName"] == "chat-model-cache"
    engine = pod["containers"][0]
    (path,) = [row["mountPath"] for row in engine["volumeMounts"] if row["name"] == volume["name"]]
    env = {row["name"]: row["value"] for row in engine["env"]}
    assert env["HF_HOME"].startswith(f"{path}/")
    assert env["HF_HUB_OFFLINE"] == "1"
