"""What a node tells of its GPUs: labels of GPU feature discovery first, then GKE's, then Karpenter's and EKS's.

Time-slicing and MPS show as ``nvidia.com/gpu.replicas`` and a product that ends in ``-SHARED`` (or as the resource
``nvidia.com/gpu.shared``); MIG's single strategy as a product that ends in ``-MIG-<profile>``, with the slice's memory
in the plain labels; its mixed strategy as resources ``nvidia.com/mig-<profile>`` with labels of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.fields import quantity
from pagedserve_operator.gpus.catalogue import find
from pagedserve_operator.spec import Json

WHOLE: Final = "nvidia.com/gpu"
SHARED: Final = "nvidia.com/gpu.shared"
MIG_PREFIX: Final = "nvidia.com/mig-"

PRODUCT_LABELS: Final = (
    "nvidia.com/gpu.product",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "eks.amazonaws.com/instance-gpu-name",
)
"""In order of trust; the first that a node has names its product."""
_NOMINAL_MEMORY_LABELS: Final = ("karpenter.k8s.aws/instance-gpu-memory", "eks.amazonaws.com/instance-gpu-memory")
_GKE_PARTITION: Final = "cloud.google.com/gke-gpu-partition-size"
_GKE_SHARES: Final = "cloud.google.com/gke-max-shared-clients-per-gpu"

_SLICE_OF_PRODUCT: Final = re.compile(r"(?i)-MIG-(\d+g\.\d+gb\S*)$")
_PROFILE: Final = re.compile(r"(\d+)g\.(\d+)gb")
_SLICE_MIB_OF_GB: Final = 972
"""MiB that a slice has for each GB of its profile's name, at least: 4864 for 1g.5gb, 9728 for 1g.10gb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGpu:
    """GPUs of one kind on one node, as pods can request them."""

    node: str
    product: str
    """As the label prints it, without ``-SHARED`` and ``-MIG-<profile>``; empty where no label names it."""
    memory_mib: int | None
    """Of one device, MIG slice or share; None where no label tells."""
    resource: str
    """What a pod requests: ``nvidia.com/gpu``, ``nvidia.com/gpu.shared``, ``nvidia.com/mig-1g.10gb``."""
    allocatable: int
    """Of that resource."""
    replicas: int
    """Shares that one device is divided into; 1 where it isn't."""
    mig_profile: str | None
    """``1g.10gb``; None for whole devices."""
    compute_capability: tuple[int, int] | None
    """From the labels; None where they don't tell."""
    pin: Mapping[str, str]
    """The label that ties a pod to nodes with this product, by key; empty without one."""
    labels: Mapping[str, str]
    """All labels of the node, for node selectors."""
    taints: tuple[Json, ...]
    """All taints of the node, for tolerations."""
    schedulable: bool
    """Whether the node takes new pods (neither cordoned nor unready)."""

    @property
    def is_whole(self) -> bool:
        """Whether a device is neither sliced nor shared."""
        return self.mig_profile is None and self.replicas == 1


def read_node(node: Json) -> tuple[NodeGpu, ...]:
    """The node's GPUs, one for each resource that pods can request; empty where it has none."""
    metadata, status = node.get("metadata") or {}, node.get("status") or {}
    labels: dict[str, str] = metadata.get("labels") or {}
    key, label = next(((key, labels[key]) for key in PRODUCT_LABELS if labels.get(key)), ("", ""))
    product, slice_of_product, named_shared = split_product(label)
    found = []
    for resource, allocatable in _resources(status.get("allocatable") or {}):
        profile = _profile_of_resource(resource) or slice_of_product or labels.get(_GKE_PARTITION) or None
        shared = named_shared or resource.endswith(".shared")
        replicas = _replicas(labels, resource, allocatable, shared=shared)
        found.append(
            NodeGpu(
                node=str(metadata.get("name", "")),
                product=_with_memory(product, labels),
                memory_mib=_memory(labels, resource, profile=profile, replicas=replicas),
                resource=resource,
                allocatable=allocatable,
                replicas=replicas,
                mig_profile=profile,
                compute_capability=_compute_capability(labels),
                pin={key: label} if key else {},
                labels=labels,
                taints=tuple((node.get("spec") or {}).get("taints") or ()),
                schedulable=_schedulable(node),
            )
        )
    return tuple(found)


