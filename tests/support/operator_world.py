"""The world around an operator under test: resources of a small model, what their status says, and what they made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from control_client import ApiError, Client
from control_cluster import Cluster
from crd import install
from operators import OperatorThread
from pagedserve_operator.assembly import Operator
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.names import API_VERSION, KIND

JSON = dict[str, Any]

ARCHITECTURE: JSON = {
    "layers": 30,
    "kvHeads": 3,
    "headDim": 64,
    "hiddenSize": 576,
    "intermediateSize": 1536,
    "vocabSize": 49152,
    "parameters": 134_515_008,
    "maxPositionEmbeddings": 8192,
}
"""Of SmolLM2 135M: fits everywhere."""
MODEL: JSON = {"uri": "hf://example/small-135M", "architecture": ARCHITECTURE}


def install_crd(control_plane: Cluster) -> None:
    """Install the CRD and wait until its resources are served; again it changes nothing."""
    install(control_plane)


def psvc(name: str, namespace: str, **spec: Any) -> JSON:
    """An InferenceService of a small model on CPUs, but for the fields of ``spec`` that are given here."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": MODEL, "gpu": {"type": "cpu"}, **spec},
    }


def condition_of(resource: JSON | None, kind: str) -> JSON:
    """The condition, empty where there is none."""
    rows = ((resource or {}).get("status") or {}).get("conditions") or ()
    return next((row for row in rows if row["type"] == kind), {})


