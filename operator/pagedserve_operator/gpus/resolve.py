"""From what the user asks for and what the nodes have to one GPU that the engine is sized for and pinned to.

``gpu.type`` wins; then a product in ``gpu.nodeSelector``; then the nodes. Where several products are left, the rule is:
whole devices before MIG slices and shares, then the product with the most devices on nodes that take pods, then the
one with more memory, then by name. Products below the image's compute capability don't take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pagedserve_operator.errors import GPUTypeRequired, GPUUnknown, GPUUnsupported
from pagedserve_operator.gpus.catalogue import ComputeCapability, GpuModel, canonical, find, resembling
from pagedserve_operator.gpus.groups import Group, allowed, group_nodes, most_free
from pagedserve_operator.gpus.labels import (
    MIG_PREFIX,
    PRODUCT_LABELS,
    WHOLE,
    NodeGpu,
    slice_memory,
    slice_share,
    split_product,
)
from pagedserve_operator.spec import Gpu, Json

Source = Literal["spec", "nodeSelector", "nodes"]

CPU: Final = "cpu"
AUTO: Final = "auto"
CPU_MEMORY_MIB: Final = 8192
"""Of an engine without a GPU that is told no memory."""
CPU_TFLOPS: Final = 0.5
"""A few cores in float32: enough for the smallest batch."""

UNKNOWN_TFLOPS: Final = 60.0
UNKNOWN_BANDWIDTH_GBS: Final = 300
UNKNOWN_COMPUTE_CAPABILITY: Final = (8, 0)
"""Of a product that isn't in the catalogue: slower than its contemporaries, so that batches are rather too small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedGpu:
    """What one engine pod runs on."""

    product: str
    """As the catalogue or the label names it; ``cpu`` for none."""
    memory_mib: int
    """Of one device, MIG slice or share; of the whole pod on ``cpu``."""
    count: int
    """Devices of one pod; 1 on ``cpu``."""
    tflops: float
    """Dense, in 16 bits, of one device."""
    bandwidth_gbs: int
    compute_capability: tuple[int, int]
    """(0, 0) on ``cpu``."""
    resource: str | None
    """What the pod requests; None on ``cpu``."""
    pin: Mapping[str, tuple[str, ...]]
    """Allowed values by node label; empty where the pin is off or no label is known."""
    reason: str
    """One sentence: which GPU and why."""
    source: Source
    notes: tuple[str, ...] = ()
    """What was guessed."""
    is_whole: bool = True
    """Whether a device is a whole one: MIG slices and shares can't serve one model together."""

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.resource is None


def resolve(
    gpu: Gpu,
    nodes: Sequence[NodeGpu] | None,
    *,
    min_compute_capability: ComputeCapability,
    cpu_memory_mib: int | None = None,
) -> ResolvedGpu:
    """The GPU for this spec; ``nodes`` is None where they can't be read, ``cpu_memory_mib`` what the pod may use.

    Raises GPUTypeRequired, GPUUnknown or GPUUnsupported, each with what to write.
    """
    if gpu.type == CPU:
        return _cpu(gpu, cpu_memory_mib)
    usable = [node for node in nodes or () if allowed(node, gpu.node_selector, gpu.tolerations)]
    selected = next((gpu.node_selector[key] for key in PRODUCT_LABELS if gpu.node_selector.get(key)), None)
    if gpu.type != AUTO:
        found = _named(gpu, gpu.type, usable, nodes_known=nodes is not None, source="spec")
    elif selected is not None:
        found = _named(gpu, selected, usable, nodes_known=nodes is not None, source="nodeSelector")
    else:
        group, why = _choose(gpu, usable, nodes_known=nodes is not None, minimum=min_compute_capability)
        found = _from(gpu, group.product, group, source="nodes", why=why)
    return _checked(found, min_compute_capability)


