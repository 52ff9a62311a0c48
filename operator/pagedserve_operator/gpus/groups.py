"""Nodes that are alike to a pod, in the order in which ``auto`` takes them, and what is free on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pagedserve_operator.fields import quantity
from pagedserve_operator.gpus.catalogue import canonical, find
from pagedserve_operator.gpus.labels import NodeGpu, read_node
from pagedserve_operator.spec import Json

GPU_TAINT = "nvidia.com/gpu"
"""The taint that keeps other pods from GPU nodes; pods that request a GPU tolerate it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes with the same product as the same resource, sliced or shared alike; never empty."""

    nodes: tuple[NodeGpu, ...]

    @property
    def product(self) -> str:
        """As the catalogue names it; as the label does where it is unknown."""
        name = self.nodes[0].product
        model = find(name)
        return name if model is None else model.product

    @property
    def mig_profile(self) -> str | None:
        """None for whole devices."""
        return self.nodes[0].mig_profile

    @property
    def resource(self) -> str:
        """What pods request."""
        return self.nodes[0].resource

    @property
    def devices(self) -> int:
        """Devices, slices or shares on nodes that take pods."""
        return sum(node.allocatable for node in self.nodes if node.schedulable)

    @property
    def is_whole(self) -> bool:
        """Whether a device is neither sliced nor shared."""
        return self.nodes[0].is_whole

    @property
    def largest_node(self) -> int:
        """The most devices that one node has."""
        return max(node.allocatable for node in self.nodes)

    @property
    def title(self) -> str:
        """The product with its slice or share, to print."""
        profile = f" MIG {self.mig_profile}" if self.mig_profile else ""
        shared = f" shared by {self.nodes[0].replicas}" if self.nodes[0].replicas > 1 else ""
        return f"{self.product}{profile}{shared}"

    @property
    def pin(self) -> dict[str, tuple[str, ...]]:
        """Allowed values of the label that names the product; of several such labels, the one most nodes have."""
        keys = Counter(key for node in self.nodes for key in node.pin)
        if not keys:
            return {}
        key = min(keys, key=lambda name: (-keys[name], name))
        return {key: tuple(sorted({node.pin[key] for node in self.nodes if key in node.pin}))}


def group_nodes(nodes: Iterable[NodeGpu], *, count: int) -> tuple[Group, ...]:
    """Groups, the first to take first: ``count`` devices on one node, whole ones, many, large, by name."""
    alike: dict[tuple[str, str, str | None, bool], list[NodeGpu]] = {}
    for node in nodes:
        key = (canonical(node.product), node.resource, node.mig_profile, node.replicas > 1)
        alike.setdefault(key, []).append(node)
    groups = (Group(tuple(members)) for members in alike.values())
    return tuple(sorted(groups, key=lambda group: _rank(group, count)))


def _rank(group: Group, count: int) -> tuple[bool, bool, int, int, str, str]:
    model = find(group.product)
    memory = min((node.memory_mib or (model.memory_mib if model else 0) // node.replicas) for node in group.nodes)
    return (group.largest_node < count, not group.is_whole, -group.devices, -memory, group.product, group.resource)


def allowed(node: NodeGpu, selector: Mapping[str, str], tolerations: Sequence[Json]) -> bool:
    """Whether a pod with this node selector and these tolerations may run on the node, cordoned or not."""
    if any(node.labels.get(key) != value for key, value in selector.items()):
        return False
    hard = [taint for taint in node.taints if taint.get("effect") in ("NoSchedule", "NoExecute")]
    # A cordon and a node that isn't ready pass; which product there is doesn't depend on them.
    own = [taint for taint in hard if not str(taint.get("key")).startswith("node.kubernetes.io/")]
    return all(taint.get("key") == GPU_TAINT or any(_tolerates(it, taint) for it in tolerations) for taint in own)


def _tolerates(toleration: Json, taint: Json) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint.get("key"))
    return toleration.get("key") == taint.get("key") and (toleration.get("value") or "") == (taint.get("value") or "")


def most_free(
    nodes: Sequence[Json],
    pods: Sequence[Json],
    *,
    resource: str,
    pin: Mapping[str, tuple[str, ...]],
    node_selector: Mapping[str, str],
    tolerations: Sequence[Json],
) -> int:
    """The most devices of ``resource`` that are free on one node that such a pod may run on.

    A pod that ends still holds its devices, and one that waits for a node may take any that it can land on: both count.
    """
    used: Counter[str] = Counter()
    waiting: list[tuple[Json, int]] = []
    for pod in pods:
        spec, wanted = pod.get("spec") or {}, _requested(pod, resource)
        if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") or not wanted:
            continue
        if spec.get("nodeName"):
            used[spec["nodeName"]] += wanted
        else:
            waiting.append((spec, wanted))
    free = [
        gpu.allocatable - used[gpu.node] - sum(wanted for spec, wanted in waiting if _may_land(spec, gpu))
        for node in nodes
        for gpu in read_node(node)
        if gpu.resource == resource
        and gpu.schedulable
        and allowed(gpu, node_selector, tolerations)
        and all(gpu.labels.get(key) in values for key, values in pin.items())
    ]
    return max(0, max(free, default=0))


def _may_land(spec: Json, gpu: NodeGpu) -> bool:
    """Whether a pod's selector and required affinity leave it this node; only the operator In shuts one out."""
    if any(gpu.labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms") or ()
    return not terms or any(_fits(term, gpu) for term in terms)


def _fits(term: Json, gpu: NodeGpu) -> bool:
    return all(
        gpu.labels.get(row.get("key", "")) in (row.get("values") or ())
        for row in term.get("matchExpressions") or ()
        if row.get("operator") == "In"
    )


def _requested(pod: Json, resource: str) -> int:
    spec = pod.get("spec") or {}
    together = [*(spec.get("containers") or ())]
    first: list[Json] = []
    for container in spec.get("initContainers") or ():
        (together if container.get("restartPolicy") == "Always" else first).append(container)
    return max([sum(_amount(one, resource) for one in together), *(_amount(one, resource) for one in first)])


def _amount(container: Json, resource: str) -> int:
    resources = container.get("resources") or {}
    value = (resources.get("requests") or {}).get(resource) or (resources.get("limits") or {}).get(resource) or 0
    try:
        return int(quantity(value))
    except ValueError:
        return 0
