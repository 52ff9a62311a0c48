"""The node stand-in runs what it is told as processes, and says of them what a kubelet would."""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from control_client import Client
from control_cluster import Cluster
from missing import skip_without
from node_container import Container, Launch
from node_spec import NotYet, command_of, environment_of, expand, probe_of, relocate
from node_stand_in import NodeStandIn, why_not

JSON = dict[str, Any]

ENGINE = """
import http.server, os, signal, sys, threading
if os.environ.get("FAIL"):
    open(os.environ["TERMINATION_MESSAGE_PATH"], "w").write(os.environ["FAIL"])
    sys.exit(3)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        text = open(os.environ["KEYS"]).read() if name == "keys" else os.environ.get(name, "")
        self.send_response(int(os.environ.get("LIVE", "200")) if name == "live" else 200)
        self.end_headers()
        self.wfile.write(text.encode())
    def log_message(self, *_):
        pass
def leave(*_):
    print("leaving", flush=True)
    if not os.environ.get("DEAF"):
        threading.Thread(target=server.shutdown).start()
server = http.server.ThreadingHTTPServer((os.environ["HOST"], 8080), Page)
signal.signal(signal.SIGTERM, leave)
print("listening", flush=True)
server.serve_forever()
"""


def pod_of(namespace: str, node: str, *, environment: JSON | None = None, **container: Any) -> JSON:
    env = [{"name": name, "value": value} for name, value in (environment or {}).items()]
    engine = {"name": "engine", "image": "engine:test", "env": env, **container}
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 5, "containers": [engine]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": namespace}, "spec": spec}


def probe(path: str, **others: Any) -> JSON:
    return {"httpGet": {"path": path, "port": 8080}, "periodSeconds": 1, **others}


@pytest.fixture
def client(control_plane: Cluster) -> Client:
    return control_plane.client()


@pytest.fixture
def node(client: Client, namespace: str, tmp_path: Path) -> Iterator[NodeStandIn]:
    if reason := why_not():
        skip_without(reason)
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    images = {"engine:test": [sys.executable, str(script)], "lost:test": None}
    with NodeStandIn(client, f"node-{namespace}", gpus=2, images=images, backoff=0.2, hurry=10) as node:
        yield node


@pytest.fixture
def see(client: Client, namespace: str) -> Callable[..., JSON]:
    """Wait until something holds of the status of the pod ``p``, and give the status."""

    def wait(holds: Callable[[JSON], Any], what: str) -> JSON:
        def probe() -> JSON | None:
            status: JSON = client.get("v1", "Pod", "p", namespace=namespace)["status"]
            return status if status.get("containerStatuses") and holds(status) else None

        return client.wait(probe, what)

    return wait


def is_ready(status: JSON) -> bool:
    return {each["type"]: each["status"] for each in status["conditions"]}.get("Ready") == "True"


def engine_of(status: JSON) -> JSON:
    state: JSON = status["containerStatuses"][0]
    return state


def page(status: JSON, name: str) -> str:
    with urllib.request.urlopen(f"http://{status['podIP']}:8080/{name}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_references_expand_from_what_came_before() -> None:
    container = {
        "env": [{"name": "A", "value": "x"}, {"name": "B", "value": "$(A)/$(C)/$$(A)"}, {"name": "C", "value": "late"}]
    }
    assert environment_of(container, {}, lambda *_: None)["B"] == "x/$(C)/$(A)"
    assert expand("a$(A)b", {"A": "1"}) == "a1b"


def test_secrets_and_fields_reach_the_environment() -> None:
    secret = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    field = {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    label = {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}
    pod = {"metadata": {"name": "p", "labels": {"app": "a"}}}
    found = environment_of({"env": [secret, field, label]}, pod, lambda kind, name: {"k": f"{kind} {name}".encode()})
    assert found == {"KEY": "Secret s", "POD": "p", "APP": "a"}


@pytest.mark.parametrize("data", [None, {}], ids=["no Secret", "no key"])
def test_a_missing_secret_keeps_the_container_from_being_made(data: dict[str, bytes] | None) -> None:
    variable = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    with pytest.raises(NotYet) as missing:
        environment_of({"env": [variable]}, {}, lambda *_: data)
    assert missing.value.reason == "CreateContainerConfigError"
    variable["valueFrom"]["secretKeyRef"]["optional"] = True  # type: ignore[index]
    assert environment_of({"env": [variable]}, {}, lambda *_: data) == {}


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("/keys", "/x"),
        ("/keys/a", "/x/a"),
        ("a=/keys:/keys/sub", "a=/x:/y"),
        ("/keysets", "/keysets"),
        ("/o/keys", "/o/keys"),
    ],
)
def test_mount_paths_are_rewritten_where_they_are_whole(text: str, local: str) -> None:
    assert relocate(text, {"/keys": "/x", "/keys/sub": "/y"}) == local


def test_an_image_stands_for_its_entrypoint() -> None:
    container = {"image": "i", "command": ["own"], "args": ["$(A)"]}
    assert command_of(container, {"i": ["stand-in"]}, {"A": "1"}) == ["stand-in", "1"]
    assert command_of(container, {}, {"A": "1"}) == ["own", "1"]
    with pytest.raises(NotYet, match="pulling image"):
        command_of(container, {"i": None}, {})


