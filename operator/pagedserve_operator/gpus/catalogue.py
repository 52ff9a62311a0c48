"""The known GPUs: memory as the driver reports it, speed as the datasheet states it, and the names they go by.

Labels of a node beat this table (see labels.py); it is for nodes that tell no memory, and for clusters without a node
yet. ``source`` says where a row comes from: "driver" is the total that nvidia-smi or GPU feature discovery prints,
"datasheet" NVIDIA's own figures, dense (without sparsity).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

ComputeCapability = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """One product; figures of one whole device."""

    product: str
    """As ``nvidia.com/gpu.product`` prints it."""
    memory_mib: int
    bandwidth_gbs: int
    tflops: float
    """Dense, bfloat16; float16 where there is no bfloat16."""
    compute_capability: ComputeCapability
    source: str
    estimated: bool
    """Whether a figure of the row stands on no datasheet or driver's print."""
    aliases: tuple[str, ...]
    """Other names, written as ``_plain`` writes them: of GKE, Karpenter, older drivers and people."""


def _gpu(
    product: str,
    figures: tuple[int, int, float],
    compute_capability: ComputeCapability,
    source: str,
    *aliases: str,
    estimated: bool = False,
) -> GpuModel:
    memory_mib, bandwidth_gbs, tflops = figures
    return GpuModel(
        product=product,
        memory_mib=memory_mib,
        bandwidth_gbs=bandwidth_gbs,
        tflops=tflops,
        compute_capability=compute_capability,
        source=source,
        estimated=estimated,
        aliases=aliases,
    )


_SURE: Final = "driver; datasheet"

_MODELS: Final = (
    # product, (MiB, GB/s, TFLOPS), compute capability, source, other names
    _gpu("Tesla-T4", (15360, 320, 65), (7, 5), _SURE, "t4"),
    _gpu("Tesla-V100-SXM2-16GB", (16384, 900, 125), (7, 0), _SURE, "v100", "v100-16gb", "v100-pcie-16gb"),
    _gpu("Tesla-V100-SXM2-32GB", (32768, 900, 125), (7, 0), _SURE, "v100-32gb", "v100-pcie-32gb"),
    _gpu("NVIDIA-A10", (23028, 600, 125), (8, 6), _SURE, "a10"),
    _gpu("NVIDIA-A10G", (23028, 600, 70), (8, 6), "driver; TFLOPS as AWS's datasheet", "a10g", estimated=True),
    _gpu("NVIDIA-A30", (24576, 933, 165), (8, 0), _SURE, "a30"),
    _gpu("NVIDIA-A40", (46068, 696, 149.7), (8, 6), _SURE, "a40"),
    _gpu("NVIDIA-RTX-A6000", (49140, 768, 154.8), (8, 6), _SURE, "rtx-a6000", "a6000"),
    _gpu("NVIDIA-L4", (23034, 300, 121), (8, 9), _SURE, "l4"),
    _gpu("NVIDIA-L40", (46068, 864, 181), (8, 9), _SURE, "l40"),
    _gpu("NVIDIA-L40S", (46068, 864, 362), (8, 9), _SURE, "l40s"),
    _gpu("NVIDIA-GeForce-RTX-3090", (24576, 936, 71), (8, 6), _SURE, "rtx-3090", "rtx3090", "3090"),
    _gpu("NVIDIA-GeForce-RTX-4090", (24564, 1008, 165), (8, 9), _SURE, "rtx-4090", "rtx4090", "4090"),
    _gpu("NVIDIA-GeForce-RTX-5090", (32607, 1792, 209), (12, 0), _SURE, "rtx-5090", "rtx5090", "5090"),
    _gpu(
        "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
        (97887, 1597, 500),
        (12, 0),
        "driver; bandwidth and TFLOPS estimated",
        "rtx-pro-6000",
        "rtx-pro-6000-blackwell",
        estimated=True,
    ),
    _gpu("NVIDIA-A100-SXM4-40GB", (40960, 1555, 312), (8, 0), _SURE, "a100", "a100-40gb"),
    _gpu("NVIDIA-A100-PCIE-40GB", (40960, 1555, 312), (8, 0), _SURE, "a100-pcie"),
    _gpu("NVIDIA-A100-80GB-PCIe", (81920, 1935, 312), (8, 0), _SURE, "a100-pcie-80gb"),
    _gpu("NVIDIA-A100-SXM4-80GB", (81920, 2039, 312), (8, 0), _SURE, "a100-80gb"),
    _gpu("NVIDIA-H20", (97871, 4000, 148), (9, 0), _SURE, "h20"),
    _gpu("NVIDIA-H100-PCIe", (81559, 2039, 756), (9, 0), _SURE, "h100-pcie"),
    _gpu(
        "NVIDIA-H100-80GB-HBM3",
        (81559, 3350, 989),
        (9, 0),
        _SURE,
        *("h100", "h100-80gb", "h100-sxm", "h100-sxm5", "h100-mega-80gb"),
    ),
    _gpu("NVIDIA-H100-NVL", (95830, 3900, 835), (9, 0), _SURE, "h100-nvl"),
    _gpu("NVIDIA-H200", (143771, 4800, 989), (9, 0), _SURE, "h200", "h200-141gb"),
    _gpu("NVIDIA-GH200-480GB", (97871, 4000, 989), (9, 0), _SURE, "gh200", "gh200-480gb", "gh200-120gb"),
    _gpu("NVIDIA-B200", (183359, 8000, 2250), (10, 0), _SURE, "b200"),
)

CATALOGUE: Final[Mapping[str, GpuModel]] = MappingProxyType({model.product: model for model in _MODELS})

_MAKERS: Final = re.compile(r"^(?:(?:nvidia|tesla|geforce)-)+")


def _plain(name: str) -> str:
    """Lower case, words joined by dashes, without the maker's and the line's name."""
    return _MAKERS.sub("", re.sub(r"[\s_]+", "-", name.strip().lower()))


_BY_NAME: Final[Mapping[str, GpuModel]] = MappingProxyType(
    {name: model for model in _MODELS for name in (_plain(model.product), *model.aliases)}
)


def find(name: str) -> GpuModel | None:
    """The product that a label or a person calls ``name``, whatever its case and maker's prefix; None if unknown."""
    return _BY_NAME.get(_plain(name))


def canonical(name: str) -> str:
    """The catalogue's name of a product, or the name itself: equal where two names mean the same product."""
    model = find(name)
    return _plain(name) if model is None else model.product


def resembling(name: str) -> tuple[str, ...]:
    """Up to three known products that ``name`` may be a misspelling of."""
    near = difflib.get_close_matches(_plain(name), list(_BY_NAME), n=5, cutoff=0.6)
    return tuple(dict.fromkeys(_BY_NAME[match].product for match in near))[:3]
