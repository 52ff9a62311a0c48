"""Random specs on a real API server: it takes whatever is made of them, and the way to a spec leaves no trace."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from children import gpu_tuning
from control_client import ApiError
from control_cluster import Cluster
from live_children import LiveServer
from monitoring_kinds import install_monitoring
from operator_world import JSON, condition_of, install_crd, look_at_everything
from operators import QUICK, OperatorThread
from pagedserve_operator.desired import Facts, child_keys, decide_rollout, desired
from pagedserve_operator.errors import SpecError
from pagedserve_operator.kinds import CHILDREN, OPTIONAL
from pagedserve_operator.names import API_VERSION, KIND
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import plan
from spec_strategies import FEW, feasible_specs, referred_to, specs

# A smaller example costs hundreds of calls; what is drawn is printed as it is.
LIVE = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
    phases=[Phase.generate],
)
SEQUENCES = settings(LIVE, max_examples=10)
_NAMES = itertools.count(1)


@pytest.fixture(scope="module")
def kinds(control_plane: Cluster) -> None:
    install_crd(control_plane)
    install_monitoring(control_plane)


@pytest.fixture
def server(control_plane: Cluster, namespace: str, kinds: None) -> LiveServer:
    client = control_plane.client()
    for manifest in referred_to(namespace):
        client.create(manifest)
    return LiveServer(client, namespace)


@pytest.fixture
def operator(control_plane: Cluster, namespace: str, kinds: None) -> Iterator[OperatorThread]:
    config = QUICK.derive(watch_namespace=namespace, read_nodes=False, operator_namespace=namespace)
    with OperatorThread(control_plane.kubeconfig, config) as running:
        yield running


@given(spec=specs(FEW))
@LIVE
def test_the_server_takes_every_spec_and_every_child_and_nothing_is_left_to_write(
    server: LiveServer, spec: JSON
) -> None:
    note(json.dumps(spec))
    raw = create(server, next_name(), spec)
    service = parse(raw)
    tuning, keys = gpu_tuning(count=service.spec.gpu.count), child_keys(service.key.name)
    facts = Facts(served_kinds=OPTIONAL, secrets_hash="0123")
    surge = decide_or_assume(service, tuning, facts)
    manifests = desired(service, tuning, Facts(served_kinds=OPTIONAL, secrets_hash="0123", surge=surge))
    server.execute(plan(service, manifests, server.observe(keys)))
    again = plan(service, manifests, server.observe(keys))
    assert again.empty, again.summary
    remove(server, service.key.name)


@given(steps=st.lists(feasible_specs(), min_size=2, max_size=4))
@SEQUENCES
def test_a_resource_ends_where_a_fresh_one_with_its_last_spec_ends(
    operator: OperatorThread, server: LiveServer, steps: list[JSON]
) -> None:
    note("\n".join(map(json.dumps, steps)))
    walked, fresh = next_name(), next_name()
    # A suspended resource ends where it was.
    steps = [*steps[:-1], {**steps[-1], "suspend": False}]
    last = steps[0]
    create(server, walked, last)
    for step in steps[1:]:
        look_at_everything(operator, server.client)
        if change(server, walked, step):
            last = step
    assume(not last.get("suspend"))
    create(server, fresh, last)
    look_at_everything(operator, server.client, times=3)
    verdicts = [condition_of(found(server, name), "TuningResolved").get("status") for name in (walked, fresh)]
    assert verdicts[0] == verdicts[1]
    # Where the last spec is refused, what came before stays.
    assume(verdicts[1] == "True" and condition_of(found(server, fresh), "Degraded")["status"] == "False")
    assert world(server, walked, last) == world(server, fresh, last)
    for name in (walked, fresh):
        remove(server, name)


def test_whatever_characters_a_chat_template_has_reach_the_engine(operator: OperatorThread, server: LiveServer) -> None:
    # An apply is read as YAML, which knows neither surrogate pairs nor raw control characters.
    text = "{{ '\U0001f680 \u00e9 \u2028 \ufeff \x7f \x85 \x9f \\ud83d \t' }}\r\n"
    name = next_name()
    create(server, name, {"model": {"uri": "hf://example/small-135M", "chatTemplate": text}, "gpu": {"type": "cpu"}})
    look_at_everything(operator, server.client)
    made = server.get(("ConfigMap", f"{name}-chat-template"))
    assert made["data"] == {"chat_template.jinja": text}
    remove(server, name)


def next_name() -> str:
    """Names of equal length, so that one can stand for another in what is compared."""
    return f"psvc-{next(_NAMES):05}"


def create(server: LiveServer, name: str, spec: JSON) -> JSON:
    metadata = {"name": name, "namespace": server.namespace}
    return server.client.create({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec})


def found(server: LiveServer, name: str) -> JSON:
    return server.client.get(API_VERSION, KIND, name, namespace=server.namespace)


def change(server: LiveServer, name: str, spec: JSON) -> bool:
    """Whether the server allows it: a claim's size, for one, can't shrink."""

    def replaced() -> bool:
        # The operator may have written the status between the two calls.
        try:
            server.client.replace({**found(server, name), "spec": spec})
        except ApiError as error:
            if error.code != 422:
                raise
            return False
        return True

    return bool(server.client.wait(lambda: [replaced()], f"{name} is changed")[0])


def remove(server: LiveServer, name: str) -> None:
    server.client.delete(API_VERSION, KIND, name, namespace=server.namespace)


def decide_or_assume(service: Any, tuning: Any, facts: Facts) -> int | None:
    """The surge of a creation; a spec that the operator refuses in words is no case here."""
    try:
        desired(service, tuning, facts)
    except SpecError:
        assume(False)
    return decide_rollout(service, tuning, facts, deployment=None)


def world(server: LiveServer, name: str, spec: JSON) -> JSON:
    """Every child and the decisions in the status, without what must differ between two resources."""
    children = {kind: server.find(key) for key in child_keys(name) for kind in [key[0]]}
    assert set(children) == set(CHILDREN)
    status = found(server, name)["status"]
    seen = {
        **{kind: None if child is None else stripped(child, spec) for kind, child in children.items()},
        "tuning": status.get("tuning"),
        "url": status.get("url"),
    }
    return json.loads(json.dumps(seen, sort_keys=True).replace(name, "NAME"))


def stripped(child: JSON, spec: JSON) -> JSON:
    """What the operator is answerable for."""
    child.pop("status", None)
    metadata, body = child["metadata"], child.get("spec", {})
    child["metadata"] = {name: metadata.get(name) for name in ("labels", "annotations")}
    annotations = child["metadata"]["annotations"] or {}
    annotations.pop("deployment.kubernetes.io/revision", None)
    if child["kind"] == "Deployment":
        if "replicas" not in spec:
            # Absent means the current count, and under an autoscaler it is nobody's but the autoscaler's.
            del body["replicas"]
        if spec.get("rollout", {}).get("strategy", "Auto") == "Auto":
            # Decided by what was free when the template changed.
            del body["strategy"]
        annotations.pop("pagedserve.dev/rollout", None)
    if child["kind"] == "Service":
        for field in ("clusterIP", "clusterIPs", "healthCheckNodePort"):
            body.pop(field, None)
        for port in body["ports"]:
            port.pop("nodePort", None)
    return child
