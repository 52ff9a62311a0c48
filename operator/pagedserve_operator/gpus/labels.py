"""What a node's labels tell of its GPUs: GPU feature discovery first, then GKE's and Karpenter's labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGpu:
    """GPUs of one kind on one node, as pods can request them."""

    node: str
    product: str
    """As the label prints it, without ``-SHARED`` and ``-MIG-<profile>``."""
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
    """The labels, by key, that tie a pod to nodes with this product."""
    labels: Mapping[str, str]
    """All labels of the node, for node selectors."""
    schedulable: bool
    """Whether the node takes new pods (neither cordoned nor unready)."""
