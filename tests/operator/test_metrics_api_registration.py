from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from control_certificates import Authority
from metrics_world import FakeServer, adapter
from pagedserve_operator.metrics_api.certificates import to_pem
from pagedserve_operator.metrics_api.registration import (
    FIELD_MANAGER,
    NAME,
    OTHER_NAMES,
    SERVICE,
    VERSION_PRIORITY,
    api_service,
    foreign_of,
    is_ours,
    needs_apply,
    published,
    trouble_of,
)

JSON = dict[str, Any]
OURS = "ops"
"""Namespace of the operator."""


def registered(*rows: JSON) -> dict[str, JSON | None]:
    found: dict[str, JSON | None] = dict.fromkeys((NAME, *OTHER_NAMES))
    return {**found, **{row["metadata"]["name"]: row for row in rows}}


def wanted(bundle: bytes = b"one", owner: JSON | None = None) -> JSON:
    return api_service(OURS, bundle, owner=owner)


def applied(manifest: JSON, **status: str) -> JSON:
    """As the API server has it once we have applied it."""
    server = FakeServer()
    made = asyncio.run(server.apply(manifest, manager=FIELD_MANAGER, planned_on=None))
    return {**made, "status": {"conditions": [{"type": "Available", **status}]}} if status else made


def test_where_nobody_serves_the_api_we_do() -> None:
    assert foreign_of(registered(), OURS) == ""
    assert needs_apply(None, wanted())


def test_what_is_as_it_should_be_is_left_alone() -> None:
    assert foreign_of(registered(applied(wanted())), OURS) == ""
    assert not needs_apply(applied(wanted()), wanted())


def test_other_authorities_and_edits_by_hand_are_applied_anew() -> None:
    assert needs_apply(applied(wanted()), wanted(b"two"))
    edited = applied(wanted())
    edited["spec"]["groupPriorityMinimum"] = 9999
    assert needs_apply(edited, wanted())


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_an_adapter_of_either_version_is_somebody_else(version: str) -> None:
    told = foreign_of(registered(adapter(version)), OURS)
    assert told == f"Service monitoring/prometheus-adapter (APIService {version}.custom.metrics.k8s.io)"


def test_an_adapter_that_comes_later_is_told_and_ours_is_not() -> None:
    told = foreign_of(registered(applied(wanted()), adapter("v1beta1")), OURS)
    assert "prometheus-adapter" in told
    assert SERVICE not in told
    assert adapter()["spec"]["versionPriority"] > VERSION_PRIORITY, "and is asked before ours is gone"


def test_one_of_ours_that_somebody_has_taken_is_theirs() -> None:
    taken = applied(wanted())
    taken["spec"]["service"] = {"namespace": "monitoring", "name": "prometheus-adapter"}
    assert not is_ours(taken, OURS)
    assert foreign_of(registered(taken), OURS)


def test_another_installation_of_this_operator_is_somebody_else() -> None:
    other = applied(api_service("elsewhere", b"one", owner=None))
    assert not is_ours(other, OURS)
    assert "elsewhere/pagedserve-metrics-api" in foreign_of(registered(other), OURS)


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_one_that_only_looks_like_ours_is_not(version: str) -> None:
    lookalike = adapter(version, service={"namespace": OURS, "name": SERVICE})
    assert not is_ours(lookalike, OURS)
    assert foreign_of(registered(lookalike), OURS)


def test_one_of_another_version_is_not_ours_whoever_applied_it() -> None:
    older = wanted()
    older["metadata"]["name"] = OTHER_NAMES[0]
    assert foreign_of(registered(applied(older)), OURS)


def test_it_goes_with_its_owner() -> None:
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r", "uid": "u"}}
    (reference,) = wanted(owner=role)["metadata"]["ownerReferences"]
    assert reference == {"apiVersion": role["apiVersion"], "kind": "ClusterRole", "name": "r", "uid": "u"}
    assert "ownerReferences" not in wanted()["metadata"]


def test_what_the_api_server_trusts_is_read_back() -> None:
    trusted = tuple(Authority.new(name).certificate for name in ("one", "two"))
    assert published(applied(wanted(to_pem(trusted))), OURS) == trusted
    assert published(applied(wanted(to_pem(trusted))), "elsewhere") == ()
    assert published(applied(wanted(b"nonsense")), OURS) == ()
    assert published(None, OURS) == ()
    assert base64.b64decode(wanted(b"one")["spec"]["caBundle"]) == b"one"


@pytest.mark.parametrize(
    ("existing", "told"),
    [
        (None, ""),
        (applied(wanted()), ""),
        (applied(wanted(), status="True", reason="Passed"), ""),
        (applied(wanted(), status="False", reason="MissingEndpoints", message="10.0.0.1"), "MissingEndpoints"),
        (applied(wanted(), status="False"), "no reason given"),
    ],
)
def test_an_api_server_that_cannot_reach_us_says_so_without_addresses(existing: JSON | None, told: str) -> None:
    assert told in trouble_of(existing)
    assert bool(trouble_of(existing)) == bool(told)
    assert "10.0.0.1" not in trouble_of(existing)
