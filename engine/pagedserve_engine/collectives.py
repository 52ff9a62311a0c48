"""How the ranks of one model add their tensors up and put them side by side: NCCL between GPUs, gloo between CPUs.

The backends are used as objects of their own, not through torch's process-wide default group, so that a process may
hold several engines. They meet through a file and, on CPUs, talk over the loopback interface: no port is open to the
network.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger(__name__)

_CPU_THREADS = 2
_DIST: Any = dist
_C10D: Any = distributed_c10d
"""torch gives few of these types."""


class RankCollective:
    """One rank's side of the sums; ``connect`` comes before the first of them, on all ranks at once."""

    def __init__(self, rank: int, world: int, *, store: Path, seconds: float) -> None:
        """``store``: a file in an empty folder that all ranks name; ``seconds``: the longest wait for another rank."""
        self._rank, self._world = rank, world
        self._store, self._seconds = store, seconds
        self._group: Any = None

    def connect(self, device: torch.device) -> None:
        """Find the other ranks; raises RuntimeError where one does not come in time."""
        store = _DIST.FileStore(str(self._store), self._world)
        timeout = timedelta(seconds=self._seconds)
        store.set_timeout(timeout)
        self._group = self._nccl(store, timeout, device) if device.type == "cuda" else self._gloo(store, timeout)

    def _gloo(self, store: Any, timeout: timedelta) -> Any:
        options = _DIST.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [_DIST.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = _CPU_THREADS
        return _DIST.ProcessGroupGloo(store, self._rank, self._world, options)

    def _nccl(self, store: Any, timeout: timedelta, device: torch.device) -> Any:
        options = _DIST.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = _DIST.ProcessGroupNCCL(store, self._rank, self._world, options)
        # Graphs can't be captured over a communicator that is made by its first use.
        group.eager_connect_single_device(device)
        return group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, in its place, bit for bit the same on all ranks."""
        assert self._group is not None, "connect() comes first"
        options = _DIST.AllreduceOptions()
        options.asyncOp = False
        _finish(self._group.allreduce([x], options))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [K, N] side by side: [K, world · N]."""
        assert self._group is not None, "connect() comes first"
        rows, columns = x.shape
        gathered = x.new_empty(self._world * rows, columns)
        options = _C10D.AllgatherOptions()
        options.asyncOp = False
        _finish(self._group._allgather_base(gathered, x.contiguous(), options))
        return gathered.view(self._world, rows, columns).transpose(0, 1).reshape(rows, self._world * columns)

    def abort(self) -> None:
        """End the wait of any thread of this process for other ranks; nothing can be computed any more."""
        group, self._group = self._group, None
        if group is None:
            return
        try:
            group.abort()
        except RuntimeError as error:
            logger.warning("the ranks' connection could not be ended: %s", error)


def _finish(work: Any) -> None:
    """On a CPU wait; on a GPU the stream does, not the host."""
    if work is not None:
        work.wait()
