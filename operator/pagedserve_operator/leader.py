"""Which of several operators writes: a Lease, and a local deadline that is stricter than the Lease.

The holder counts from before it asked for the renewal, others from when they saw it, by monotonic clocks of their own:
clocks that differ do no harm. After the local deadline no write begins. One that was already on its way carries the
version that it was planned on, and is refused where the next leader has been there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import ApiError, Conflict, NotLeading
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.names import LEASE_NAME
from pagedserve_operator.spec import Json

logger = logging.getLogger(__name__)


class Leases(Protocol):
    """Where Leases are kept."""

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None."""

    async def put_lease(self, lease: Json) -> Json:
        """Create it, or replace the version that it carries; raises Conflict."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A Lease as somebody else wrote it, and when it was first seen so (monotonic seconds)."""

    version: str
    at: float


def new_identity(config: OperatorConfig) -> str:
    """A name for this process that no other has, also not the same Pod's earlier one."""
    return config.identity or f"{os.uname().nodename}_{secrets.token_hex(4)}"


class Leader:
    """One candidate; ``fence`` goes before every write, ``run`` keeps trying, ``on_gain`` is called at each gain."""

    def __init__(
        self,
        leases: Leases,
        config: OperatorConfig,
        *,
        on_gain: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._config = config
        self._on_gain = on_gain
        self._clock = clock
        self.identity = new_identity(config)
        self._deadline = float("-inf")
        self._seen: _Seen | None = None
        self._gained = asyncio.Event()

    @property
    def leading(self) -> bool:
        """Whether a write may begin now."""
        return self._clock() < self._deadline

    def fence(self) -> None:
        """Raises NotLeading where no write may begin."""
        if not self.leading:
            raise NotLeading("the lease was not renewed in time: no write may begin")

    async def wait(self) -> None:
        """Until this candidate leads."""
        while not self.leading:
            self._gained.clear()
            await self._gained.wait()

    async def run(self) -> None:
        """Acquire and renew, for ever."""
        while True:
            await self.attempt()
            await asyncio.sleep(self._config.renew_seconds)

    async def attempt(self) -> None:
        """One try to acquire or renew; trouble is logged and leaves the deadline where it is."""
        asked = self._clock()
        try:
            # A call that hangs must leave time for another.
            async with asyncio.timeout(self._config.renew_deadline_seconds / 2):
                won = await self._take()
        except Conflict:
            won = False
        except TimeoutError:
            logger.warning("lease not renewed: no answer from the API server")
            return
        except ApiError as error:
            logger.warning("lease not renewed: %s", error)
            return
        # Asked only now: the deadline may have passed meanwhile, and then others wait for the gain.
        led = self.leading
        if won:
            self._deadline = asked + self._config.renew_deadline_seconds
        elif led:
            logger.warning("somebody else has taken the lease")
            self._deadline = float("-inf")
        if won and not led and self.leading:
            logger.info("leading as %s", self.identity)
            self._on_gain()
            self._gained.set()

    async def release(self) -> None:
        """Stop leading and let the next candidate in at once; no write may be on its way any more."""
        led, self._deadline = self.leading, float("-inf")
        if not led:
            return
        try:
            lease = await self._read()
            if lease is not None and lease["spec"].get("holderIdentity") == self.identity:
                await self._leases.put_lease({**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        except ApiError as error:
            logger.warning("lease not released: %s", error)

    async def _take(self) -> bool:
        lease = await self._read()
        if lease is None:
            await self._leases.put_lease(self._lease({"name": LEASE_NAME}, transitions=0))
            return True
        held, holder = lease["spec"], lease["spec"].get("holderIdentity")
        if holder and holder != self.identity and not self._expired(lease):
            return False
        transitions = int(held.get("leaseTransitions") or 0) + (holder != self.identity)
        metadata = {"name": LEASE_NAME, "resourceVersion": lease["metadata"]["resourceVersion"]}
        acquired = held.get("acquireTime") if holder == self.identity else None
        await self._leases.put_lease(self._lease(metadata, transitions=transitions, acquired=acquired))
        return True

    async def _read(self) -> Json | None:
        return await self._leases.get("Lease", self._config.operator_namespace, LEASE_NAME)

    def _expired(self, lease: Json) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen.version != version:
            self._seen = _Seen(version, self._clock())
        lasts = float(lease["spec"].get("leaseDurationSeconds") or self._config.lease_seconds)
        return self._clock() - self._seen.at > lasts

    def _lease(self, metadata: Json, *, transitions: int, acquired: str | None = None) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": KINDS["Lease"].api_version,
            "kind": "Lease",
            "metadata": {**metadata, "namespace": self._config.operator_namespace},
            "spec": {
                "holderIdentity": self.identity,
                # Rounded up: a shorter lease than the one counted on would let two lead.
                "leaseDurationSeconds": max(1, -int(-self._config.lease_seconds // 1)),
                "acquireTime": acquired or now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }
