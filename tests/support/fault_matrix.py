"""Many copies of one rich resource, each in a namespace of its own, struck at its own call, and held to one end.

The calls of an undisturbed run give the addresses. As one copy's misfortune leaves the others alone, hundreds of
points are tried at a time; a death is one for all of them: each copy is held at its own call until all are there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from control_client import Client
from fault_calls import Address, Call, each_call
from fault_proxy import FaultProxy
from fault_rules import Fault, Rule
from golden_state import difference, resource_of, states
from operator_world import MODEL, look_at_everything, psvc
from operators import OperatorThread
from pagedserve_operator.names import API_VERSION, KIND

JSON = dict[str, Any]

NAME = "it"
_PREFIX = "herd-"
SETTLING_SECONDS = 400.0
POLLING_SECONDS = 0.5
NUDGING_SECONDS = 10.0
_FEW = 3
_SAME = 6

_CREATED: JSON = {
    "model": {**MODEL, "chatTemplate": "{{ messages }}"},
    "gpu": {"type": "L4"},
    "autoscaling": {"minReplicas": 2, "maxReplicas": 4},
    "rollout": {"strategy": "InPlace"},
    "cache": {"newClaim": {"size": "10Gi", "storageClassName": "by-hand", "accessMode": "ReadWriteMany"}},
    "auth": {"hfTokenSecretRef": {"name": "hub"}, "apiKeysSecretRef": {"name": "hub", "key": "keys"}},
    "networkPolicy": {"enabled": True},
}
_EDIT: JSON = {
    # Rolls the pods, turns autoscaling off, and leaves two children without a reason to be.
    "model": {"maxModelLen": 2048, "chatTemplate": None},
    "autoscaling": None,
    "replicas": 1,
    "networkPolicy": {"enabled": False},
}


class Operation(StrEnum):
    """What a user does to the resource."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


@dataclass(frozen=True)
class Point:
    """One fault at one call of the run of one copy."""

    address: Address
    rule: Rule

    @property
    def met(self) -> bool:
        return self.rule.fired


@dataclass
class Tally:
    """What was tried: a point is not met where the run had fewer looks than the undisturbed one."""

    tried: int = 0
    met: int = 0
    missed: list[str] = field(default_factory=list)

    def add(self, operation: Operation, points: Iterable[Point]) -> None:
        """Count points whose runs are over."""
        for point in points:
            self.tried += 1
            self.met += point.met
            if not point.met:
                self.missed.append(f"{operation}: {point.address}")


