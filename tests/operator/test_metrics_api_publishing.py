"""What replicas share, on an API server that is played: certificates are renewed, and an APIService follows them."""

from __future__ import annotations

import asyncio
import base64
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from metrics_world import FakeServer, adapter
from pagedserve_operator.errors import NotLeading, Rejected
from pagedserve_operator.metrics_api.certificates import AUTHORITY_LASTS, SERVING_LASTS, read_pem
from pagedserve_operator.metrics_api.publishing import ROLE, SECRET, Published, Publisher
from pagedserve_operator.metrics_api.registration import NAME

ROLE_OBJECT = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": ROLE, "uid": "role"},
}
JSON = dict[str, Any]


class World:
    """A server, a clock and a publisher in namespace ``ops``."""

    def __init__(self, *objects: JSON) -> None:
        self.server = FakeServer(*objects)
        self.now = datetime.now(UTC)
        self.publisher = self.replica()

    def replica(self) -> Publisher:
        return Publisher(self.server, namespace="ops", now=lambda: self.now)

    def look(self, publisher: Publisher | None = None, *, leading: bool = True) -> Published:
        return asyncio.run((publisher or self.publisher).look(leading=leading))

    def settled(self, publisher: Publisher | None = None) -> Published:
        """What the leader sees once it has written, and read back what is trusted, twice."""
        return [self.look(publisher) for _ in range(3)][-1]

    def secret(self) -> JSON | None:
        return self.server.objects.get(("Secret", "ops", SECRET))

    def api_service(self) -> JSON | None:
        return self.server.objects.get(("APIService", "", NAME))

    def trusted(self) -> tuple[object, ...]:
        found = self.api_service()
        assert found is not None
        return read_pem(base64.b64decode(found["spec"]["caBundle"]))


def test_the_leader_makes_certificates_and_registers_then_writes_nothing_more() -> None:
    world = World(ROLE_OBJECT)
    assert world.look().certificates is None, "the API server hasn't been seen to trust them"
    assert world.server.writes == {"apply Secret": 1, "apply APIService": 1}
    second = world.look()
    assert second.certificates is not None
    assert world.trusted() == second.certificates.trusted
    for _ in range(5):
        assert world.look().certificates is not None
    assert world.server.writes == {"apply Secret": 1, "apply APIService": 1}


def test_the_api_service_belongs_to_the_role_that_goes_with_the_manifests() -> None:
    world = World(ROLE_OBJECT)
    world.look()
    found = world.api_service()
    assert found is not None
    assert [owner["uid"] for owner in found["metadata"]["ownerReferences"]] == ["role"]


def test_without_that_role_it_is_registered_all_the_same() -> None:
    world = World()
    world.server.refusals["ClusterRole"] = Rejected("forbidden", status=403)
    world.look()
    found = world.api_service()
    assert found is not None
    assert "ownerReferences" not in found["metadata"]


def test_who_does_not_lead_writes_nothing_and_reads_everything() -> None:
    world = World(ROLE_OBJECT)
    assert world.look(leading=False).certificates is None
    assert not world.server.writes
    led = world.settled()
    other = world.look(world.replica(), leading=False)
    assert other.certificates is not None
    assert led.certificates is not None
    assert other.certificates.data() == led.certificates.data()


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_nothing_is_made_where_somebody_else_serves_the_api(version: str) -> None:
    world = World(ROLE_OBJECT, adapter(version))
    assert "prometheus-adapter" in world.look().foreign
    assert not world.server.writes


def test_ours_is_withdrawn_when_an_adapter_comes_and_returns_when_it_goes() -> None:
    world = World(ROLE_OBJECT)
    world.look()
    world.server.put(adapter("v1beta1"))
    assert world.look().foreign
    assert world.api_service() is None
    del world.server.objects["APIService", "", "v1beta1.custom.metrics.k8s.io"]
    assert not world.look().foreign
    assert world.api_service() is not None


def test_turned_off_ours_is_withdrawn_and_no_other() -> None:
    world = World(ROLE_OBJECT)
    world.look()
    asyncio.run(world.publisher.withdraw())
    assert world.api_service() is None
    world.server.put(adapter("v1beta2"))
    before = world.api_service()
    asyncio.run(world.publisher.withdraw())
    assert world.api_service() == before


def test_a_renewed_certificate_needs_no_new_registration() -> None:
    world = World(ROLE_OBJECT)
    before = world.settled().certificates
    world.now += SERVING_LASTS * 0.7
    after = world.look().certificates
    assert before is not None
    assert after is not None
    assert after.serving != before.serving
    assert world.server.writes == {"apply Secret": 2, "apply APIService": 1}


