"""Events as objects of the API: what ``kubectl describe`` shows below a resource."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from uuid import uuid4

from pagedserve_operator.cluster import Cluster
from pagedserve_operator.errors import ApiError
from pagedserve_operator.names import API_VERSION, KIND, MANAGER
from pagedserve_operator.spec import Json
from pagedserve_operator.status import EventNote

logger = logging.getLogger(__name__)


async def post(cluster: Cluster, resource: Json, note: EventNote, now: datetime) -> None:
    """Write the event; the status has said the same already, so one that can't be written is only logged."""
    try:
        await cluster.create(event(resource, note, now))
    except ApiError as error:
        logger.warning("event %s of %s not written: %s", note.reason, resource["metadata"]["name"], error)


def event(resource: Json, note: EventNote, now: datetime) -> Json:
    """The Event about ``resource``, under a name that no other has."""
    metadata, at = resource["metadata"], now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": metadata["namespace"], "name": f"{metadata['name']}.{uuid4().hex[:16]}"},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            **{field: metadata[field] for field in ("namespace", "name", "uid", "resourceVersion")},
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message,
        "source": {"component": MANAGER},
        "reportingComponent": MANAGER,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