def test_a_probe_has_the_defaults_of_the_api_and_may_hurry() -> None:
    spec = {"ports": [{"name": "http", "containerPort": 80}], "livenessProbe": {"httpGet": {"port": "http"}}}
    found = probe_of(spec, "livenessProbe", hurry=5)
    assert found is not None
    assert (found.port, found.path, found.period, found.timeout, found.failures) == (80, "/", 2, 1, 3)
    assert probe_of(spec, "startupProbe") is None


def container_of(folder: Path, code: str, **spec: Any) -> Container:
    return Container(
        spec={"name": "c", "image": "i", **spec},
        address="127.0.0.1",
        folder=folder,
        prepare=lambda: Launch(command=[sys.executable, "-uc", code], environment={}),
        restarts_on=lambda _: True,
        grace=1,
        backoff=10,
        hurry=1,
    )


def has_ended(container: Container) -> bool:
    assert container._process is not None
    return container._process.poll() is not None


def test_restarts_wait_longer_each_time(tmp_path: Path) -> None:
    container = container_of(tmp_path, "raise SystemExit(4)")
    moment, gaps = 0.0, []
    for _ in range(4):
        container.tick(moment)
        assert container._process is not None
        container._process.wait()
        container.tick(moment)
        gaps.append(container._next_start - moment)
        moment = container._next_start
    assert gaps == [0, 10, 20, 40]
    assert container.status()["lastState"]["terminated"]["exitCode"] == 4
    assert container.status()["state"]["waiting"]["reason"] == "CrashLoopBackOff"


