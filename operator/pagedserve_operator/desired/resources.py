"""What an engine's container requests, sized so that autoscaling by utilisation can always scale down again.

The autoscaler wants ceil(n · usage ÷ target) replicas. From n = 2, the hardest case, it comes down to 1 only where
usage ÷ target is at most 1/2, so at a target of 80 % of the request a memory use that doesn't depend on the load may
take at most 40 % of it. IDLE_SHARE keeps a margin below that. It doesn't depend on whether autoscaling is on: turning
it on or off must roll no pod.
"""

from __future__ import annotations

from decimal import Decimal
from math import ceil
from typing import Final

from pagedserve_operator.fields import quantity
from pagedserve_operator.spec import Json, Spec
from pagedserve_operator.tuning import Tuning

IDLE_SHARE: Final = 0.37
"""Of the memory request: what an engine takes whatever it does, its whole cache included on a CPU."""
GPU_HOST_MIB: Final = 3072
"""Resident memory of one GPU's process: libraries, device context, pinned buffers."""
GPU_CPU: Final = "2"
"""Cores of one GPU's engine: an idle one takes some hundredths."""
CPU_CPU: Final = "1"

_STEP_MIB: Final = 64


def resources(spec: Spec, tuning: Tuning) -> Json:
    """``resources`` of the engine's container; what the user gives wins."""
    requests = {"cpu": _cpu(tuning), "memory": f"{memory_request_mib(tuning)}Mi", **spec.requests}
    limits = dict(spec.limits_of_resources)
    for name in ("cpu", "memory"):
        # A request above its limit is refused.
        if name in limits and name not in spec.requests and quantity(limits[name]) < quantity(requests[name]):
            requests[name] = limits[name]
    if tuning.gpu.resource is not None:
        count = str(tuning.gpu.count)
        limits[tuning.gpu.resource] = count
        requests[tuning.gpu.resource] = count
    return {"requests": requests, **({"limits": limits} if limits else {})}


def memory_request_mib(tuning: Tuning) -> int:
    """MiB that an engine requests where the user says nothing."""
    parts = tuning.sizing.breakdown
    flat = parts.total - parts.left_over if tuning.gpu.is_cpu else GPU_HOST_MIB * tuning.gpu.count
    return _STEP_MIB * ceil(flat / IDLE_SHARE / _STEP_MIB)


def _cpu(tuning: Tuning) -> str:
    return CPU_CPU if tuning.gpu.is_cpu else str(Decimal(GPU_CPU) * tuning.gpu.count)
