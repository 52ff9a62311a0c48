"""The proxy breaks exactly what a test names, passes the rest on untouched, and counts both."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from control_cluster import Cluster
from fault_calls import Address, Call
from fault_proxy import FaultProxy
from fault_rules import Fault
from fault_upstream import Upstream

PODS = "/api/v1/namespaces/n/pods"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make the stand-in's certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=api"
    outputs = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.pem"]
    subprocess.run([*command.split(), *outputs], cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem", folder / "key.pem"


@pytest.fixture
def upstream(certificate: tuple[Path, Path]) -> Iterator[Upstream]:
    with Upstream(*certificate) as server:
        yield server


@pytest.fixture
def proxy(upstream: Upstream, certificate: tuple[Path, Path]) -> Iterator[FaultProxy]:
    with FaultProxy(f"https://127.0.0.1:{upstream.port}", ca=certificate[0], token="spare") as proxy:
        yield proxy


@contextmanager
def connected(proxy: FaultProxy, client: str = "client") -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(proxy.url(client)).netloc, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def ask(
    proxy: FaultProxy, method: str, path: str, *, body: str | None = None, client: str = "client", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and document of one request on a connection of its own."""
    with connected(proxy, client) as connection:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read())


@contextmanager
def watching(proxy: FaultProxy, path: str = PODS) -> Iterator[http.client.HTTPResponse]:
    with connected(proxy) as connection:
        connection.request("GET", f"{path}?watch=true")
        yield connection.getresponse()


def is_write(call: Call) -> bool:
    return call.writes


def test_what_no_rule_strikes_passes_untouched(proxy: FaultProxy, upstream: Upstream) -> None:
    code, headers, document = ask(proxy, "POST", f"{PODS}?fieldManager=a%20b", body="{}", **{"User-Agent": "me"})
    assert (code, headers["Audit-Id"]) == (200, "7")
    assert document == {"echo": "{}", "path": f"{PODS}?fieldManager=a%20b"}
    assert upstream.headers[-1]["User-Agent"] == "me"
    call = proxy.wait_for(lambda call: call.code == 200)
    assert (call.verb, call.user_agent, call.query) == ("create", "me", {"fieldManager": "a b"})
    assert proxy.counts == {}


def test_a_client_keeps_its_connection(proxy: FaultProxy) -> None:
    with connected(proxy) as connection:
        connection.connect()
        kept = connection.sock
        for _ in range(3):
            connection.request("GET", PODS)
            connection.getresponse().read()
        assert connection.sock is kept


def test_a_large_body_passes_whole(proxy: FaultProxy) -> None:
    body = "x" * 3_000_000
    assert ask(proxy, "POST", PODS, body=body)[2]["echo"] == body


def test_a_clients_own_token_goes_before_the_spare_one(proxy: FaultProxy, upstream: Upstream) -> None:
    ask(proxy, "GET", PODS, Authorization="Bearer own")
    ask(proxy, "GET", PODS)
    assert [headers["Authorization"] for headers in upstream.headers] == ["Bearer own", "Bearer spare"]


def test_each_client_is_told_apart_by_its_kubeconfig(proxy: FaultProxy) -> None:
    for client in ("one", "two"):
        cluster = json.loads(proxy.kubeconfig("token", client=client).read_text())["clusters"][0]["cluster"]
        assert cluster["server"] == proxy.url(client)
        ask(proxy, "GET", PODS, client=client)
    assert [call.client for call in proxy.calls] == ["one", "two"]


@pytest.mark.parametrize("code", [409, 429, 500, 503])
def test_a_status_is_answered_and_not_forwarded(proxy: FaultProxy, upstream: Upstream, code: int) -> None:
    proxy.inject(Fault.status(code), is_write)
    answered, headers, document = ask(proxy, "POST", PODS, body="{}")
    assert (answered, document["kind"], document["code"], document["status"]) == (code, "Status", code, "Failure")
    assert headers["Content-Type"].startswith("application/json")
    assert headers.get("Retry-After") == ("1" if code == 429 else None)
    assert upstream.committed == []
    assert ask(proxy, "POST", PODS, body="{}")[0] == 200


