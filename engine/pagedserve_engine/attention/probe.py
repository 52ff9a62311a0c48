"""Which kernels a CUDA device could attend with, which it does, and why: decided at start, said in one line.

The table below overrules the Triton kernels where another's were measured to be faster, by the row of the GPU benchmark
that says so. It has no entry yet: none has been measured.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Capability = tuple[int, int]
Installed = Callable[[str], bool]

TRITON_FROM: Capability = (8, 0)
"""The least compute capability whose tensor cores Triton's products use."""

_PAGED_FLASH: Capability = (9, 0)
"""What flash-attention-3 is written for."""


@dataclass(frozen=True, slots=True)
class Faster:
    """A backend that was measured to beat the Triton kernels, and where."""

    backend: str
    row: str
    """The benchmark's row: results file, workload and metric."""


MEASURED: Mapping[Capability, Faster] = {}
"""By compute capability."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels of one origin on one device."""

    name: str
    obstacle: str | None
    """Why they can't be used; None: they can."""

    def __str__(self) -> str:
        return self.name if self.obstacle is None else f"{self.name} ({self.obstacle})"


def is_installed(package: str) -> bool:
    """Whether ``package`` could be imported; imports nothing."""
    return importlib.util.find_spec(package) is not None


def probe(capability: Capability, installed: Installed = is_installed) -> tuple[Candidate, ...]:
    """What a device of ``capability`` could attend with, Triton first."""
    return (
        Candidate("triton", _triton_obstacle(capability, installed)),
        Candidate("varlen_attn", _varlen_obstacle(capability, installed)),
        Candidate("flashinfer", _flashinfer_obstacle(installed)),
    )


def preferred(capability: Capability, candidates: tuple[Candidate, ...]) -> str:
    """The backend for a device: the measured best if it can be used, else Triton's kernels, else plain torch."""
    usable = [candidate.name for candidate in candidates if candidate.obstacle is None]
    faster = MEASURED.get(capability)
    if faster is not None and faster.backend in usable:
        return faster.backend
    return "triton" if "triton" in usable else "reference"


def report(capability: Capability, candidates: tuple[Candidate, ...], chosen: str) -> str:
    """The line for the log."""
    faster = MEASURED.get(capability)
    reason = f"as {faster.row} shows" if faster is not None and faster.backend == chosen else "none measured faster"
    others = "; ".join(str(candidate) for candidate in candidates if candidate.name != chosen)
    return f"attention runs in {chosen}, {reason}; besides: {others}"


def _triton_obstacle(capability: Capability, installed: Installed) -> str | None:
    if capability < TRITON_FROM:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None if installed("triton") else "not installed"


def _varlen_obstacle(capability: Capability, installed: Installed) -> str | None:
    if not _varlen_takes_tables():
        return "this torch takes no block table: 2.12 and later do"
    if capability != _PAGED_FLASH:
        return "pages need flash-attention-3, which needs compute capability 9.0"
    return None if installed("flash_attn_interface") else "pages need flash-attention-3, which is not installed"


def _varlen_takes_tables() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters


def _flashinfer_obstacle(installed: Installed) -> str | None:
    if not installed("flashinfer"):
        return "not installed"
    if installed("flashinfer_jit_cache") or shutil.which("nvcc") is not None:
        return None
    return "no nvcc to compile its kernels with"
