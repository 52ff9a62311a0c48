"""What all replicas share through the API server: certificates in a Secret, and the APIService that leads to us.

Every replica reads both; whoever leads renews and registers, each write fenced and planned on what was read.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from pagedserve_operator.errors import Rejected
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.metrics_api.certificates import (
    BrokenCertificates,
    Certificate,
    Certificates,
    read_certificates,
    renewed,
    to_pem,
)
from pagedserve_operator.metrics_api.registration import (
    FIELD_MANAGER,
    NAME,
    OTHER_NAMES,
    SERVICE,
    Registered,
    api_service,
    foreign_of,
    is_ours,
    needs_apply,
    published,
    trouble_of,
)
from pagedserve_operator.names import LABEL_MANAGED_BY, LABEL_NAME, MANAGER
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import table

logger = logging.getLogger(__name__)

SECRET: Final = "pagedserve-metrics-api-certificates"
ROLE: Final = "pagedserve-operator-metrics-api"
"""The ClusterRole that lets us register; the APIService goes with it, as no removal of our manifests would name it."""
EVERYWHERE: Final = ""
"""In place of a namespace."""


class Objects(Protocol):
    """Where objects are kept; every method raises ApiError, the writes NotLeading, too."""

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None."""

    async def apply(self, manifest: Json, *, manager: str, planned_on: Json | None) -> Json:
        """Server-side apply to the object that it was planned on."""

    async def delete(self, kind: str, namespace: str, name: str, *, uid: str) -> None:
        """Delete the object with this UID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What stands there now."""

    certificates: Certificates | None
    """What to serve with; None: none is made, or API servers may not have heard of its authority yet."""
    foreign: str
    """Who else serves the API; empty: nobody."""
    trouble: str
    """Why the API server sends us nothing; empty: it does, or it doesn't say."""


class Publisher:
    """Reads and, where it may, writes; ``now`` is the API server's time."""

    def __init__(self, objects: Objects, *, namespace: str, now: Callable[[], datetime]) -> None:
        self._objects = objects
        self._namespace = namespace
        self._now = now
        self._names = (f"{SERVICE}.{namespace}.svc", f"{SERVICE}.{namespace}.svc.cluster.local")
        self._broken = ""
        self._trusted: frozenset[Certificate] = frozenset()
        """By the API server, when last looked at."""

    async def look(self, *, leading: bool) -> Published:
        """What is published, once it is as it should be; without ``leading`` nothing is written. Raises ApiError."""
        registered = await self._registered()
        secret = await self._objects.get("Secret", self._namespace, SECRET)
        held = self._held(secret)
        foreign = foreign_of(registered, self._namespace)
        if not leading:
            pass
        elif foreign:
            await self._withdraw(registered[NAME])
        else:
            held = await self._renew(held, secret, registered)
            await self._register(held, registered)
        usable = held if self._is_trusted(held, registered) else None
        return Published(certificates=usable, foreign=foreign, trouble=trouble_of(registered[NAME]))

    async def withdraw(self) -> None:
        """Take our registration back where there is one. Raises ApiError."""
        await self._withdraw(await self._objects.get("APIService", EVERYWHERE, NAME))

    async def _registered(self) -> Registered:
        return {name: await self._objects.get("APIService", EVERYWHERE, name) for name in (NAME, *OTHER_NAMES)}

    async def _withdraw(self, existing: Json | None) -> None:
        if existing is not None and is_ours(existing, self._namespace):
            logger.info("APIService %s is taken back: it isn't ours to answer any more", NAME)
            await self._objects.delete("APIService", EVERYWHERE, NAME, uid=existing["metadata"]["uid"])

    async def _renew(self, held: Certificates | None, secret: Json | None, registered: Registered) -> Certificates:
        trusted = published(registered[NAME], self._namespace)
        kept = renewed(held, names=self._names, published=trusted, now=self._now())
        if kept is held:
            return kept
        serving = kept.serving.certificate
        logger.info(
            "certificates of the metrics API are renewed: this one ends %s, %d authorities are trusted",
            f"{serving.not_valid_after_utc:%Y-%m-%d}",
            len(kept.trusted),
        )
        await self._objects.apply(self._secret(kept), manager=FIELD_MANAGER, planned_on=secret)
        return kept

    async def _register(self, kept: Certificates, registered: Registered) -> None:
        wanted = api_service(self._namespace, to_pem(kept.trusted), owner=await self._owner())
        if needs_apply(registered[NAME], wanted):
            logger.info("APIService %s is registered", NAME)
            await self._objects.apply(wanted, manager=FIELD_MANAGER, planned_on=registered[NAME])

    def _is_trusted(self, held: Certificates | None, registered: Registered) -> bool:
        """Whether the API servers, each of which hears of it in its own time, have trusted these since the last look.

        A replica that has just started shows nothing else meanwhile, and goes by this look alone.
        """
        trusted = frozenset(published(registered[NAME], self._namespace))
        before, self._trusted = self._trusted or trusted, trusted
        return held is not None and held.authority.certificate in trusted & before

    async def _owner(self) -> Json | None:
        try:
            return await self._objects.get("ClusterRole", EVERYWHERE, ROLE)
        except Rejected:
            # Installed by other means than our manifests: whoever did so removes the APIService, too.
            return None

    def _held(self, secret: Json | None) -> Certificates | None:
        if secret is None:
            return None
        try:
            data = {name: base64.b64decode(row, validate=True) for name, row in table(secret, "data").items()}
            held, broken = read_certificates(data), ""
        except (BrokenCertificates, binascii.Error, TypeError) as error:
            held, broken = None, str(error)
        if broken and broken != self._broken:
            logger.warning("Secret %s/%s is broken and is made anew: %s", self._namespace, SECRET, broken)
        self._broken = broken
        return held

    def _secret(self, kept: Certificates) -> Json:
        labels = {LABEL_NAME: MANAGER, LABEL_MANAGED_BY: MANAGER, "app.kubernetes.io/part-of": "pagedserve"}
        return {
            "apiVersion": KINDS["Secret"].api_version,
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": self._namespace, "labels": labels},
            "data": {name: base64.b64encode(row).decode() for name, row in kept.data().items()},
        }
