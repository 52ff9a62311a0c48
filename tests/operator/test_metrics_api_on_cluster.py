"""The whole way of a number: from an engine through the operator and the API server to an autoscaler that acts on it.

Nothing is played but the engines' load: two operators run as Pods with the rights of the manifests alone, Service and
EndpointSlice are the controllers', and the autoscaler is Kubernetes' own, at its own pace.
"""

from __future__ import annotations

import base64
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest

from control_certificates import Authority, Signed
from control_client import ApiError, Client
from control_cluster import Cluster
from metrics_installation import NAMESPACE, ROOT, SECONDS, Installation, installation, steer
from metrics_world import adapter, client_context
from missing import skip_without
from node_stand_in import why_not
from node_volumes import why_no_account
from operator_world import condition_of
from pagedserve_operator.desired.autoscaler import BEHAVIOR
from pagedserve_operator.metrics_api.publishing import SECRET
from pagedserve_operator.metrics_api.registration import NAME
from pagedserve_operator.names import API_VERSION, KIND

JSON = dict[str, Any]
WAITING, CACHE, WAIT = "pagedserve_requests_waiting", "pagedserve_cache_usage_ratio", "pagedserve_queue_wait_seconds"
NAMED = {"waitingRequests": WAITING, "cacheUse": CACHE, "queueWaitSeconds": WAIT}
AT_ONCE = {
    way: {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}]}
    for way in ("scaleUp", "scaleDown")
}
SOON: JSON = {"lifecycle": {"preStopSeconds": 0, "drainSeconds": 5}}
AUTOSCALER_SECONDS = 15.0
"""Kubernetes' default."""


@pytest.fixture(scope="module")
def _installation(control_plane: Cluster) -> Iterator[Installation]:
    """A cluster of its own: what is registered in one is everybody's."""
    if reason := why_not() or why_no_account():
        skip_without(reason)
    if not control_plane.started_here:
        pytest.skip("it registers an API and restarts the API server: leave KUBECONFIG unset to run this test")
    with installation(control_plane.program_folder, autoscaler_seconds=AUTOSCALER_SECONDS) as made:
        yield made


@pytest.fixture
def installed(_installation: Installation) -> Iterator[Installation]:
    """It serves no resource yet, and none when the test is over."""
    yield _installation
    world = _installation.world
    for resource in world.client.list(API_VERSION, KIND, namespace=world.namespace):
        world.delete(resource["metadata"]["name"])
        world.wait_gone("Deployment", resource["metadata"]["name"])
    # They needn't take their leave.
    for pod in world.client.list("v1", "Pod", namespace=world.namespace):
        world.client.delete("v1", "Pod", pod["metadata"]["name"], namespace=world.namespace, grace_seconds=0)
    world.client.wait(lambda: not world.client.list("v1", "Pod", namespace=world.namespace), "no pod is left")


def scaled(metric: str = "waitingRequests", low: int = 1, high: int = 3, **more: Any) -> JSON:
    return {
        **SOON,
        "autoscaling": {
            "minReplicas": low,
            "maxReplicas": high,
            "metrics": [{"name": metric, **more}],
            "behavior": AT_ONCE,
        },
    }


def desired_replicas(installed: Installation, name: str) -> int:
    hpa = installed.world.child("HorizontalPodAutoscaler", name)
    count: int = (hpa.get("status") or {}).get("desiredReplicas", 0)
    return count


