"""From a Chrome trace to a table: which part of a step took how long, on the host and on the device.

A part is one of our own spans less what its operators took, or a class of operators. On a CPU the operators are the
work itself; on a GPU the host's operators are what launching costs, and the kernels have a table of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

STEP: Final = "pagedserve.step"
SPAN_PREFIX: Final = "pagedserve."

Event = Mapping[str, Any]
"""Of a Chrome trace: ``ts`` and ``dur`` in microseconds."""

_OPERATOR_CLASSES: Final = (
    ("products", re.compile(r"mm$|mm_|linear|matmul|mv$|int8pack|conv", re.IGNORECASE)),
    ("attention", re.compile(r"attention|attn", re.IGNORECASE)),
    ("norms", re.compile(r"norm", re.IGNORECASE)),
    ("copies", re.compile(r"copy|::to$|_to_|contiguous|clone|cat$|index_|gather|scatter|select|embedding")),
)
_KERNEL_CLASSES: Final = (
    ("attention", re.compile(r"atten|attend|flash|fmha|decode_kernel|prefill_kernel|reduce_splits", re.IGNORECASE)),
    ("products", re.compile(r"gemm|gemv|cutlass|nvjet|cublas|wgmma|xmma|splitk|int8_linear", re.IGNORECASE)),
    ("sampling", re.compile(r"sampl|argmax|topk|softmax|multinomial|sort|bisect", re.IGNORECASE)),
    ("norms", re.compile(r"norm", re.IGNORECASE)),
    ("rope and cache write", re.compile(r"rope|rotary", re.IGNORECASE)),
)
_OWN_NAMES: Final = {"step": "between the parts", "forward": "model, between operators"}
"""What a span's own time is called where its name alone would claim what is inside it."""
_WHOLE: Final = frozenset({"attention", "sampling"})
"""Spans whose operators belong to them, whatever their class."""
_COPIES: Final = frozenset({"gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True, slots=True)
class Part:
    """What one part took in all steps together."""

    name: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """The steps of a trace."""

    num_steps: int
    seconds: float
    """From the start of the first step to the end of the last one."""
    host: tuple[Part, ...]
    """The largest first."""
    device: tuple[Part, ...]
    """Empty where the steps ran on the host."""


def read_timeline(events: Iterable[Event]) -> Timeline:
    """Steps and parts of a trace. Raises ValueError where it holds no step."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in spans if event["name"] == STEP and event.get("cat") != "gpu_user_annotation"]
    if not steps:
        raise ValueError(f"the trace has no span {STEP}")
    start, end = min(step["ts"] for step in steps), max(step["ts"] + step["dur"] for step in steps)
    thread = steps[0]["tid"]
    host = [event for event in spans if event["tid"] == thread and _inside(event, start, end) and _on_host(event)]
    device = [event for event in spans if event.get("cat") in _COPIES | {"kernel"} and _inside(event, start, end)]
    return Timeline(
        num_steps=len(steps),
        seconds=(end - start) / 1e6,
        host=_parts((_host_class(event, above), own) for event, above, own in _own_times(host)),
        device=_device_parts(device, end - start),
    )


def _inside(event: Event, start: float, end: float) -> bool:
    return bool(start <= event["ts"] < end)


def _on_host(event: Event) -> bool:
    return event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


def _own_times(events: list[Event]) -> Iterator[tuple[Event, list[str], float]]:
    """Each event of one thread, the names of our spans around it, and its time less that of those inside it."""
    order = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    own = {id(event): float(event["dur"]) for event in order}
    around: dict[int, list[str]] = {}
    stack: list[Event] = []
    for event in order:
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= event["dur"]
        around[id(event)] = [above["name"] for above in stack if above["name"].startswith(SPAN_PREFIX)]
        stack.append(event)
    for event in order:
        yield event, around[id(event)], max(0.0, own[id(event)])


def _host_class(event: Event, above: Sequence[str]) -> str:
    if event["name"].startswith(SPAN_PREFIX):
        return _OWN_NAMES.get(_bare(event["name"]), _bare(event["name"]))
    whole = next((name for name in map(_bare, reversed(above)) if name in _WHOLE), None)
    if whole is not None:
        return whole
    if event.get("cat") in ("cuda_runtime", "cuda_driver"):
        return "calls of the device's driver"
    inner = _bare(above[-1]) if above else ""
    if inner != "forward":
        return inner or "other operators"
    return _class_of(event["name"], _OPERATOR_CLASSES, "other operators")


def _bare(span: str) -> str:
    return span.removeprefix(SPAN_PREFIX)


def _class_of(name: str, classes: Sequence[tuple[str, re.Pattern[str]]], otherwise: str) -> str:
    return next((kind for kind, pattern in classes if pattern.search(name)), otherwise)


def _device_parts(events: list[Event], window: float) -> tuple[Part, ...]:
    if not events:
        return ()
    idle, reached = 0.0, min(event["ts"] for event in events)
    last = reached
    for event in sorted(events, key=lambda event: event["ts"]):
        idle += max(0.0, event["ts"] - reached)
        reached = max(reached, event["ts"] + event["dur"])
    idle += max(0.0, window - (reached - last))
    named = (
        ("copies" if event["cat"] in _COPIES else _class_of(event["name"], _KERNEL_CLASSES, "other kernels"), event)
        for event in events
    )
    return (*_parts((name, event["dur"]) for name, event in named), Part("idle", idle / 1e6, 0))


def _parts(times: Iterable[tuple[str, float]]) -> tuple[Part, ...]:
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, microseconds in times:
        seconds[name] += microseconds / 1e6
        calls[name] += 1
    found = [Part(name, seconds[name], calls[name]) for name in seconds]
    return tuple(sorted(found, key=lambda part: -part.seconds))