def test_an_end_is_a_sleep_then_sigterm_then_sigkill(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(15, lambda *_: print('heard')); print('up')\nwhile True: signal.pause()"
    container = container_of(tmp_path, deaf, lifecycle={"preStop": {"sleep": {"seconds": 20}}})

    def wait_for_log(text: str) -> None:
        while container.log.read_text() != text:
            assert not has_ended(container)

    container.tick(0)
    try:
        wait_for_log("up\n")
        container.leave(100, 30)
        container.tick(119.9)
        assert container._term_at == 120, "no signal before the sleep is over"
        container.tick(120)
        wait_for_log("up\nheard\n")
        container.tick(129.9)
        assert not has_ended(container)
        container.tick(130)
        assert container._process is not None
        container._process.wait(10)
        container.tick(131)
    finally:
        container.kill()
    assert container.status()["state"]["terminated"]["exitCode"] == 137
    assert container.done, "what left on order isn't restarted"


def test_a_fallback_to_the_log_needs_a_failure_and_no_message(tmp_path: Path) -> None:
    policy = "FallbackToLogsOnError"
    container = container_of(tmp_path, "print('why'); raise SystemExit(1)", terminationMessagePolicy=policy)
    container.tick(0)
    assert container._process is not None
    container._process.wait()
    container.tick(1)
    assert container.status()["lastState"]["terminated"]["message"] == "why\n"


def test_a_pod_runs_becomes_ready_and_answers_on_its_own_address(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": namespace}}
    client.create({**secret, "data": {"keys": base64.b64encode(b"one").decode()}})
    mount = {"name": "keys", "mountPath": "/etc/keys"}
    pod = pod_of(
        namespace,
        node.name,
        environment={"KEYS": "/etc/keys/keys", "PLACE": "$(KEYS)"},
        volumeMounts=[mount],
        readinessProbe=probe("/live"),
        startupProbe=probe("/live", failureThreshold=100),
    )
    pod["spec"]["volumes"] = [{"name": "keys", "secret": {"secretName": "s"}}]
    pod["spec"]["initContainers"] = [{"name": "first", "image": "i", "command": ["/bin/sh", "-c", "echo done"]}]
    client.create(pod)
    status = see(is_ready, "the pod is ready")
    assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    assert (page(status, "keys"), page(status, "HOST")) == ("one", status["podIP"])
    client.patch(secret, {"data": {"keys": base64.b64encode(b"two").decode()}})
    client.wait(lambda: page(status, "keys") == "two", "the rotated Secret is in the file")
    assert node.log("p", "first") == "done\n"


def test_a_crash_loop_shows_its_message_and_counts(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    client.create(pod_of(namespace, node.name, environment={"FAIL": "the model does not fit"}))
    status = see(lambda status: engine_of(status)["restartCount"] >= 2, "it has restarted twice")
    ended = engine_of(status)["lastState"]["terminated"]
    assert (ended["exitCode"], ended["message"], ended["reason"]) == (3, "the model does not fit", "Error")
    see(lambda status: "waiting" in engine_of(status)["state"], "it backs off")
    assert not is_ready(status)


def test_an_image_that_cannot_be_pulled_says_so(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    client.create(pod_of(namespace, node.name, image="lost:test"))
    status = see(lambda status: "message" in engine_of(status)["state"]["waiting"], "it waits")
    assert engine_of(status)["state"]["waiting"]["reason"] == "ImagePullBackOff"
    assert status["phase"] == "Pending"


def test_a_liveness_probe_that_fails_restarts_the_container(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    liveness = probe("/live", initialDelaySeconds=5, failureThreshold=2)
    client.create(pod_of(namespace, node.name, environment={"LIVE": "500"}, livenessProbe=liveness))
    status = see(lambda status: engine_of(status)["restartCount"] >= 1, "it was restarted")
    assert engine_of(status)["lastState"]["terminated"]["exitCode"] == 0


def test_a_deleted_pod_sleeps_leaves_and_goes(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    lifecycle = {"preStop": {"sleep": {"seconds": 1}}}
    client.create(pod_of(namespace, node.name, lifecycle=lifecycle, readinessProbe=probe("/live")))
    see(is_ready, "the pod is ready")
    pid = node.pids("p")["engine"]
    client.delete("v1", "Pod", "p", namespace=namespace)
    assert "leaving" not in node.log("p", "engine")
    client.wait_gone("v1", "Pod", "p", namespace=namespace)
    assert not Path(f"/proc/{pid}").exists()


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace(
    client: Client, node: NodeStandIn, namespace: str, see: Callable[..., JSON]
) -> None:
    client.create(pod_of(namespace, node.name, environment={"DEAF": "1"}, readinessProbe=probe("/live")))
    see(is_ready, "the pod is ready")
    pid = node.pids("p")["engine"]
    client.delete("v1", "Pod", "p", namespace=namespace, grace_seconds=1)
    client.wait_gone("v1", "Pod", "p", namespace=namespace)
    assert not Path(f"/proc/{pid}").exists()


def test_a_deployment_is_scheduled_rolls_out_and_nothing_of_it_outlives_the_node(
    client: Client, namespace: str, tmp_path: Path
) -> None:
    if reason := why_not():
        skip_without(reason)
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    template = pod_of(namespace, "", readinessProbe=probe("/live"), resources={"limits": {"nvidia.com/gpu": "1"}})
    del template["spec"]["nodeName"]
    labels = {"app": "d"}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "strategy": {"rollingUpdate": {"maxSurge": 0}}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": namespace},
        "spec": {**spec, "template": {"metadata": {"labels": labels}, "spec": template["spec"]}},
    }

    def rolled_out(generation: int) -> bool:
        status = client.get("apps/v1", "Deployment", "d", namespace=namespace)["status"]
        wanted = (status.get("observedGeneration"), status.get("updatedReplicas"), status.get("availableReplicas"))
        return wanted == (generation, 2, 2) and status["replicas"] == 2

    images = {"engine:test": [sys.executable, str(script)]}
    with NodeStandIn(client, f"node-{namespace}", gpus=2, images=images, hurry=10) as node:
        client.create(deployment)
        client.wait(lambda: rolled_out(1), "the Deployment is rolled out")
        change = {"spec": {"template": {"metadata": {"annotations": {"turn": "2"}}}}}
        client.patch(deployment, change)
        client.wait(lambda: rolled_out(2), "the Deployment is rolled out again")
        pods = client.list("v1", "Pod", namespace=namespace, labels="app=d")
        running = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        pids = [node.pids(name)["engine"] for name in running]
        assert len(pids) == 2
        client.delete("apps/v1", "Deployment", "d", namespace=namespace)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_real_engine_loads_serves_and_ends_a_stream_before_it_leaves(
    client: Client, namespace: str, see: Callable[..., JSON]
) -> None:
    if reason := why_not():
        skip_without(reason)
    # Here, so that the other tests neither need nor wait for torch.
    pytest.importorskip("torch")
    from models import tiny_chat_model

    settings = {"MODEL": str(tiny_chat_model()[1]), "DTYPE": "float32", "NUM_BLOCKS": "64", "SERVED_MODEL_NAME": "tiny"}
    pod = pod_of(
        namespace,
        f"node-{namespace}",
        environment=settings,
        startupProbe=probe("/health/live", failureThreshold=1200),
        readinessProbe=probe("/health/ready"),
        lifecycle={"preStop": {"sleep": {"seconds": 1}}},
    )
    pod["spec"]["terminationGracePeriodSeconds"] = 60
    images = {"engine:test": [sys.executable, "-m", "pagedserve_engine", "serve"]}
    question = {"model": "tiny", "prompt": "Once", "max_tokens": 600, "stream": True, "ignore_eos": True}
    with NodeStandIn(client, f"node-{namespace}", images=images, hurry=10):
        client.create(pod)
        status = see(is_ready, "the engine is ready")
        url = f"http://{status['podIP']}:8080/v1/completions"
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(url, data=json.dumps(question).encode(), headers=headers)
        with urllib.request.urlopen(asked, timeout=60) as stream:
            assert stream.readline().startswith(b"data: {")
            client.delete("v1", "Pod", "p", namespace=namespace)
            events = [line for line in stream if line.startswith(b"data: ")]
        assert events[-1] == b"data: [DONE]\n"
        client.wait_gone("v1", "Pod", "p", namespace=namespace)
