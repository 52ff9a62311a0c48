"""Whatever befalls the operator at whichever call, it ends where an undisturbed run ends.

One resource with every kind of child is created, updated and deleted. Each call of that is struck by each kind of
fault, and the operator dies before and after each.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control_cluster import Cluster
from fake_nodes import FakeNodes
from fault_calls import Address, Call
from fault_matrix import NAME, Herd, Operation, Point, is_of_a_copy
from fault_proxy import FaultProxy
from fault_rules import Fault, When
from operator_world import condition_of, install_crd
from operators import QUICK, OperatorProcess, OperatorThread, RestartedOperator
from pagedserve_operator.names import API_VERSION, KIND

JSON = dict[str, Any]

# Hundreds of copies live through each test; on a busy machine that takes its time.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

FAULTS = (
    Fault.status(409),
    Fault.status(429),
    Fault.status(500),
    Fault.status(503),
    Fault.reset(),
    Fault.timeout_after_commit(),
    Fault.timeout_after_commit(seconds=None),
)
FAULTS_OF_A_RUN = 3
"""One copy meets so many, far apart: each costs a look, and what was done before is found done."""
STARTS = 8
CONFIG = replace(
    QUICK,
    workers=16,
    request_seconds=3.0,
    gather_seconds=1.0,
    lease_seconds=60.0,
    renew_deadline_seconds=40.0,
    renew_seconds=1.0,
)
"""Few looks, each with many events: what counts is that each call of a look is struck."""
_LEASE = ("lease_seconds", "renew_deadline_seconds", "renew_seconds")
HOLDING = replace(CONFIG, workers=400, request_seconds=100.0)
"""Every copy may hold a worker at its point."""


@pytest.fixture(scope="module")
def herd(control_plane: Cluster, _kubelets: FakeNodes, request: pytest.FixtureRequest) -> Iterator[Herd]:
    """An undisturbed run has given the golden states and the calls."""
    install_crd(control_plane)
    _kubelets.add_gpu_node("fault-matrix", gpus=5001, pods=10_000, cpu="20001", memory="90Ti")
    with FaultProxy(control_plane.url, ca=control_plane.ca, token=control_plane.token) as proxy:
        herd = Herd(control_plane.client(), proxy)
        with OperatorThread(proxy.kubeconfig(), CONFIG):
            (first,) = herd.namespaces(1)
            herd.record(Operation.CREATE, first, _is_made)
            herd.shared = _shared(proxy)
            herd.record(Operation.UPDATE, first, _is_updated)
            herd.record(Operation.DELETE, first, lambda state: not state)
        yield herd
        _print(request, herd)
    _kubelets.clear()


def test_a_fault_at_any_call_changes_nothing_in_the_end(herd: Herd) -> None:
    runs = -(-herd.most_calls // FAULTS_OF_A_RUN)
    namespaces = herd.namespaces(runs * len(FAULTS))
    with OperatorThread(herd.proxy.kubeconfig(), CONFIG) as thread:
        for operation in Operation:
            points = [
                herd.place(fault, address, namespaces[kind * runs + number % runs])
                for kind, fault in enumerate(FAULTS)
                for number, address in enumerate(herd.addresses[operation])
            ]
            herd.run(operation, namespaces, points)
            herd.assert_quiet(thread, operation, namespaces)


def test_a_death_before_or_after_any_call_changes_nothing_in_the_end(herd: Herd) -> None:
    namespaces = herd.namespaces(2 * herd.most_calls)
    for operation in Operation:
        with OperatorThread(herd.proxy.kubeconfig(), HOLDING) as doomed:
            points = _hold(herd, operation, herd.addresses[operation], namespaces)
            doomed.die()
            doomed.join()
        herd.close(operation, points)
        with OperatorThread(herd.proxy.kubeconfig(), CONFIG) as thread:
            herd.await_golden(operation, namespaces)
            herd.assert_quiet(thread, operation, namespaces)


def test_a_sigkill_before_or_after_each_kind_of_call_changes_nothing_in_the_end(herd: Herd, tmp_path: Path) -> None:
    kinds = {
        operation: [address for address in calls if address.index == 0] for operation, calls in herd.addresses.items()
    }
    namespaces = herd.namespaces(2 * max(len(calls) for calls in kinds.values()))
    names = ("identity", "workers", "request_seconds", "gather_seconds")
    settings = {name.upper(): str(getattr(HOLDING, name)) for name in (*names, *_LEASE)}
    with OperatorProcess(herd.proxy.kubeconfig(), tmp_path, **settings) as process:
        for operation in Operation:
            points = _hold(herd, operation, kinds[operation], namespaces)
            process.kill()
            herd.close(operation, points)
            process.start()
            herd.await_golden(operation, namespaces)


def _hold(herd: Herd, operation: Operation, addresses: Sequence[Address], namespaces: Sequence[str]) -> list[Point]:
    """Every copy is at its point, before or after its call; the next step is the operator's death."""
    held: set[str] = set()

    def hold(call: Call) -> None:
        held.add(call.namespace)

    deaths = (Fault.crash_before(hold), Fault.crash_after(hold))
    places = zip(itertools.product(addresses, deaths), namespaces, strict=False)
    points = [herd.place(fault, address, namespace) for (address, fault), namespace in places]
    for namespace in namespaces:
        herd.act(operation, namespace)
    herd.wait_held(operation, namespaces, held)
    return points


