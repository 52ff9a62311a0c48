"""From what the user asks for and what the nodes have to one GPU that the engine is sized for and pinned to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["spec", "nodeSelector", "nodes"]


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

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.resource is None
