"""The process of a rank beside rank 0, from its start to its end, which comes at the latest with rank 0's."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pagedserve_engine.collectives import RankCollective
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import DeviceFailedError, PagedServeError, StartupError
from pagedserve_engine.logs import configure_logging
from pagedserve_engine.ranks import Rank

logger = logging.getLogger(__name__)

STEP_SECONDS = 300.0
"""A step that takes longer is stuck: another rank has stopped and not ended. As long as the core may stall."""

_GIVEN, FAILED = "given", "failed"
"""What a rank says: a value that all exchange, or why it can't go on."""


class Entry(Protocol):
    """What a rank's process does; a function of a module, so that another process finds it."""

    def __call__(self, config: EngineConfig, rank: Rank, leader: Connection) -> None:
        """Prepare as rank 0 does, then follow what ``leader`` brings; EOFError is its normal end."""


def run_rank(config: EngineConfig, entry: Entry, index: int, store: Path, leader: Connection) -> None:
    """The whole life of rank ``index``."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        # They come to a whole group of processes; rank 0 then decides what still runs.
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # tqdm's own lock is one between processes, which a killed one leaves behind.
    tqdm.set_lock(threading.RLock())
    _tell_rank(config, index)

    def exchange(own: Any) -> list[Any]:
        leader.send((_GIVEN, own))
        given: list[Any] = pickle.loads(leader.recv_bytes())
        return given

    collective = RankCollective(index, config.tensor_parallel_size, store=store, seconds=STEP_SECONDS)
    status = 1
    try:
        entry(config, Rank(index, config.tensor_parallel_size, collective, exchange), leader)
    except (EOFError, ConnectionError):  # rank 0 has closed
        status = 0
    except StartupError as error:
        _report(leader, error)
    except BaseException as error:
        logger.exception("the rank failed")
        _report(leader, DeviceFailedError(f"rank {index} of {config.tensor_parallel_size} failed: {error}"))
    # Nothing is worth the wait for what a device or another rank still holds.
    logging.shutdown()
    os._exit(status)


def _report(leader: Connection, error: PagedServeError) -> None:
    with contextlib.suppress(OSError):
        leader.send((FAILED, error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _tell_rank(config: EngineConfig, index: int) -> None:
    """Log as rank 0 does, with the rank beside each line."""
    configure_logging(config.log_format, config.log_level)

    def add_rank(record: logging.LogRecord) -> bool:
        record.fields = {"rank": index, **getattr(record, "fields", {})}
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add_rank)
