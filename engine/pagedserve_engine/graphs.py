"""Decode steps captured once, before the engine is ready, and replayed: one launch instead of a thousand.

A graph reads its inputs where ``InputBuilder`` puts those of every step of so many padded decoding rows, and lengths
from device memory alone, so that it serves any requests. What a kernel fixes at launch depends on the key: the number
of rows, and how tokens are chosen. Nothing is captured once requests run. Graphs share one pool of memory, largest
first: a smaller one fits into what a larger one needed. As they are replayed one after another in one stream, they may
also share what they leave behind: a graph's outputs hold until the next replay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

import torch

logger = logging.getLogger(__name__)

Out = TypeVar("Out")

_SMALL = (1, 2, 4)
_STEP, _FINE_UP_TO = 8, 256
_COARSE_STEP = 32


class Choosing(Enum):
    """How a captured step chooses tokens."""

    GREEDY = "greedy"
    """The likeliest."""
    DRAWN = "drawn"
    """By temperature, top_k, top_p and min_p, some rows greedily perhaps."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What tells captured steps apart."""

    num_rows: int
    choosing: Choosing


class Recorder(Protocol):
    """What turns a function's launches into one; ``CudaRecorder`` but for tests."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Run ``body`` and return what launches the same work again."""

    def measure(self) -> int:
        """Bytes of device memory in use."""


class CudaRecorder:
    """Captures CUDA graphs into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """Run once for the libraries that set themselves up at first use, then capture; raises RuntimeError."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            body()
        return graph.replay

    def measure(self) -> int:
        """Bytes that the device has given away, to whomever."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows to capture, rising: close together where a padded row costs most, ``max_num_seqs`` the last."""
    fine = range(_STEP, min(max_num_seqs, _FINE_UP_TO) + 1, _STEP)
    coarse = range(_FINE_UP_TO + _COARSE_STEP, max_num_seqs + 1, _COARSE_STEP)
    sizes = {size for size in (*_SMALL, *fine, *coarse) if size <= max_num_seqs}
    return tuple(sorted(sizes | {max_num_seqs}))


class DecodeGraphs(Generic[Out]):
    """The captured steps. ``prepare`` fills a key's inputs and gives the work on them, whose results lie where each
    replay puts them.
    """

    def __init__(self, recorder: Recorder, prepare: Callable[[GraphKey], Callable[[], Out]]) -> None:
        self._recorder = recorder
        self._prepare = prepare
        self._captured: dict[GraphKey, tuple[Callable[[], None], list[Out]]] = {}
        """What launches each step again, and its one result."""
        self._sizes: tuple[int, ...] = ()
        self.num_bytes = 0
        """Device memory that the graphs took."""
        self.seconds = 0.0
        """That capturing took."""

    @property
    def num_captured(self) -> int:
        """Graphs that there are."""
        return len(self._captured)

    def capture(
        self,
        sizes: Sequence[int],
        kinds: Sequence[Choosing] = tuple(Choosing),
        *,
        each: Callable[[Iterable[GraphKey]], Iterable[GraphKey]] = iter,
    ) -> bool:
        """Capture every size in every kind, largest first; ``each`` may show progress.

        False where the model can't be captured: there are no graphs then, and the log says why.
        """
        if not sizes:
            return False
        started, before = time.monotonic(), self._recorder.measure()
        keys = [GraphKey(size, kind) for size in sorted(sizes, reverse=True) for kind in kinds]
        try:
            for key in each(keys):
                self._capture(key)
        except (RuntimeError, NotImplementedError) as error:
            self._captured.clear()
            self._sizes = ()
            logger.warning("CUDA graphs can't be captured, steps are launched one kernel at a time: %s", error)
            return False
        self._sizes = tuple(sorted(sizes))
        self.num_bytes = max(0, self._recorder.measure() - before)
        self.seconds = time.monotonic() - started
        return True

    def _capture(self, key: GraphKey) -> None:
        run = self._prepare(key)
        made: list[Out] = []

        def body() -> None:
            made[:] = [run()]

        replay = self._recorder.record(body)
        self._captured[key] = (replay, made)

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured number of rows that holds ``num_rows``; None where none does."""
        return next((size for size in self._sizes if size >= num_rows), None)

    def replay(self, key: GraphKey) -> Out:
        """Launch the step that was captured under ``key``; its outputs hold until the next replay."""
        replay, made = self._captured[key]
        replay()
        return made[0]
