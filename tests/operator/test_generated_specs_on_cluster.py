"""Random specs on a real API server: it takes whatever is made of them, and the way to a spec leaves no trace."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from children import gpu_tuning
from control_client import ApiError
from control_cluster import Cluster
from live_children import LiveServer
from monitoring_kinds import install_monitoring
from operator_world import JSON, condition_of, install_crd, look_at_everything
from operators import QUICK, OperatorThread
from pagedserve_operator.desired import Facts, child_keys, decide_rollout, desired
from pagedserve_operator.kinds import CHILDREN, OPTIONAL
from pagedserve_operator.names import API_VERSION, KIND
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import plan
from spec_strategies import FEW, feasible_specs, referred_to, specs

REFUSED = {"InvalidSpec", "UnsupportedModelURI", "SecretNotFound", "NameTaken", "ChildRejected"}
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
def sequences() -> list[list[JSON]]:
    return drawn(st.lists(feasible_specs(), min_size=2, max_size=4), 12)


@pytest.fixture
def operator(
    control_plane: Cluster, namespace: str, kinds: None, sequences: list[list[JSON]]
) -> Iterator[OperatorThread]:
    # Started when all is drawn: hypothesis owns the process's random numbers while it draws.
    config = QUICK.derive(watch_namespace=namespace, read_nodes=False, operator_namespace=namespace)
    with OperatorThread(control_plane.kubeconfig, config) as running:
        yield running


def test_the_server_takes_every_spec_and_every_child_and_nothing_is_left_to_write(server: LiveServer) -> None:
    empty = {"name": "proxy", "image": "example/proxy:1", "command": [], "args": [], "env": [], "volumeMounts": []}
    known: JSON = {"model": {"uri": "hf://example/model-8B"}, "podTemplate": {"sidecars": [{**empty, "resources": {}}]}}
    known["networkPolicy"] = {"enabled": True, "allowFrom": [{"ipBlock": {"cidr": "10.1.2.3/8"}}]}
    for spec in [known, *drawn(specs(FEW), 40)]:
        owner = parse(create(server, next_name(), spec))
        tuning, facts = gpu_tuning(count=owner.spec.gpu.count), Facts(served_kinds=OPTIONAL, secrets_hash="0123")
        surge = decide_rollout(owner, tuning, facts, deployment=None)
        manifests = desired(owner, tuning, replace(facts, surge=surge))
        keys = child_keys(owner.key.name)
        server.execute(plan(owner, manifests, server.observe(keys)))
        again = plan(owner, manifests, server.observe(keys))
        assert again.empty, (again.summary, spec)
        remove(server, owner.key.name)


def test_a_resource_ends_where_a_fresh_one_with_its_last_spec_ends(
    operator: OperatorThread, server: LiveServer, sequences: list[list[JSON]]
) -> None:
    compared = 0
    for steps in sequences:
        walked, fresh = next_name(), next_name()
        last = walk(operator, server, walked, steps)
        create(server, fresh, last)
        look_at_everything(operator, server.client, times=3)
        verdicts = [is_served(server, name) for name in (walked, fresh)]
        assert verdicts[0] == verdicts[1], steps
        # Where the last spec is refused, or says to leave all as it is, what came before stays.
        if verdicts[1] and not last.get("suspend"):
            compared += 1
            ended, expected = world(server, walked, last), world(server, fresh, last)
            assert differing(ended, expected) == [], steps
        for name in (walked, fresh):
            remove(server, name)
    assert compared > len(sequences) / 2


def test_whatever_characters_a_chat_template_has_reach_the_engine(operator: OperatorThread, server: LiveServer) -> None:
    # An apply is read as YAML, which knows neither surrogate pairs nor raw control characters.
    text = "{{ '\U0001f680 \u00e9 \u2028 \ufeff \x7f \x85 \x9f \\ud83d \t' }}\r\n"
    name = next_name()
    create(server, name, {"model": {"uri": "hf://example/small-135M", "chatTemplate": text}, "gpu": {"type": "cpu"}})
    look_at_everything(operator, server.client)
    made = server.get(("ConfigMap", f"{name}-chat-template"))
    assert made["data"] == {"chat_template.jinja": text}
    remove(server, name)


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """The same examples at every run, without a search for smaller ones: each costs hundreds of calls."""
    gathered: list[Any] = []

    @given(strategy)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def gather(example: Any) -> None:
        gathered.append(example)

    gather()
    return gathered


def walk(operator: OperatorThread, server: LiveServer, name: str, steps: list[JSON]) -> JSON:
    """Create the resource and change it step by step; returns the last spec that the server took."""
    last, *others = steps
    create(server, name, last)
    for step in others:
        look_at_everything(operator, server.client)
        if change(server, name, step):
            last = step
    return last


def next_name() -> str:
    """Names of equal length, so that one can stand for another in what is compared."""
    return f"psvc-{next(_NAMES):05}"


def create(server: LiveServer, name: str, spec: JSON) -> JSON:
    metadata = {"name": name, "namespace": server.namespace}
    return server.client.create({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec})


def found(server: LiveServer, name: str) -> JSON:
    return server.client.get(API_VERSION, KIND, name, namespace=server.namespace)


def is_served(server: LiveServer, name: str) -> bool:
    """Whether the resource's newest spec is one that the operator can make children of."""
    resource = found(server, name)
    tuned = condition_of(resource, "TuningResolved")["status"] != "False"
    return tuned and condition_of(resource, "Degraded")["reason"] not in REFUSED


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


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths of what differs, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        return [row for name in names for row in differing(one.get(name), other.get(name), f"{path}.{name}")]
    return [] if one == other else [f"{path}: {one!r} is not {other!r}"]


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
