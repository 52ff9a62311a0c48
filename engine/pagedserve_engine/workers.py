"""The processes of the ranks beside rank 0, which is the engine's own: started, told, watched and ended here.

One thread reads all that they say and notices when one ends. Whatever goes wrong at any rank is the end of all: what
they compute is only true together. So the first failure is kept as the cause, the other processes are killed, and
rank 0's wait for them ends, on the GPU too. In the other direction a rank ends at once when rank 0's process is gone,
however that came.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pickle
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pagedserve_engine.collectives import RankCollective
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import DeviceFailedError, PagedServeError, StartupError
from pagedserve_engine.rank_process import FAILED, STEP_SECONDS, Entry, run_rank
from pagedserve_engine.ranks import Rank

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_BLAME_SECONDS = 2.0
_END_SECONDS = 10.0


class Workers:
    """Ranks 1 and up of ``config.tensor_parallel_size``, each in ``entry``."""

    def __init__(self, config: EngineConfig, entry: Entry) -> None:
        self.world = config.tensor_parallel_size
        self._folder = tempfile.TemporaryDirectory(prefix="pagedserve-ranks-")
        store = Path(self._folder.name) / "store"
        self.collective = RankCollective(0, self.world, store=store, seconds=STEP_SECONDS)
        self.rank = Rank(0, self.world, self.collective, self._exchange)
        self._changed = threading.Condition()
        self._cause: PagedServeError | None = None
        self._closing = False
        self._began = time.monotonic()
        self._heard: set[int] = set()
        self._busy_since: float | None = None
        self._wakes: list[Callable[[], object]] = []
        self._said: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(1, self.world)]
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        # Before multiprocessing's own end, which would wait for processes that heed no signal.
        self._killer = util.Finalize(None, _kill, args=(self._processes,), exitpriority=100)
        context = multiprocessing.get_context("spawn")
        for index in range(1, self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=run_rank,
                args=(config, entry, index, store, theirs),
                name=f"pagedserve-rank-{index}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._watcher = threading.Thread(target=self._watch, name="pagedserve-ranks", daemon=True)
        self._watcher.start()

    # --- rank 0's calls ---------------------------------------------------------------------------------------------

    def _exchange(self, own: Any) -> list[Any]:
        given = [own, *(self._take(index) for index in range(1, self.world))]
        self.send(pickle.dumps(given))
        return given

    def _take(self, index: int) -> Any:
        """What rank ``index`` says next; raises the cause where there is a failure first."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None or not self._said[index - 1].empty())
            self.check()
            return self._said[index - 1].get()

    def send(self, message: bytes) -> None:
        """Give ``message`` to each rank."""
        for each in self._connections:
            each.send_bytes(message)

    def check(self) -> None:
        """Raise the cause where a rank has failed."""
        if self._cause is not None:
            raise self._cause

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Raises what keeps any rank from starting, as StartupError or DeviceFailedError, and ends them all."""
        try:
            yield
        except StartupError:
            self.close()
            raise
        except Exception as error:
            cause = self._blame(error)
            self.close()
            raise cause from error
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Whatever goes wrong inside, here or at another rank, is raised as DeviceFailedError with its cause.

        Also when what is inside takes longer than STEP_SECONDS.
        """
        self.check()
        self._busy_since = time.monotonic()
        try:
            yield
        except Exception as error:
            raise self._blame(error) from error
        finally:
            self._busy_since = None
        # A wait that a failure ended looks like one that results ended.
        self.check()

    def _blame(self, error: Exception) -> PagedServeError:
        """The failure behind ``error``: where another rank is gone, it's seen here as something else, and first."""
        with self._changed:
            self._changed.wait_for(lambda: self._cause is not None, timeout=_BLAME_SECONDS)
        return self._cause or DeviceFailedError(f"rank 0 of {self.world} failed: {error}")

    def on_failure(self, wake: Callable[[], object]) -> None:
        """Call ``wake``, on a thread of ours, once ``check`` has something to raise."""
        with self._changed:
            self._wakes.append(wake)
            failed = self._cause is not None
        if failed:
            wake()

    def close(self) -> None:
        """End the ranks in their order; on return no process is left. May be called again."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        for each in self._connections:
            each.close()
        for process in self._processes:
            process.join(_END_SECONDS if self._cause is None else 0.0)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._killer()
        self._watcher.join()
        self.collective.abort()
        self._folder.cleanup()

    # --- the watcher's thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while self._cause is None and not self._closing:
            try:
                ready = connection.wait([*self._connections, *(p.sentinel for p in self._processes)], _LOOK_SECONDS)
            except (OSError, ValueError):  # closed meanwhile
                continue
            for index in range(1, self.world):
                if self._connections[index - 1] in ready or self._processes[index - 1].sentinel in ready:
                    self._hear(index)
            since = self._busy_since
            if since is not None and time.monotonic() - since > STEP_SECONDS:
                self._fail(DeviceFailedError(f"a step did not end on all {self.world} ranks within {STEP_SECONDS:g} s"))

    def _hear(self, index: int) -> None:
        """Take what rank ``index`` says; without a word it has died."""
        try:
            kind, value = self._connections[index - 1].recv()
        except (EOFError, OSError):
            process = self._processes[index - 1]
            process.join(_BLAME_SECONDS)
            self._fail(DeviceFailedError(f"rank {index} of {self.world} {_ending(process.exitcode)}"))
            return
        if kind == FAILED:
            self._fail(value)
            return
        if index not in self._heard:
            self._heard.add(index)
            seconds = time.monotonic() - self._began
            logger.info("rank %d of %d has its part of the model after %.1f s", index, self.world, seconds)
        with self._changed:
            self._said[index - 1].put(value)
            self._changed.notify_all()

    def _fail(self, cause: PagedServeError) -> None:
        with self._changed:
            if self._closing or self._cause is not None:
                return
            self._cause = cause
            self._changed.notify_all()
            wakes = list(self._wakes)
        _kill(self._processes)
        for wake in wakes:
            wake()
        self.collective.abort()


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _ending(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection"
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with status {exitcode}"
