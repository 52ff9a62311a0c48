"""Names for the parts of a step in the profiler's timeline, put around a core from outside.

Serving pays nothing for them: the core that is profiled is the only one whose methods are replaced, by ones that open
a span and call them. A part that has been renamed is an error at once, not a table without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import record_function

from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.profiling.timeline import SPAN_PREFIX

_OPS = {"add_rms_norm": "norms", "rope_and_write": "rope and cache write", "gated": "gates"}
"""The fused decoder's operators, which may be kernels that the profiler sees nothing of."""
_SOME_OPS = {"linear": "products", "add_rms_norm_quantized": "norms", "gated_quantized": "gates"}
"""Those that not every device has."""


def name_parts(processor: ContinuousBatchProcessor) -> None:
    """Open a span around each part of every step that ``processor`` takes from now on."""
    runner: Any = processor._runner
    _span(processor, "prepare_next_batch", "schedule")
    _span(processor, "update_batch", "commit")
    _span(runner, "launch", "launch", returned=_name_reading)
    _span(runner, "_forward", "forward")
    _span(runner, "_sample", "sampling")
    _span(runner._inputs, "build", "build inputs")
    _span(runner._inputs.attention, "plan_group", "plan attention", returned=_name_attention)
    # Only the fused decoder has operators of its own; other models' are told apart by their names.
    ops: Any = getattr(runner._model, "_ops", None)
    there = {method: name for method, name in _SOME_OPS.items() if hasattr(ops, method)}
    for method, name in {**_OPS, **there}.items() if ops is not None else ():
        _span(ops, method, name)


def _span(owner: Any, method: str, name: str, *, returned: Callable[[Any], Any] | None = None) -> None:
    """Replace ``owner.method`` by one with a span around it; ``returned`` may wrap what it gives back."""
    original = getattr(owner, method)

    def traced(*args: Any, **kwargs: Any) -> Any:
        with record_function(SPAN_PREFIX + name):
            result = original(*args, **kwargs)
        return result if returned is None else returned(result)

    setattr(owner, method, traced)


class _Traced:
    """Stands for an object that can't be changed, with a span around one of its methods."""

    def __init__(self, inner: Any, method: str, name: str) -> None:
        self._inner = inner
        self._method = method
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._inner, attribute)
        if attribute != self._method:
            return found

        def traced(*args: Any, **kwargs: Any) -> Any:
            with record_function(SPAN_PREFIX + self._name):
                return found(*args, **kwargs)

        return traced


def _name_reading(pending: Any) -> Any:
    return _Traced(pending, "read", "wait")


def _name_attention(group: Any) -> Any:
    return _Traced(group, "attend", "attention")