def test_a_resource_deleted_while_any_write_is_on_its_way_leaves_nothing(herd: Herd) -> None:
    writes = [
        address
        for address in herd.addresses[Operation.CREATE]
        if address.index == 0 and address.verb in ("apply", "create", "patch")
    ]
    namespaces = herd.namespaces(len(writes))
    with OperatorThread(herd.proxy.kubeconfig(), HOLDING) as thread, contextlib.ExitStack() as gates:
        for address, namespace in zip(writes, namespaces, strict=True):
            gate = gates.enter_context(herd.proxy.hold(_at(address, namespace)))
            herd.act(Operation.CREATE, namespace)
            gate.wait_for_held()
            herd.act(Operation.DELETE, namespace)
            herd.client.wait_gone(API_VERSION, KIND, NAME, namespace=namespace)
            gate.release()
        herd.await_golden(Operation.DELETE, namespaces)
        herd.assert_quiet(thread, Operation.DELETE, namespaces)


@pytest.mark.parametrize(
    "faults", [FAULTS[:2], FAULTS[2:4], FAULTS[4:6], FAULTS[6:]], ids=["busy", "in trouble", "cut", "hanging"]
)
def test_faults_at_the_calls_that_all_share_change_nothing_in_the_end(herd: Herd, faults: Sequence[Fault]) -> None:
    """Some of them end the operator, which is then started again; some calls are made once in a start."""
    namespaces = herd.namespaces(2)
    points = [
        Point(address, herd.proxy.inject(fault, _at_shared(address)))
        for address, fault in itertools.product(herd.shared, faults)
    ]
    with RestartedOperator(herd.proxy.kubeconfig(), CONFIG) as operator:
        for namespace in namespaces:
            herd.act(Operation.CREATE, namespace)
        for _ in range(STARTS):
            herd.await_golden(Operation.CREATE, namespaces)
            if all(point.met for point in points):
                break
            operator.start_again()
        herd.await_golden(Operation.CREATE, namespaces)
        herd.close(Operation.CREATE, points)
        herd.assert_quiet(operator.thread, Operation.CREATE, namespaces)


def _at(address: Address, namespace: str) -> When:
    return lambda call: call.namespace == namespace and address.alike(call)


def _at_shared(address: Address) -> When:
    return lambda call: not is_of_a_copy(call) and address.alike(call)


def _shared(proxy: FaultProxy) -> list[Address]:
    """Each kind of call that is no resource's own: the lease's, nodes', discovery's, and those of kopf's session."""
    calls = [call for call in proxy.calls if not is_of_a_copy(call)]
    sorts = dict.fromkeys((call.verb, call.resource, call.subresource) for call in calls)
    return [Address(*sort, 0) for sort in sorts]


def _is_made(state: JSON) -> bool:
    """Every condition has come to rest; the autoscaler says that it has no metrics."""
    resource = _resource(state)
    resting = condition_of(resource, "Progressing").get("reason") == "Complete"
    return resting and condition_of(resource, "ScalingActive").get("status") == "False"


def _is_updated(state: JSON) -> bool:
    resource = _resource(state)
    ready = f"{resource.get('status', {}).get('updatedReplicas')} {len(state.get('Pod', ()))}"
    complete = condition_of(resource, "Progressing")
    return ready == "1 1" and (complete.get("reason"), complete.get("observedGeneration")) == ("Complete", 2)


def _resource(state: JSON) -> JSON:
    found: JSON = next(iter(state.get("InferenceService", ())), {})
    return found


def _print(request: pytest.FixtureRequest, herd: Herd) -> None:
    """The table of injected faults belongs to the run's output, whatever pytest captures."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{herd.proxy.table()}\npoints tried {herd.tally.tried}, met {herd.tally.met}")
        print("not met, as their runs had fewer looks:", *sorted(set(herd.tally.missed)), sep="\n  ")