@dataclass
class Herd:
    """The copies. ``golden`` is the state and ``addresses`` are the calls of the undisturbed run, by operation."""

    client: Client
    proxy: FaultProxy
    golden: dict[Operation, JSON] = field(default_factory=dict)
    addresses: dict[Operation, list[Address]] = field(default_factory=dict)
    shared: list[Address] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    _nudged: float = 0.0
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    @property
    def most_calls(self) -> int:
        """Of one operation's undisturbed run."""
        return max(len(calls) for calls in self.addresses.values())

    def namespaces(self, count: int) -> list[str]:
        """New namespaces with what the resource refers to; all of one length, as their names stand in the dumps."""
        names = [f"{_PREFIX}{next(self._numbers):05d}" for _ in range(count)]
        for name in names:
            self.client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
            self.client.create(_volume(name))
            self.client.create(_secret(name))
        self.client.wait(lambda: self._have_accounts(names), "every namespace has its service account")
        return names

    def act(self, operation: Operation, namespace: str) -> None:
        """Do it as a user does."""
        if operation is Operation.CREATE:
            self.client.create(psvc(NAME, namespace, **_CREATED))
        elif operation is Operation.UPDATE:
            self.client.patch(psvc(NAME, namespace), {"spec": _EDIT}, manager="user")
        else:
            self.client.delete(API_VERSION, KIND, NAME, namespace=namespace)

    def record(self, operation: Operation, namespace: str, settled: Callable[[JSON], bool]) -> None:
        """The undisturbed run: keep its calls and, once ``settled`` holds of it, its state."""
        mark = self.proxy.mark()
        self.act(operation, namespace)
        seen: list[JSON] = []

        def at_rest() -> bool:
            """Settled, and the same as a while ago: controllers still tidy up behind a resource that is ready."""
            seen.append(self._states([namespace])[namespace])
            return settled(seen[-1]) and seen[-_SAME:] == [seen[-1]] * _SAME

        self.client.wait(at_rest, f"the undisturbed {operation} is at rest", every=POLLING_SECONDS)
        self.golden[operation] = seen[-1]
        self.addresses[operation] = each_call(self.proxy.since(mark, lambda call: call.namespace == namespace))

    def place(self, fault: Fault, address: Address, namespace: str) -> Point:
        """Strike the call at ``address``, counted from now on, in the run of the copy in ``namespace``."""

        def its(call: Call) -> bool:
            return call.namespace == namespace and address.alike(call)

        return Point(address, self.proxy.inject(fault, its, skip=address.index))

    def run(self, operation: Operation, namespaces: Collection[str], points: Sequence[Point]) -> None:
        """Do it to every copy, wait for the golden state, and count the points."""
        for namespace in namespaces:
            self.act(operation, namespace)
        self.await_golden(operation, namespaces)
        self.close(operation, points)

    def wait_held(self, operation: Operation, namespaces: Collection[str], held: Collection[str]) -> None:
        """Until every copy is held at its point, or at the end of a run that never comes there.

        ``held`` grows meanwhile: the faults that hold the copies add to it.
        """
        deadline = time.monotonic() + SETTLING_SECONDS
        while left := set(namespaces).difference(held):
            behind = self._behind(operation, left)
            if not behind:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"{operation}, to be held: {self._told(operation, behind)}")
            self._pause(left)

    def close(self, operation: Operation, points: Sequence[Point]) -> None:
        """These runs are over."""
        self.proxy.heal()
        self.tally.add(operation, points)

    def assert_quiet(self, thread: OperatorThread, operation: Operation, namespaces: Collection[str]) -> None:
        """One more look at everything writes nothing, and every copy is still as it was: the end is an end."""
        mark = self.proxy.mark()
        look_at_everything(thread, self.client)
        written = self.proxy.since(mark, lambda call: call.writes and call.resource != "leases")
        assert not written, f"{len(written)} writes after the end, such as {written[:3]}"
        assert not self._behind(operation, namespaces)

    def await_golden(self, operation: Operation, namespaces: Collection[str]) -> None:
        """Until every copy is as the undisturbed run left its own; the error names what differs and where."""
        deadline = time.monotonic() + SETTLING_SECONDS
        left: dict[str, JSON] = {name: {} for name in namespaces}
        while left:
            left = self._behind(operation, left)
            if left and time.monotonic() > deadline:
                raise AssertionError(f"{operation}: {self._told(operation, left)}")
            self._pause(left)

    def _behind(self, operation: Operation, namespaces: Collection[str]) -> dict[str, JSON]:
        """The states of the copies that are not as the undisturbed run left its own."""
        wanted = self.golden[operation]
        if len(namespaces) > _FEW:
            # Reading everything takes the time that the operator needs.
            resources = states(self.client, set(namespaces), whole=False)
            early = {name: state for name, state in resources.items() if state != resource_of(wanted)}
            if len(early) > _FEW:
                return early
        return {name: state for name, state in self._states(namespaces).items() if state != wanted}

    def _told(self, operation: Operation, behind: Collection[str]) -> str:
        name = min(behind)
        lines = itertools.islice(difference(self.golden[operation], self._states([name])[name]), 20)
        return "\n".join([f"{len(behind)} copies differ, such as {name}:", *lines])

    def _pause(self, namespaces: Collection[str]) -> None:
        """Have pods made anew that the scheduler has put aside: it may miss that their claim was bound meanwhile."""
        time.sleep(POLLING_SECONDS)
        if time.monotonic() - self._nudged < NUDGING_SECONDS:
            return
        self._nudged = time.monotonic()
        for pod in self.client.list("v1", "Pod"):
            metadata = pod["metadata"]
            if metadata["namespace"] in namespaces and not pod["spec"].get("nodeName"):
                self.client.delete("v1", "Pod", metadata["name"], namespace=metadata["namespace"], grace_seconds=0)

    def _states(self, namespaces: Collection[str]) -> dict[str, JSON]:
        return states(self.client, set(namespaces))

    def _have_accounts(self, names: Sequence[str]) -> bool:
        accounts = {item["metadata"]["namespace"] for item in self.client.list("v1", "ServiceAccount")}
        return accounts.issuperset(names)


def is_of_a_copy(call: Call) -> bool:
    """Whether it is about one copy, and not one that all of them share."""
    return call.namespace.startswith(_PREFIX)


def _volume(namespace: str) -> JSON:
    """A volume that waits for the copy's claim."""
    spec = {
        "capacity": {"storage": "10Gi"},
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "by-hand",
        "hostPath": {"path": "/nowhere"},
        "claimRef": {"namespace": namespace, "name": f"{NAME}-model-cache"},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"of-{namespace}"}, "spec": spec}


def _secret(namespace: str) -> JSON:
    values = {"token": "of the hub", "keys": "of clients"}
    metadata = {"name": "hub", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