def _cpu(gpu: Gpu, cpu_memory_mib: int | None) -> ResolvedGpu:
    memory, where = CPU_MEMORY_MIB, "the default; set spec.resources.limits.memory for another"
    if cpu_memory_mib is not None:
        memory, where = cpu_memory_mib, "as spec.resources says"
    elif gpu.memory_mib is not None:
        memory, where = gpu.memory_mib, "as spec.gpu.memoryMiB says"
    return ResolvedGpu(
        product=CPU,
        memory_mib=memory,
        count=1,
        tflops=CPU_TFLOPS,
        bandwidth_gbs=0,
        compute_capability=(0, 0),
        resource=None,
        pin={},
        reason=f"no GPU, as spec.gpu.type says; {memory} MiB of memory, {where}",
        source="spec",
    )


def _choose(gpu: Gpu, usable: Sequence[NodeGpu], *, nodes_known: bool, minimum: ComputeCapability) -> tuple[Group, str]:
    """The group of nodes to serve from where the user names no product, and why."""
    if not nodes_known:
        raise GPUTypeRequired(
            "spec.gpu.type is auto and the operator may not read nodes: set spec.gpu.type to the product, such as "
            "NVIDIA-L4 or H100, or to cpu"
        )
    groups = group_nodes([node for node in usable if node.product], count=gpu.count)
    if not groups:
        unlabelled = next((node for node in usable if not node.product), None)
        have = (
            f"node {unlabelled.node} has {unlabelled.resource} but no label that names the product"
            if unlabelled
            else "no node that spec.gpu.nodeSelector and tolerations allow has a GPU"
        )
        raise GPUTypeRequired(f"spec.gpu.type is auto and {have}: set spec.gpu.type to the product, or to cpu")
    able = [group for group in groups if _compute_capability(group)[0] >= minimum] or groups
    best = able[0]
    products = "; ".join(f"{group.title} on {group.devices}" for group in able[:4])
    if len(able) == 1:
        return best, f"the one product on the nodes, {best.devices} devices"
    return best, f"whole devices first, then most devices on nodes that take pods ({products})"


def _named(gpu: Gpu, name: str, usable: Sequence[NodeGpu], *, nodes_known: bool, source: Source) -> ResolvedGpu:
    product, profile, shared = split_product(name)
    matching = [
        node
        for node in usable
        if node.product
        and canonical(node.product) == canonical(product)
        and (profile is None or node.mig_profile == profile)
        and (not shared or node.replicas > 1)
    ]
    groups = group_nodes(matching, count=gpu.count)
    field = f"spec.gpu.{'type' if source == 'spec' else source}"
    if groups:
        return _from(gpu, product, groups[0], source=source, why=f"as {field} says; {groups[0].devices} devices now")
    if shared and gpu.memory_mib is None:
        raise GPUUnknown(f"{field}: no node tells how many share {name}: set spec.gpu.memoryMiB to one share's memory")
    why = f"as {field} says; " + ("no node has it now" if nodes_known else "nodes aren't read")
    return _from(gpu, product, None, source=source, why=why, profile=profile, shared=shared)


def _from(
    gpu: Gpu,
    product: str,
    group: Group | None,
    *,
    source: Source,
    why: str,
    profile: str | None = None,
    shared: bool = False,
) -> ResolvedGpu:
    model = find(product)
    profile = group.mig_profile if group else profile
    is_whole = group.is_whole if group else not profile and not shared
    memory = gpu.memory_mib or _memory(model, group, profile)
    if memory is None:
        raise GPUUnknown(_unknown(product))
    if gpu.count > 1 and not is_whole:
        raise GPUUnsupported(
            f"spec.gpu.count is {gpu.count} and {group.title if group else product} is a part of a device: parts can't "
            "serve one model together; set count to 1, or spec.gpu.type to a whole device"
        )
    capability, guessed = _compute_capability(group) if group else _known_capability(model)
    title = group.title if group else (f"{product} {profile}" if profile else model.product if model else product)
    share = slice_share(profile) if profile else 1.0
    return ResolvedGpu(
        product=model.product if model else product,
        memory_mib=memory,
        count=gpu.count,
        tflops=round((model.tflops if model else UNKNOWN_TFLOPS) * share, 1),
        bandwidth_gbs=int((model.bandwidth_gbs if model else UNKNOWN_BANDWIDTH_GBS) * share),
        compute_capability=capability,
        resource=group.resource if group else f"{MIG_PREFIX}{profile}" if profile else WHOLE,
        pin=group.pin if group and gpu.pin else {},
        reason=f"{title}: {why}",
        source=source,
        notes=tuple(_notes(gpu, product, group, why=why, source=source, guessed=capability if guessed else None)),
        is_whole=is_whole,
    )