def test_a_new_authority_is_published_beside_the_old_one_before_it_signs() -> None:
    world = World(ROLE_OBJECT)
    before = world.settled().certificates
    assert before is not None
    world.now += AUTHORITY_LASTS * 0.7
    announced = world.look().certificates
    assert announced is not None
    assert announced.authority.certificate == before.authority.certificate
    assert len(world.trusted()) == 2
    world.look()
    world.now += timedelta(minutes=10)
    signing = world.look().certificates
    assert signing is not None
    assert signing.authority.certificate != before.authority.certificate
    assert set(world.trusted()) == {before.authority.certificate, signing.authority.certificate}
    world.now += timedelta(days=2)
    world.look()
    assert world.trusted() == (signing.authority.certificate,)
    rows = world.server.secret_rows(SECRET, "ops")
    assert {name for name, row in rows.items() if row} == {"ca.crt", "ca.key", "tls.crt", "tls.key"}


@pytest.mark.parametrize("loss", ["deleted", "emptied", "half of it lost", "not base64"])
def test_a_secret_that_is_lost_or_broken_is_made_anew_and_the_old_authority_stays_trusted(
    loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(ROLE_OBJECT)
    before = world.settled().certificates
    secret = world.secret()
    assert before is not None
    assert secret is not None
    if loss == "deleted":
        del world.server.objects["Secret", "ops", SECRET]
    elif loss == "emptied":
        world.server.put({**secret, "data": None})
    elif loss == "half of it lost":
        world.server.put({**secret, "data": {key: row for key, row in secret["data"].items() if key != "tls.key"}})
    else:
        world.server.put({**secret, "data": {**secret["data"], "ca.key": "@"}})
    with caplog.at_level(logging.WARNING):
        assert world.look(world.replica(), leading=False).certificates is None
        after = world.settled(world.replica()).certificates
    assert after is not None
    assert set(world.trusted()) == {before.authority.certificate, after.authority.certificate}
    assert ("is broken and is made anew" in caplog.text) == (loss != "deleted")


def test_a_new_authority_is_shown_by_nobody_who_has_not_seen_it_trusted_for_a_look() -> None:
    world = World(ROLE_OBJECT)
    leader, follower = world.replica(), world.replica()
    world.settled(leader)
    for _ in range(2):
        assert world.look(follower, leading=False).certificates is not None
    del world.server.objects["Secret", "ops", SECRET]
    assert world.look(leader).certificates is None
    assert len(world.trusted()) == 2
    # The one has been told by the API server for the first time now, the other has told it a moment ago.
    assert world.look(follower, leading=False).certificates is None
    assert world.look(leader).certificates is None
    for publisher, leading in ((follower, False), (leader, True)):
        shown = world.look(publisher, leading=leading).certificates
        assert shown is not None
        assert shown.authority.certificate == world.trusted()[0]


@pytest.mark.parametrize("added", ["garbage", "the authority once more"])
def test_rows_that_somebody_else_has_added_are_mended_once(added: str) -> None:
    world = World(ROLE_OBJECT)
    world.settled()
    world.now += timedelta(hours=1)
    secret = world.secret()
    assert secret is not None
    rows = dict(secret["data"])
    if added == "garbage":
        rows["coming-ca.crt"] = base64.b64encode(b"nonsense").decode()
    else:
        rows |= {f"coming-ca.{part}": rows[f"ca.{part}"] for part in ("crt", "key")}
    world.server.put({**secret, "data": rows})
    world.server.objects["Secret", "ops", SECRET]["metadata"]["managedFields"] = without_coming(secret)
    for _ in range(5):
        world.look()
    assert world.server.writes["apply Secret"] == 2
    assert len(set(world.trusted())) <= 2
    assert world.look().certificates is not None


def without_coming(secret: JSON) -> list[JSON]:
    """Its field owners, but for the rows that somebody else has written."""
    (entry,) = secret["metadata"]["managedFields"]
    owned = {name: tree for name, tree in entry["fieldsV1"]["f:data"].items() if not name.startswith("f:coming")}
    return [{**entry, "fieldsV1": {**entry["fieldsV1"], "f:data": owned}}]


def test_a_secret_of_another_authority_is_never_shown() -> None:
    world, other = World(ROLE_OBJECT), World(ROLE_OBJECT)
    world.settled()
    other.settled()
    stolen = other.secret()
    assert stolen is not None
    world.server.put(stolen)
    for _ in range(3):
        assert world.look(leading=False).certificates is None


def test_a_write_that_may_not_begin_leaves_everything_as_it_is() -> None:
    world = World(ROLE_OBJECT)

    async def fenced(*_: object, **__: object) -> JSON:
        raise NotLeading("too late")

    world.server.apply = fenced  # type: ignore[method-assign]
    with pytest.raises(NotLeading):
        world.look()
    assert world.secret() is None
