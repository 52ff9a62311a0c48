"""One replica's metrics API from start to end, on an API server that is played."""

from __future__ import annotations

import asyncio
import base64
import logging
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from control_certificates import Authority
from control_processes import free_port
from metrics_world import FakeServer, adapter, authentication, client_context
from operators import QUICK
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import ApiError, NotLeading, Rejected, Unavailable
from pagedserve_operator.metrics_api import MetricsApi, api
from pagedserve_operator.metrics_api.authentication import CONFIG_MAP
from pagedserve_operator.metrics_api.certificates import AUTHORITY_LASTS, read_pem, to_pem
from pagedserve_operator.metrics_api.publishing import SECRET
from pagedserve_operator.metrics_api.registration import NAME

FRONT_PROXY = Authority.new()
CONFIG = QUICK.derive(metrics_api="true", metrics_api_host="127.0.0.1", metrics_api_port=0, operator_namespace="ops")
HOST = "pagedserve-metrics-api.ops.svc"


class Counts:
    """Where requests and reads are counted."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self.reads: Counter[str] = Counter()

    def metrics_api_answered(self, code: int) -> None:
        self.codes[code] += 1

    def engine_read(self, result: str) -> None:
        self.reads[result] += 1


class World:
    """A server, a clock, and replicas that look when they are told to."""

    def __init__(self) -> None:
        self.server = FakeServer(authentication(FRONT_PROXY))
        self.now = datetime.now(UTC)
        self.leading = True
        self.replicas: list[MetricsApi] = []
        self.told: list[str] = []
        """What the newest replica's trouble was at each change."""

    def replica(self, config: OperatorConfig = CONFIG, *, leading: bool = True) -> MetricsApi:
        leader = self if leading else Follower()
        made = MetricsApi(self.server, leader, config, counters=Counts(), now=lambda: self.now, on_change=self._changed)
        self.replicas.append(made)
        return made

    def _changed(self) -> None:
        self.told.append(self.replicas[-1].trouble)

    async def served(self, **options: bool) -> MetricsApi:
        """A replica that has published, seen that it is trusted, and serves."""
        made = self.replica(**options)
        for _ in range(2):
            await made.look()
        assert made.state == "serving"
        return made

    async def ask(self, replica: MetricsApi, authority: Authority = FRONT_PROXY) -> int:
        trusted = read_pem(base64.b64decode(self.server.objects["APIService", "", NAME]["spec"]["caBundle"]))
        context = client_context(to_pem(trusted), authority.client())
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            url = f"https://127.0.0.1:{replica.port}/apis/custom.metrics.k8s.io/v1beta2"
            async with session.get(url, headers={"X-Remote-User": "a"}, server_hostname=HOST) as answer:
                return answer.status


class Follower:
    """Never leads."""

    leading = False


