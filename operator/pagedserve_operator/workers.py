"""Workers: each takes a key, has it looked at, and says when it is to be looked at again."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Final

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import ApiError, Conflict, NotLeading
from pagedserve_operator.leader import Leader
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.names import Key
from pagedserve_operator.reconcile import Look, Reconciler
from pagedserve_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

FINISHING_SECONDS: Final = 5.0
"""For looks that are under way when the operator is told to stop."""
LOOK_SECONDS: Final = 60.0
"""Longest look at one resource: a call that hangs holds one worker no longer."""


class Workers:
    """Looks that run while this process leads, ``config.workers`` at once."""

    def __init__(
        self,
        queue: WorkQueue[Key],
        leader: Leader,
        reconciler: Reconciler,
        metrics: Metrics,
        config: OperatorConfig,
    ) -> None:
        self._queue = queue
        self._leader = leader
        self._reconciler = reconciler
        self._metrics = metrics
        self._config = config
        self._looking = 0
        self._looked = asyncio.Event()
        self._stopped = False

    def start(self) -> list[asyncio.Task[None]]:
        """The workers' tasks; they end when cancelled."""
        return [asyncio.create_task(self._work(), name=f"worker-{index}") for index in range(self._config.workers)]

    async def finish(self) -> None:
        """No look begins any more; returns when those under way have ended, or after FINISHING_SECONDS."""
        self._stopped = True
        try:
            async with asyncio.timeout(FINISHING_SECONDS):
                while self._looking:
                    self._looked.clear()
                    await self._looked.wait()
        except TimeoutError:
            logger.warning("%d looks are left unfinished", self._looking)

    async def _work(self) -> None:
        while not self._stopped:
            await self._leader.wait()
            key = await self._queue.take()
            self._looking += 1
            try:
                await self._look(key)
            finally:
                self._queue.done(key)
                self._looking -= 1
                self._looked.set()

    async def _look(self, key: Key) -> None:
        if self._stopped:
            return
        with self._metrics.reconcile_seconds.time():
            result, again = await self._result(key)
        self._metrics.reconciles.labels(result).inc()
        if again is not None:
            self._queue.add_after(key, again)

    async def _result(self, key: Key) -> tuple[str, float | None]:
        fields = {"fields": {"resource": str(key)}}
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                look = await self._reconciler.reconcile(key)
        except NotLeading:
            # Whoever leads next looks at everything.
            return "retry", 0.0
        except Conflict as error:
            logger.info("%s changed meanwhile, looking again: %s", key, error, extra=fields)
            return self._retry(key, at_least=0.0)
        except (ApiError, TimeoutError) as error:
            logger.warning("%s: %s", key, str(error) or "the look took too long", extra=fields)
            return self._retry(key, at_least=getattr(error, "retry_after", None) or 0.0)
        except Exception:
            # A bug of ours with one resource must not end the work on all the others.
            logger.exception("%s: looking at it failed", key, extra=fields)
            return self._retry(key, at_least=1.0)
        self._queue.forget(key)
        return look.result, None if look.gone else self._pause(look)

    def _retry(self, key: Key, *, at_least: float) -> tuple[str, None]:
        self._queue.retry(key, at_least=at_least)
        return "retry", None

    def _pause(self, look: Look) -> float:
        # Spread, so that a thousand resources that came at once don't stay a herd.
        resync = self._config.secret_resync_seconds if look.refers else self._config.resync_seconds
        spread = resync * random.uniform(0.9, 1.1)
        return spread if look.again_seconds is None else min(spread, look.again_seconds)