def split_product(label: str) -> tuple[str, str | None, bool]:
    """(Product, MIG profile or None, whether shared) of a product label's value."""
    shared = label.upper().endswith("-SHARED")
    name = label[: -len("-SHARED")] if shared else label
    match = _SLICE_OF_PRODUCT.search(name)
    return (name, None, shared) if match is None else (name[: match.start()], match[1].lower(), shared)


def slice_memory(profile: str) -> int | None:
    """MiB that a MIG slice of this profile has at least; None for a name that isn't a profile."""
    match = _PROFILE.match(profile)
    return int(match[2]) * _SLICE_MIB_OF_GB if match else None


def slice_share(profile: str) -> float:
    """The part of a device's compute that a MIG slice of this profile has, in sevenths."""
    match = _PROFILE.match(profile)
    return int(match[1]) / 7 if match else 1.0


def _resources(allocatable: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    for resource in sorted(allocatable):
        if resource in (WHOLE, SHARED) or resource.startswith(MIG_PREFIX):
            # The server writes a round number with a suffix: 4000 devices are "4k".
            count = int(quantity(allocatable[resource]))
            if count:
                yield resource, count


def _profile_of_resource(resource: str) -> str | None:
    if not resource.startswith(MIG_PREFIX):
        return None
    return resource.removeprefix(MIG_PREFIX).removesuffix(".shared")


def _prefix(resource: str) -> str:
    """What the labels that describe this resource begin with."""
    return resource.removesuffix(".shared")


def _replicas(labels: Mapping[str, str], resource: str, allocatable: int, *, shared: bool) -> int:
    replicas = _number(labels.get(f"{_prefix(resource)}.replicas")) or _number(labels.get(_GKE_SHARES)) or 1
    devices = _number(labels.get(f"{_prefix(resource)}.count"))
    # Some releases of feature discovery leave the label at 1 while they do share.
    return max(replicas, allocatable // devices) if shared and devices else replicas


def _memory(labels: Mapping[str, str], resource: str, *, profile: str | None, replicas: int) -> int | None:
    whole = _number(labels.get(f"{_prefix(resource)}.memory"))
    if whole is None and profile is not None:
        whole = slice_memory(profile)
    if whole is None:
        whole = _nominal_memory(labels)
    return None if whole is None else whole // replicas


def _nominal_memory(labels: Mapping[str, str]) -> int | None:
    """What the cloud sells; drivers keep some of it back, so a known product's smaller figure is right."""
    nominal = next((size for key in _NOMINAL_MEMORY_LABELS if (size := _number(labels.get(key)))), None)
    label = next((labels[key] for key in PRODUCT_LABELS if labels.get(key)), "")
    known = find(_with_memory(label, labels))
    return nominal if nominal is None or known is None else min(nominal, known.memory_mib)


def _with_memory(product: str, labels: Mapping[str, str]) -> str:
    """``a100`` of 81920 MiB is ``a100-80gb``, where the catalogue tells the two apart."""
    nominal = next((size for key in _NOMINAL_MEMORY_LABELS if (size := _number(labels.get(key)))), None)
    longer = f"{product}-{nominal // 1024}gb" if nominal else ""
    return longer if longer and find(longer) else product


def _compute_capability(labels: Mapping[str, str]) -> tuple[int, int] | None:
    major, minor = labels.get(f"{WHOLE}.compute.major", ""), labels.get(f"{WHOLE}.compute.minor", "")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _schedulable(node: Json) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready = next((condition.get("status") for condition in conditions if condition.get("type") == "Ready"), "True")
    return ready == "True" and not (node.get("spec") or {}).get("unschedulable")


def _number(text: str | None) -> int | None:
    """A count above 0; None for anything else."""
    return int(text) if text and text.isdecimal() and int(text) > 0 else None