def _notes(
    gpu: Gpu, product: str, group: Group | None, *, why: str, source: Source, guessed: ComputeCapability | None
) -> Iterator[str]:
    if find(product) is None:
        capability = f" and compute capability {guessed[0]}.{guessed[1]}" if guessed else ""
        yield f"{product} isn't in the catalogue: taken for {UNKNOWN_TFLOPS:g} TFLOPS{capability}"
    if group is not None and group.largest_node < gpu.count:
        yield f"spec.gpu.count is {gpu.count} and no node has more than {group.largest_node} of {group.title}"
    if gpu.pin and group is None and source == "spec":
        named = model.product if (model := find(product)) else product
        yield f"pods aren't pinned to {named}: {why.rpartition('; ')[2]}; spec.gpu.nodeSelector can"


def _memory(model: GpuModel | None, group: Group | None, profile: str | None) -> int | None:
    """Of one device, slice or share: the least that a node of the group has, else the catalogue's."""
    whole = slice_memory(profile) if profile else model.memory_mib if model else None
    if group is None:
        return whole
    sizes = [
        node.memory_mib if node.memory_mib is not None else whole and whole // node.replicas for node in group.nodes
    ]
    return min((size for size in sizes if size), default=None)


def _known_capability(model: GpuModel | None) -> tuple[ComputeCapability, bool]:
    """(Compute capability, whether it is guessed)."""
    return (UNKNOWN_COMPUTE_CAPABILITY, True) if model is None else (model.compute_capability, False)


def _compute_capability(group: Group) -> tuple[ComputeCapability, bool]:
    known = [node.compute_capability for node in group.nodes if node.compute_capability is not None]
    return (min(known), False) if known else _known_capability(find(group.product))


def _unknown(product: str) -> str:
    near = resembling(product)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return (
        f"spec.gpu.type: {product} isn't in the catalogue and no node's label tells its memory: correct the name, "
        f"or set spec.gpu.memoryMiB{meant}"
    )


def _checked(gpu: ResolvedGpu, minimum: ComputeCapability) -> ResolvedGpu:
    if gpu.compute_capability >= minimum:
        return gpu
    raise GPUUnsupported(
        f"{gpu.product} has compute capability {gpu.compute_capability[0]}.{gpu.compute_capability[1]} and the engine "
        f"image starts at {minimum[0]}.{minimum[1]}: set spec.gpu.type to a newer card, or the operator's "
        "ENGINE_MIN_COMPUTE_CAPABILITY and spec.image to a build that runs on it"
    )


def free_gpus(
    nodes: Sequence[Json],
    pods: Sequence[Json],
    resolved: ResolvedGpu,
    *,
    node_selector: Mapping[str, str] | None = None,
    tolerations: Sequence[Json] = (),
) -> int:
    """The most devices of the resolved kind that are free on one node; 0 on ``cpu``."""
    if resolved.resource is None:
        return 0
    return most_free(
        nodes,
        pods,
        resource=resolved.resource,
        pin=resolved.pin,
        node_selector=node_selector or {},
        tolerations=tolerations,
    )