def test_load_is_seen_and_acted_on_and_so_is_its_end(
    installed: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    world = installed.world
    world.create("chat", **scaled(averageValue="2"))
    (first,) = installed.wait_engines("chat", 1)
    installed.client.wait(lambda: desired_replicas(installed, "chat") == 1, "the autoscaler has begun", seconds=SECONDS)
    steer(first, waiting=6)
    begin = time.monotonic()
    installed.client.wait(lambda: installed.values(WAITING, "chat") == {first["metadata"]["name"]: "6"}, "6 are seen")
    seen = time.monotonic() - begin
    installed.client.wait(lambda: desired_replicas(installed, "chat") == 3, "three are desired", seconds=SECONDS)
    decided = time.monotonic() - begin
    installed.wait_engines("chat", 3)
    world.wait("chat", "ScalingActive", reason="Active")
    with capsys.disabled():
        print(
            f"\n{WAITING}: visible {seen:.1f} s after load (bar 15), desiredReplicas {decided:.1f} s (bar 30), ", end=""
        )
        print(f"autoscaler every {AUTOSCALER_SECONDS:g} s, scale-up window 0")
    steer(first, waiting=0)
    installed.wait_engines("chat", 1)


def test_load_is_acted_on_with_the_usual_behavior(installed: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    world, usual = installed.world, scaled(averageValue="2")
    del usual["autoscaling"]["behavior"]
    world.create("usual", **usual)
    (first,) = installed.wait_engines("usual", 1)
    installed.client.wait(
        lambda: desired_replicas(installed, "usual") == 1, "the autoscaler has begun", seconds=SECONDS
    )
    steer(first, waiting=6)
    begin = time.monotonic()
    installed.client.wait(lambda: desired_replicas(installed, "usual") > 1, "more are desired", seconds=SECONDS)
    decided = time.monotonic() - begin
    window = BEHAVIOR["scaleUp"]["stabilizationWindowSeconds"]
    with capsys.disabled():
        print(f"\n{WAITING}: desiredReplicas {decided:.1f} s after load (bar 90), ", end="")
        print(f"autoscaler every {AUTOSCALER_SECONDS:g} s, scale-up window {window}")


@pytest.mark.parametrize(
    ("metric", "load", "value"),
    [("cacheUse", {"cache": 1.0}, "1"), ("queueWaitSeconds", {"queue_wait": 1.25}, "1250m")],
)
def test_each_metric_scales_with_its_usual_target(installed: Installation, metric: str, load: JSON, value: str) -> None:
    name = metric.lower()
    installed.world.create(name, **scaled(metric, high=2))
    (engine,) = installed.wait_engines(name, 1)
    steer(engine, **load)
    installed.client.wait(
        lambda: installed.values(NAMED[metric], name) == {engine["metadata"]["name"]: value}, f"{metric} is {value}"
    )
    installed.client.wait(lambda: desired_replicas(installed, name) == 2, "two are desired", seconds=SECONDS)


def test_the_dying_the_unready_and_the_silent_never_count_and_hold_nobody_up(installed: Installation) -> None:
    """PAINS 15, 16 and 20."""
    world, client = installed.world, installed.client
    slow = {**scaled(low=4, high=12, averageValue="2"), "lifecycle": {"preStopSeconds": 90, "drainSeconds": 5}}
    world.create("crowd", **slow)
    dying, unready, silent, fine = installed.wait_engines("crowd", 4)
    for pod in (dying, unready, silent):
        steer(pod, waiting=1000)
    steer(fine, waiting=1)
    steer(unready, ready=False)
    steer(silent, hangs=True)
    # It answers for as long as it drains.
    client.delete("v1", "Pod", dying["metadata"]["name"], namespace=world.namespace)
    names = {pod["metadata"]["name"] for pod in (dying, unready, silent)}
    client.wait(lambda: not names & set(installed.values(WAITING, "crowd")), "only the fine ones count")
    steer(fine, waiting=3)

    def average() -> str:
        rows = world.child("HorizontalPodAutoscaler", "crowd")["status"].get("currentMetrics") or [{}]
        return str(rows[0].get("pods", {}).get("current", {}).get("averageValue"))

    # Of the fine one, and of the one that takes the dying one's place once it is there.
    client.wait(lambda: average() in ("3", "1500m"), "the autoscaler has looked at the fine ones", seconds=SECONDS)
    assert desired_replicas(installed, "crowd") == 4
    assert {pod["metadata"]["name"] for pod in world.pods("crowd")} >= names, "all of them are still there"
    steer(silent, hangs=False, waiting=0)
    client.wait(lambda: silent["metadata"]["name"] in installed.values(WAITING, "crowd"), "it counts again")


def test_only_the_api_server_may_ask_and_only_for_those_who_may(installed: Installation) -> None:
    with pytest.raises(ApiError, match="forbidden"):
        installed.values(WAITING, client=installed.user("nobody"))
    asks = viewer(installed)
    with pytest.raises(ApiError, match="forbidden"):
        installed.values(CACHE, client=asks)
    front_proxy = installed.plane.front_proxy
    ways = {
        "as the API server, for somebody who may": (front_proxy.client(), "viewer", 200),
        "as the API server, for somebody who may not": (front_proxy.client(), "nobody", 403),
        "without a certificate": (None, "viewer", 0),
        "as another of the same authority": (front_proxy.client("kubelet"), "viewer", 401),
        "as the API server of another cluster": (Authority.new().client(), "viewer", 0),
    }
    for pod in installed.operators():
        answers = {name: directly(installed, pod, shown, user) for name, (shown, user, _) in ways.items()}
        assert answers == {name: code for name, (_, _, code) in ways.items()}


def viewer(installed: Installation) -> Client:
    """Asks as a user who may read the one metric, and no other."""
    client, asks = installed.client, installed.user("viewer")
    rule = {"apiGroups": ["custom.metrics.k8s.io"], "resources": [f"pods/{WAITING}"], "verbs": ["get"]}
    group, metadata = "rbac.authorization.k8s.io", {"name": "waiting", "namespace": installed.world.namespace}
    client.apply({"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]})
    subject, role = {"apiGroup": group, "kind": "User", "name": "viewer"}, {"apiGroup": group, "kind": "Role"}
    binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": metadata, "subjects": [subject]}
    client.apply({**binding, "roleRef": {**role, "name": "waiting"}})
    client.wait(lambda: installed.values(WAITING, client=asks) is not None, "who may is answered")
    return asks


def directly(installed: Installation, pod: JSON, shown: Signed | None, user: str) -> int:
    """The status of a question that goes past the API server; 0: no connection."""
    service = installed.api_service()
    assert service is not None
    context = client_context(base64.b64decode(service["spec"]["caBundle"]), shown)
    # At its address, and not by its Service's name.
    context.check_hostname = False
    url = f"https://{pod['status']['podIP']}:6443{ROOT}/namespaces/{installed.world.namespace}/pods/*/{WAITING}"
    asking = urllib.request.Request(url, headers={"X-Remote-User": user})
    try:
        with urllib.request.urlopen(asking, context=context, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code
    except (urllib.error.URLError, ssl.SSLError, ConnectionError):
        return 0


def test_discovery_names_the_metrics_and_unknown_ones_are_told(installed: Installation) -> None:
    told = installed.plane.kubectl("get", "--raw", ROOT).stdout
    assert f"pods/{WAITING}" in told
    with pytest.raises(ApiError, match="pagedserve_queue_wait_seconds") as unknown:
        installed.values("pagedserve_unheard_of")
    assert unknown.value.code == 404
    with pytest.raises(ApiError) as bad:
        installed.client.request("GET", f"{ROOT}/namespaces/models/pods/*/{WAITING}?labelSelector=a%20in")
    assert bad.value.code == 400


def test_a_lost_secret_is_made_anew_while_requests_run_and_none_fails(installed: Installation) -> None:
    client = installed.client
    before = client.get("v1", "Secret", SECRET, namespace=NAMESPACE)["data"]
    with asking(installed) as failures:
        client.delete("v1", "Secret", SECRET, namespace=NAMESPACE)
        made = client.wait(lambda: client.find("v1", "Secret", SECRET, namespace=NAMESPACE), "it is made anew")
        assert made["data"]["ca.crt"] != before["ca.crt"]
        for pod in installed.operators():
            client.wait(lambda pod=pod: shown_by(pod) == made["data"]["tls.crt"], "each replica shows the new one")
    assert failures == []


@contextmanager
def asking(installed: Installation) -> Iterator[list[str]]:
    """Three clients ask all the time; the list holds their failures afterwards."""
    over, failures = Event(), list[str]()

    def ask() -> None:
        own = installed.plane.client()
        while not over.wait(0.02):
            try:
                installed.values(WAITING, client=own)
            except (ApiError, OSError) as failure:
                failures.append(str(failure))

    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(ask) for _ in range(3)]
        try:
            yield failures
        finally:
            over.set()
        for task in tasks:
            task.result()


def shown_by(pod: JSON) -> str:
    """The certificate that the pod shows, as a Secret holds it."""
    text = ssl.get_server_certificate((pod["status"]["podIP"], 6443), timeout=30)
    return base64.b64encode(text.encode()).decode()


def test_somebody_elses_registration_is_never_touched_and_ours_makes_way(installed: Installation) -> None:
    client, world = installed.client, installed.world
    world.create("torn", **scaled())
    installed.wait_engines("torn", 1)
    world.wait("torn", "ScalingActive", reason="Active", seconds=SECONDS)
    theirs = adapter("v1beta1")
    del theirs["metadata"]["uid"], theirs["metadata"]["resourceVersion"]
    theirs["spec"] |= {"groupPriorityMinimum": 100, "insecureSkipTLSVerify": True}
    made = client.create(theirs)
    client.wait(lambda: installed.api_service() is None, "ours is taken back")
    told = world.wait("torn", "ScalingActive", "False", reason="MetricsUnavailable", seconds=SECONDS)
    message = condition_of(told, "ScalingActive")["message"]
    assert "Service monitoring/prometheus-adapter" in message
    assert "manifests/prometheus-adapter" in message
    after = installed.api_service(theirs["metadata"]["name"])
    assert after is not None
    assert (after["spec"], after["metadata"]["uid"]) == (made["spec"], made["metadata"]["uid"])
    writers = {entry["manager"] for entry in after["metadata"]["managedFields"]}
    assert not {writer for writer in writers if writer.startswith("pagedserve")}
    client.delete("apiregistration.k8s.io/v1", "APIService", theirs["metadata"]["name"])
    client.wait(installed.is_available, "ours is back", seconds=SECONDS)
    world.wait("torn", "ScalingActive", reason="Active", seconds=SECONDS)


def test_each_replica_serves_and_one_is_enough(installed: Installation) -> None:
    client, world = installed.client, installed.world
    world.create("lasting", **scaled(high=1))
    (engine,) = installed.wait_engines("lasting", 1)
    steer(engine, waiting=2)
    expected = {engine["metadata"]["name"]: "2"}
    assert len(installed.operators()) == 2
    with asking(installed) as failures:
        for pod in installed.operators():
            name = pod["metadata"]["name"]
            client.delete("v1", "Pod", name, namespace=NAMESPACE)
            assert installed.values(WAITING, "lasting") == expected, "the other one answers"
            client.wait_gone("v1", "Pod", name, namespace=NAMESPACE)
            client.wait(lambda: len(installed.operators()) == 2, "there are two again", seconds=SECONDS)
    assert failures == []


def test_a_restart_of_the_api_server_changes_nothing(installed: Installation) -> None:
    world = installed.world
    world.create("restarted", **scaled(high=1))
    (engine,) = installed.wait_engines("restarted", 1)
    steer(engine, waiting=2)
    before = installed.api_service()
    assert before is not None
    installed.plane.restart_apiserver(kill=True)
    expected = {engine["metadata"]["name"]: "2"}
    installed.client.wait(
        lambda: installed.values(WAITING, "restarted") == expected, "values are back", seconds=SECONDS
    )
    after = installed.api_service()
    assert after is not None
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])


def test_where_nothing_happens_nothing_is_written(installed: Installation) -> None:
    world, audit = installed.world, installed.plane.audit
    world.create("steady", **scaled(high=1))
    installed.wait_engines("steady", 1)
    world.wait("steady", "ScalingActive", reason="Active", seconds=SECONDS)
    world.wait("steady", "Progressing", "False", reason="Complete", seconds=SECONDS)
    asks, account = viewer(installed), f"system:serviceaccount:{NAMESPACE}:pagedserve-operator"
    wait_for_two_looks(installed)
    mark = audit.mark()
    for _ in range(30):
        assert len(installed.values(WAITING, "steady", client=asks)) == 1
    reviews = [entry for entry in audit.since(mark) if entry.resource == "subjectaccessreviews"]
    # The one who asks, and the autoscaler, by each replica.
    assert 1 <= len([entry for entry in reviews if entry.user == account]) <= 4
    wait_for_two_looks(installed)
    # A question whether somebody may do something is a request to create, which creates nothing.
    assert audit.writes(mark, user=account, but=("leases", "subjectaccessreviews")) == []


def wait_for_two_looks(installed: Installation) -> None:
    """Of both replicas, at what is published."""
    audit = installed.plane.audit
    mark = audit.mark()
    installed.client.wait(
        lambda: len([entry for entry in audit.since(mark) if entry.name == NAME]) >= 4,
        "both have looked twice",
        every=1.0,
    )


def test_removing_the_manifests_takes_the_registration_and_the_namespace(installed: Installation) -> None:
    client = installed.client
    assert installed.api_service() is not None
    installed.uninstall()
    client.wait(lambda: installed.api_service() is None, "the registration is gone")
    client.wait_gone("v1", "Namespace", NAMESPACE)
    installed.install()