def test_a_reset_is_seen_as_one_and_not_forwarded(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.inject(Fault.reset(), is_write)
    with pytest.raises(ConnectionResetError):
        ask(proxy, "POST", PODS, body="{}")
    assert upstream.committed == []


def test_a_timeout_after_commit_commits_and_says_nothing(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.inject(Fault.timeout_after_commit(), is_write)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "POST", PODS, body="one")
    assert upstream.committed == ["one"]
    assert proxy.calls[0].code is None


def test_a_timeout_may_last_until_the_client_gives_up(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.inject(Fault.timeout_after_commit(seconds=None), is_write)
    with connected(proxy) as connection:
        connection.request("POST", PODS, body="one")
        upstream.wait_for_commits(1)
        assert connection.sock is not None
        connection.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.getresponse()


@pytest.mark.parametrize(("fault", "committed"), [(Fault.crash_before, []), (Fault.crash_after, ["one"])])
def test_a_crash_calls_back_on_its_side_of_the_commit(
    proxy: FaultProxy, upstream: Upstream, fault: Any, committed: list[str]
) -> None:
    seen: Future[tuple[str, list[str]]] = Future()
    proxy.inject(fault(lambda call: seen.set_result((call.verb, list(upstream.committed)))), is_write)
    with connected(proxy) as connection:
        connection.request("POST", PODS, body="one")
        assert seen.result(10) == ("create", committed)
    assert upstream.committed == committed


def test_an_error_of_a_callback_comes_out_at_the_end(upstream: Upstream, certificate: tuple[Path, Path]) -> None:
    def fail(call: Call) -> None:
        raise LookupError(call.verb)

    def crash() -> None:
        with FaultProxy(f"https://127.0.0.1:{upstream.port}", ca=certificate[0]) as proxy:
            proxy.inject(Fault.crash_before(fail), is_write)
            with connected(proxy) as connection:
                connection.request("POST", PODS, body="one")
                proxy.wait_for(lambda call: bool(call.fault))

    with pytest.raises(LookupError, match="create"):
        crash()


def test_an_address_strikes_the_call_of_its_index_alone(proxy: FaultProxy) -> None:
    rule = proxy.inject(Fault.status(500), Address("create", "pods", "", 1))
    codes = [ask(proxy, method, PODS, body="{}")[0] for method in ("POST", "PUT", "POST", "POST")]
    assert codes == [200, 200, 500, 200]
    assert [call.number for call in rule.struck] == [2]


def test_a_rule_strikes_as_often_as_it_is_told(proxy: FaultProxy) -> None:
    proxy.inject(Fault.status(503), is_write, skip=1, times=2)
    assert [ask(proxy, "POST", PODS, body="{}")[0] for _ in range(4)] == [200, 503, 503, 200]


def test_healing_forgets_the_rules(proxy: FaultProxy) -> None:
    rule = proxy.inject(Fault.status(503), is_write)
    proxy.heal()
    assert ask(proxy, "POST", PODS, body="{}")[0] == 200
    assert not rule.fired


def test_a_watch_streams_each_event_as_it_comes(proxy: FaultProxy, upstream: Upstream) -> None:
    with watching(proxy) as stream:
        for number in (1, 2):
            upstream.send(b'{"n":%d}\n' % number)
            assert stream.readline() == b'{"n":%d}\n' % number
        assert [call.resource for call in proxy.watches] == ["pods"]


@pytest.mark.parametrize("opened", [True, False], ids=["already open", "on opening"])
def test_a_watch_that_is_gone_gets_the_error_event_and_ends(
    proxy: FaultProxy, upstream: Upstream, opened: bool
) -> None:
    if not opened:
        proxy.inject(Fault.gone(), lambda call: call.resource == "pods")
    with watching(proxy) as stream:
        if opened:
            upstream.send(b"{}\n")
            assert stream.readline() == b"{}\n"
            assert proxy.disturb(Fault.gone()) == 1
        event = json.loads(stream.readline())
        assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")
        assert stream.read() == b""
    assert proxy.counts == {"watch gone": 1}


def test_a_cut_waits_for_the_end_of_an_event(proxy: FaultProxy, upstream: Upstream) -> None:
    with watching(proxy) as stream:
        upstream.send(b'{"half":')
        assert stream.read(8) == b'{"half":'
        assert proxy.disturb(Fault.cut()) == 1
        upstream.send(b"1}\n")
        assert stream.read() == b"1}\n"


def test_a_reset_strikes_an_open_watch(proxy: FaultProxy, upstream: Upstream) -> None:
    with watching(proxy) as stream:
        upstream.send(b"{}\n")
        stream.readline()
        assert proxy.disturb(Fault.reset(), lambda call: call.resource == "nodes") == 0
        assert proxy.disturb(Fault.reset(), lambda call: call.resource == "pods") == 1
        with pytest.raises(ConnectionResetError):
            stream.readline()


def test_a_watch_that_hangs_stays_open_and_passes_nothing_on(proxy: FaultProxy, upstream: Upstream) -> None:
    with connected(proxy) as connection:
        connection.request("GET", f"{PODS}?watch=true")
        kept = connection.sock
        stream = connection.getresponse()
        upstream.send(b"{}\n")
        stream.readline()
        assert proxy.disturb(Fault.hang()) == 1
        assert proxy.watches == []
        kept.settimeout(0.2)
        with pytest.raises(TimeoutError):
            stream.readline()


def test_a_fault_that_needs_an_answer_is_refused_for_an_open_watch(proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="use gone, cut, hang or reset"):
        proxy.disturb(Fault.timeout_after_commit())


def test_a_gate_keeps_one_clients_writes_until_its_release(proxy: FaultProxy, upstream: Upstream) -> None:
    with proxy.hold(lambda call: call.client == "slow" and call.writes) as gate, connected(proxy, "slow") as connection:
        connection.request("POST", PODS, body="late")
        assert [call.client for call in gate.wait_for_held()] == ["slow"]
        ask(proxy, "POST", PODS, body="early", client="quick")
        gate.release()
        assert connection.getresponse().status == 200
    assert upstream.committed == ["early", "late"]


def test_a_held_write_arrives_also_where_its_client_has_left(proxy: FaultProxy, upstream: Upstream) -> None:
    gate = proxy.hold(is_write)
    with connected(proxy) as connection:
        connection.request("POST", PODS, body="late")
        gate.wait_for_held()
    ask(proxy, "GET", PODS)
    gate.release()
    assert upstream.wait_for_commits(1) == ["late"]


def test_a_lost_api_server_is_a_lost_connection_and_its_return_serves_again(
    certificate: tuple[Path, Path],
) -> None:
    with Upstream(*certificate) as first:
        port = first.port
    with FaultProxy(f"https://127.0.0.1:{port}", ca=certificate[0]) as proxy:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(proxy, "GET", PODS)
        assert proxy.calls[0].code is None
        with Upstream(*certificate, port=port):
            assert ask(proxy, "GET", PODS)[0] == 200


def test_marks_and_counts_tell_what_happened(proxy: FaultProxy) -> None:
    ask(proxy, "GET", PODS)
    mark = proxy.mark()
    proxy.inject(Fault.status(409), is_write, times=2)
    for _ in range(3):
        ask(proxy, "POST", PODS, body="{}")
    assert [call.code for call in proxy.since(mark)] == [409, 409, 200]
    assert [call.fault for call in proxy.since(mark, lambda call: call.code == 409)] == ["status 409"] * 2
    assert proxy.table().split() == ["status", "409", "2", "all", "2"]


def test_the_list_of_calls_is_bounded_and_says_so(upstream: Upstream, certificate: tuple[Path, Path]) -> None:
    with FaultProxy(f"https://127.0.0.1:{upstream.port}", ca=certificate[0], most_calls=2) as proxy:
        for _ in range(3):
            ask(proxy, "GET", PODS)
        assert [call.number for call in proxy.calls] == [1, 2]
        with pytest.raises(RuntimeError, match="only 2 are kept"):
            proxy.since(0)


def test_a_wait_that_is_in_vain_shows_the_last_calls(proxy: FaultProxy) -> None:
    ask(proxy, "GET", PODS)
    with pytest.raises(TimeoutError, match="list pods 200"):
        proxy.wait_for(is_write, seconds=0.01)


def test_kubectl_reaches_a_real_api_server_through_the_proxy(control_plane: Cluster, namespace: str) -> None:
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": namespace}}
    with FaultProxy(control_plane.url, ca=control_plane.ca, token=control_plane.token) as proxy:
        kubeconfig = proxy.kubeconfig()
        proxy.inject(Fault.status(503), is_write)
        for refused in (True, False):
            done = control_plane.kubectl(
                "apply",
                "--server-side",
                "-f",
                "-",
                stdin=json.dumps(manifest),
                kubeconfig=kubeconfig,
                check=False,
            )
            assert bool(done.returncode) == refused, done.stderr
        shown = control_plane.kubectl("get", "configmap", "c", "-n", namespace, "-o", "name", kubeconfig=kubeconfig)
        assert shown.stdout.strip() == "configmap/c"
        assert [(call.verb, call.code) for call in proxy.since(0, is_write)] == [("apply", 503), ("apply", 201)]