def run(story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        try:
            await story(world)
        finally:
            for replica in world.replicas:
                await replica.close()

    asyncio.run(main())


def test_the_leader_serves_and_the_others_follow() -> None:
    async def story(world: World) -> None:
        first, second = world.replica(), world.replica(leading=False)
        await second.look()
        assert (second.state, second.port) == ("starting", 0)
        assert "the operator that leads" in second.trouble
        await first.look()
        assert first.state == "starting", "it doesn't know yet that it is trusted"
        await first.look()
        await second.look()
        assert [(replica.state, replica.trouble) for replica in (first, second)] == [("serving", "")] * 2
        assert [await world.ask(replica) for replica in (first, second)] == [200, 200]

    run(story)


def test_a_renewed_authority_reaches_every_replica() -> None:
    async def story(world: World) -> None:
        replicas = [world.replica(), world.replica(leading=False)]
        for _ in range(2):
            for replica in replicas:
                await replica.look()
        for step in (AUTHORITY_LASTS * 0.7, timedelta(minutes=10), timedelta(days=2), timedelta(days=1)):
            world.now += step
            for replica in replicas:
                await replica.look()
        assert {replica.state for replica in replicas} == {"serving"}
        (trusted,) = read_pem(base64.b64decode(world.server.objects["APIService", "", NAME]["spec"]["caBundle"]))
        for replica in replicas:
            identity = replica.identity
            assert identity is not None
            identity.serving.certificate.verify_directly_issued_by(trusted)

    run(story)


def test_a_front_proxy_with_a_new_authority_is_believed_and_the_old_one_no_more() -> None:
    async def story(world: World) -> None:
        replica, newer = await world.served(), Authority.new("newer")
        world.server.put(authentication(newer))
        await replica.look()
        assert await world.ask(replica, newer) == 200
        with pytest.raises((aiohttp.ClientError, OSError)):
            await world.ask(replica)

    run(story)


def test_names_that_change_are_read_again() -> None:
    async def story(world: World) -> None:
        replica = await world.served()
        world.server.put(authentication(FRONT_PROXY, names=("another",)))
        await replica.look()
        assert await world.ask(replica) == 401

    run(story)


def test_somebody_elses_api_is_told_with_its_server_and_the_cure(caplog: pytest.LogCaptureFixture) -> None:
    async def story(world: World) -> None:
        world.server.put(adapter("v1beta1"))
        replica = world.replica()
        for _ in range(3):
            await replica.look()
        assert replica.state == "foreign"
        assert "Service monitoring/prometheus-adapter" in replica.trouble
        assert "manifests/prometheus-adapter" in replica.trouble
        assert not world.server.writes

    with caplog.at_level(logging.WARNING):
        run(story)
    assert len([record for record in caplog.records if "prometheus-adapter" in record.message]) == 1


def test_a_change_of_what_is_told_is_passed_on_once() -> None:
    async def story(world: World) -> None:
        replica = await world.served()
        world.told.clear()
        for _ in range(2):
            await replica.look()
        assert world.told == []
        world.server.put(adapter("v1beta1"))
        for _ in range(2):
            await replica.look()
        (told,) = world.told
        assert "prometheus-adapter" in told
        del world.server.objects["APIService", "", "v1beta1.custom.metrics.k8s.io"]
        for _ in range(3):
            await replica.look()
        assert world.told[1:] == [""]

    run(story)


def unavailable(world: World) -> None:
    row = world.server.objects["APIService", "", NAME]
    row["status"] = {"conditions": [{"type": "Available", "status": "False", "reason": "MissingEndpoints"}]}


def no_aggregation(world: World) -> None:
    del world.server.objects["ConfigMap", "kube-system", CONFIG_MAP]


def no_rights(world: World) -> None:
    world.server.refusals["Secret"] = Rejected("secrets is forbidden", status=403)


def bad_authority(world: World) -> None:
    row = authentication(FRONT_PROXY)
    row["data"]["requestheader-client-ca-file"] = "-----BEGIN CERTIFICATE-----\nnonsense"
    world.server.put(row)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (bad_authority, "authority in ConfigMap kube-system/extension-apiserver-authentication can't be used"),
        (unavailable, "MissingEndpoints"),
        (no_aggregation, "requestheader-client-ca-file"),
        (no_rights, "secrets is forbidden"),
    ],
)
def test_what_is_missing_is_told(harm: Callable[[World], None], told: str) -> None:
    async def story(world: World) -> None:
        replica = await world.served()
        harm(world)
        await replica.look()
        assert replica.state == "troubled"
        assert told in replica.trouble
        assert "METRICS_API_PORT" not in replica.trouble

    run(story)


def test_a_file_system_that_is_full_is_not_told_as_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        def full(**_: object) -> object:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
        replica = world.replica()
        for _ in range(2):
            await replica.look()
        assert replica.state == "troubled"
        assert replica.trouble == "it can't be served: No space left on device"

    run(story)


@pytest.mark.parametrize(
    "failure", [Unavailable("10.0.0.1 is away"), NotLeading("too late"), ApiError("odd", status=404)]
)
def test_what_passes_by_itself_changes_nothing_that_is_told(failure: Exception) -> None:
    async def story(world: World) -> None:
        replica = await world.served()
        world.server.refusals["Secret"] = failure  # type: ignore[assignment]
        await replica.look()
        assert (replica.state, replica.trouble) == ("serving", "")
        assert replica.port

    run(story)