def wait_condition(
    client: Client,
    name: str,
    namespace: str,
    kind: str,
    status: str = "True",
    *,
    reason: str | None = None,
    seconds: float = 60.0,
) -> JSON:
    """The resource, once its newest generation has been looked at and this condition holds."""
    last: list[JSON] = [{}]

    def holds() -> JSON | None:
        resource = client.get(API_VERSION, KIND, name, namespace=namespace)
        last[0] = resource.get("status") or {}
        found = condition_of(resource, kind)
        seen = last[0].get("observedGeneration", 0) >= resource["metadata"]["generation"]
        wanted = found.get("status") == status and reason in (None, found.get("reason"))
        return resource if seen and wanted else None

    what = f"{name} has {kind}={status}{f' because of {reason}' if reason else ''}"
    try:
        return client.wait(holds, what, seconds=seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{what}: its status is {last[0]}") from error


@dataclass(frozen=True)
class World:
    """One namespace as its users see it."""

    client: Client
    namespace: str

    def create(self, name: str, **spec: Any) -> JSON:
        return self.client.create(psvc(name, self.namespace, **spec))

    def get(self, name: str) -> JSON:
        return self.client.get(API_VERSION, KIND, name, namespace=self.namespace)

    def delete(self, name: str) -> None:
        self.client.delete(API_VERSION, KIND, name, namespace=self.namespace)

    def delete_all(self) -> None:
        """Delete every resource, and wait until its pods are gone."""
        for resource in self.client.list(API_VERSION, KIND, namespace=self.namespace):
            self.delete(resource["metadata"]["name"])
        self.client.wait(lambda: not self.client.list("v1", "Pod", namespace=self.namespace), "no pod is left")

    def edit(self, name: str, **spec: Any) -> JSON:
        """Merge these fields into the spec, None removes one; as a user's client does."""
        return self.client.patch(psvc(name, self.namespace), {"spec": spec}, manager="user")

    def wait(self, name: str, kind: str, status: str = "True", **how: Any) -> JSON:
        """See wait_condition."""
        return wait_condition(self.client, name, self.namespace, kind, status, **how)

    def wait_ready(self, *names: str) -> None:
        for name in names:
            self.wait(name, "Ready")

    def wait_rolled(self, name: str) -> JSON:
        """The resource, once its newest generation is ready and no rollout is under way."""

        def rolled() -> JSON | None:
            resource = self.get(name)
            rows = [condition_of(resource, kind) for kind in ("Ready", "Progressing")]
            told = [(row.get("status"), row.get("reason"), row.get("observedGeneration")) for row in rows]
            generation = resource["metadata"]["generation"]
            wanted = [("True", "Available", generation), ("False", "Complete", generation)]
            return resource if told == wanted else None

        try:
            return self.client.wait(rolled, f"{name} is rolled out")
        except TimeoutError as error:
            raise TimeoutError(f"{name} isn't rolled out: {self.get(name).get('status')}") from error

    def find(self, kind: str, name: str) -> JSON | None:
        """A child by its kind, or None."""
        return self.client.find(KINDS[kind].api_version, kind, name, namespace=self.namespace)

    def child(self, kind: str, name: str) -> JSON:
        return self.client.get(KINDS[kind].api_version, kind, name, namespace=self.namespace)

    def wait_child(self, kind: str, name: str, holds: Callable[[JSON], Any] = bool, what: str = "is there") -> JSON:
        """The child, once ``holds`` is true of it."""

        def found() -> JSON | None:
            child = self.find(kind, name)
            return child if child is not None and holds(child) else None

        return self.client.wait(found, f"{kind} {name} {what}")

    def wait_gone(self, kind: str, name: str) -> None:
        self.client.wait_gone(KINDS[kind].api_version, kind, name, namespace=self.namespace)

    def history(self, begin: JSON) -> list[JSON]:
        """Every state of the object since this one, in order: the server remembers, so that no look misses any."""
        metadata = begin["metadata"]
        selected = f"fieldSelector=metadata.name={metadata['name']}"
        return self._since(begin["apiVersion"], begin["kind"], metadata["resourceVersion"], selected)

    def pods_since(self, version: str, name: str) -> list[JSON]:
        """Every state of the resource's pods since a resource version."""
        return self._since("v1", "Pod", version, f"labelSelector=app.kubernetes.io/instance={name}")

    def _since(self, api_version: str, kind: str, version: str, selected: str) -> list[JSON]:
        path = self.client.path(api_version, kind, namespace=self.namespace)
        query = f"watch=true&timeoutSeconds=1&resourceVersion={version}&{selected}"
        told = self.client.request("GET", f"{path}?{query}")
        # One line is JSON, several are not.
        lines = [told] if isinstance(told, dict) else [json.loads(line) for line in told.splitlines()]
        assert all(line["type"] != "ERROR" for line in lines), lines
        return [line["object"] for line in lines]

    def pods(self, name: str) -> list[JSON]:
        """The pods of a resource, those being deleted included."""
        labels = f"app.kubernetes.io/instance={name}"
        return self.client.list("v1", "Pod", namespace=self.namespace, labels=labels)

    def replicasets(self, name: str) -> list[JSON]:
        labels = f"app.kubernetes.io/instance={name}"
        return self.client.list("apps/v1", "ReplicaSet", namespace=self.namespace, labels=labels)

    def replicas(self, name: str) -> int:
        """What the Deployment asks for."""
        count: int = self.child("Deployment", name)["spec"]["replicas"]
        return count

    def events(self, name: str) -> list[str]:
        """Reasons of the resource's events, as often as each was told."""
        events = self.client.list("v1", "Event", namespace=self.namespace)
        mine = [event for event in events if event["involvedObject"].get("name") == name]
        return sorted(event["reason"] for event in mine if event["involvedObject"]["kind"] == KIND)

    def secret(self, name: str, **values: str) -> JSON:
        """Create the Secret, or give it these values."""
        manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": self.namespace}}
        return self.client.apply({**manifest, "stringData": values}, manager="user")


def running(thread: OperatorThread) -> Operator:
    """The operator in a thread that was entered."""
    assert thread.operator is not None
    return thread.operator


def look_at_everything(thread: OperatorThread, client: Client, *, times: int = 1) -> None:
    """Force looks at every resource, each round to its end."""
    operator = running(thread)
    for _ in range(times):
        thread.call(operator.wake_all())
        client.wait(lambda: operator.queue.idle, "every resource has been looked at")


def settle(thread: OperatorThread, control_plane: Cluster, world: World, *, rounds: int = 10) -> None:
    """Look at everything until a round writes nothing in the world: what the controllers still do is over, too."""
    for _ in range(rounds):
        mark = control_plane.audit.mark()
        look_at_everything(thread, world.client)
        if not own_writes(control_plane, world, mark):
            return
    raise AssertionError(f"it writes round after round: {own_writes(control_plane, world, mark)}")


def own_writes(control_plane: Cluster, world: World, mark: int) -> list[str]:
    """Write requests since the mark by anybody but the tests and kubectl, Leases excepted, each in one line.

    Those in the world's namespace and those in none: an earlier test's namespace is still dying in its own time.
    """
    return [
        f"{entry.verb} {entry.namespace}/{entry.resource}/{entry.name} {entry.subresource} {entry.code}".strip()
        for entry in control_plane.audit.writes(mark, but=("leases",))
        if entry.namespace in ("", world.namespace) and not entry.user_agent.startswith(("tests", "kubectl"))
    ]


def refusal(act: Callable[[], object]) -> str:
    """What the API server says when it refuses; "" where it doesn't."""
    try:
        act()
    except ApiError as error:
        return str(error)
    return ""
