"""A step's numbers on their way to the device: gathered in pinned memory, copied at once, never waited for.

There is one block of device memory, filled anew by every step: a device runs its steps in order, so the copy comes
after all that the step before still reads. On the host there are two, taken in turns, because a copy may still be
under way when the next step is prepared. What is put in the same order with the same shapes lies at the same
addresses, which is what a captured graph needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 64
_TORCH: dict[np.dtype[np.generic], torch.dtype] = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}

Numbers = npt.NDArray[np.generic]


class Staging:
    """Room for ``capacity`` bytes of one step on ``device``; what doesn't fit is copied on its own."""

    def __init__(self, capacity: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._on_cuda = self.device.type == "cuda"
        self._capacity = capacity
        self._target = torch.zeros(capacity, dtype=torch.uint8, device=self.device)
        self._hosts = [torch.zeros(capacity, dtype=torch.uint8, pin_memory=self._on_cuda) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        """The same memory, to be written."""
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0
        self._used = 0
        self._flushed = 0

    def begin(self) -> None:
        """Start a step: what was put before is gone on the host, and on the device with the next ``flush``."""
        self._turn = 1 - self._turn
        self._used = self._flushed = 0
        copied = self._copied[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()

    def put(self, array: Numbers) -> torch.Tensor:
        """``array`` on the device, from the next ``flush`` to the end of the step."""
        start = -(self._used // -_ALIGNMENT) * _ALIGNMENT
        stop = start + array.nbytes
        if stop > self._capacity:
            return send(array, self.device)
        if array.nbytes:
            written = self._arrays[self._turn][start:stop].view(array.dtype)
            written.reshape(array.shape)[...] = array
        self._used = stop
        return self._view(start, array.shape, array.dtype)

    def flush(self) -> None:
        """Copy what was put since the last time, without waiting."""
        if self._used == self._flushed:
            return
        changed = slice(self._flushed, self._used)
        self._target[changed].copy_(self._hosts[self._turn][changed], non_blocking=True)
        self._flushed = self._used
        if self._on_cuda:
            self._copied[self._turn] = torch.cuda.current_stream(self.device).record_event()

    def _view(self, start: int, shape: Sequence[int], dtype: np.dtype[np.generic]) -> torch.Tensor:
        # Made anew each time: views that are kept pin the heap between a step's large tensors, and it never shrinks.
        stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._target[start:stop].view(_TORCH[dtype]).view(*shape)


def send(array: Numbers, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on ``device`` that lives as long as it is held, queued without waiting."""
    tensor = torch.from_numpy(array.copy())
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