@pytest.mark.parametrize(
    ("failure", "told"),
    [(Unavailable("10.0.0.1 is away"), "doesn't answer"), (Unavailable("etcd", status=500), "status 500")],
)
@pytest.mark.parametrize("metrics_api", ["true", "false"])
def test_what_does_not_pass_is_told_after_a_minute_and_logged_once(
    failure: ApiError, told: str, metrics_api: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        replica = world.replica(CONFIG.derive(metrics_api=metrics_api))
        begin = replica.state
        world.server.refusals |= {"ConfigMap": failure, "APIService": failure}
        for seconds in (0, 30, 29, 1, 600):
            world.now += timedelta(seconds=seconds)
            await replica.look()
            assert replica.state == ("troubled" if seconds in (1, 600) else begin)
        assert told in replica.trouble
        world.server.refusals.clear()
        for _ in range(2):
            await replica.look()
        assert replica.state == ("serving" if metrics_api == "true" else "off")

    with caplog.at_level(logging.INFO):
        run(story)
    assert len([record for record in caplog.records if "looked at again" in record.message]) == 1
    assert len([record for record in caplog.records if told in record.message]) == 1


def test_what_passes_now_and_then_is_no_trouble() -> None:
    async def story(world: World) -> None:
        replica = await world.served()
        for _ in range(5):
            world.server.refusals["Secret"] = Unavailable("away")
            world.now += timedelta(seconds=50)
            await replica.look()
            world.server.refusals.clear()
            await replica.look()
        assert replica.state == "serving"

    run(story)


def test_a_bug_of_ours_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def story(world: World) -> None:
        replica = world.replica()
        world.server.refusals["Secret"] = KeyError("oops")  # type: ignore[assignment]
        await replica.look()
        assert replica.state == "troubled"
        world.server.refusals.clear()
        for _ in range(2):
            await replica.look()
        assert replica.state == "serving"

    run(story)
    assert "oops" in caplog.text


def test_a_port_that_is_taken_is_told() -> None:
    async def story(world: World) -> None:
        port = free_port()
        holder = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        replica = world.replica(CONFIG.derive(metrics_api_port=port))
        for _ in range(2):
            await replica.look()
        assert replica.state == "troubled"
        assert f"METRICS_API_PORT {port}" in replica.trouble
        holder.close()
        await holder.wait_closed()
        await replica.look()
        assert replica.state == "serving"

    run(story)


def test_turned_off_it_serves_nothing_and_takes_ours_back() -> None:
    async def story(world: World) -> None:
        await world.replica().look()
        assert ("APIService", "", NAME) in world.server.objects
        off = world.replica(CONFIG.derive(metrics_api="false"))
        await off.look()
        assert (off.state, off.port) == ("off", 0)
        assert "METRICS_API is false" in off.trouble
        assert ("APIService", "", NAME) not in world.server.objects
        assert ("Secret", "ops", SECRET) in world.server.objects
        asked = world.server.reads
        for _ in range(3):
            await off.look()
        assert world.server.reads == asked, "once in each term is enough"
        await world.replica().look()
        world.leading = False
        await off.look()
        world.leading = True
        await off.look()
        assert ("APIService", "", NAME) not in world.server.objects

    run(story)


def test_turned_off_without_rights_to_register_it_is_off_and_not_troubled() -> None:
    async def story(world: World) -> None:
        world.server.refusals["APIService"] = Rejected("apiservices is forbidden", status=403)
        off = world.replica(CONFIG.derive(metrics_api="false"))
        for _ in range(2):
            await off.look()
        assert off.state == "off"
        assert "METRICS_API is false" in off.trouble
        assert world.server.reads == 1, "it isn't asked for again"

    run(story)


def test_an_operator_of_one_namespace_asks_the_api_server_for_nothing() -> None:
    async def story(world: World) -> None:
        refused = Rejected("forbidden", status=403)
        world.server.refusals = dict.fromkeys(("ConfigMap", "Secret", "APIService", "ClusterRole"), refused)
        alone = world.replica(CONFIG.derive(metrics_api="auto", watch_namespace="models"))
        await alone.look()
        assert alone.state == "off"
        assert "one namespace" in alone.trouble
        assert not world.server.writes

    run(story)


def test_it_looks_again_and_again_until_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LOOK_SECONDS", 0.01)

    async def story(world: World) -> None:
        replica = world.replica()
        running = asyncio.ensure_future(replica.run())
        await world.server.until(lambda: ("APIService", "", NAME) in world.server.objects)
        del world.server.objects["APIService", "", NAME]
        await world.server.until(lambda: ("APIService", "", NAME) in world.server.objects)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises((aiohttp.ClientError, OSError)):
            await world.ask(replica)

    run(story)
