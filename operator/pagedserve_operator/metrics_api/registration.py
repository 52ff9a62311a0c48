"""Whether the API server should send the custom metrics API to us: decided on what is registered, never by force.

Only one server can answer for the API group, so that an adapter of somebody else, of whatever version, wins over ours.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final

from pagedserve_operator.drift import differences, owned_fields
from pagedserve_operator.kinds import KINDS
from pagedserve_operator.metrics_api.certificates import BrokenCertificates, Certificate, read_pem
from pagedserve_operator.metrics_api.documents import GROUP, VERSION
from pagedserve_operator.names import LABEL_MANAGED_BY, LABEL_NAME, MANAGER
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import condition, table, text

NAME: Final = f"{VERSION}.{GROUP}"
OTHER_NAMES: Final = (f"v1beta1.{GROUP}",)
"""Versions that other adapters serve: whoever has one answers for the group."""
SERVICE: Final = "pagedserve-metrics-api"
PORT: Final = 443
FIELD_MANAGER: Final = "pagedserve-operator-metrics-api"
VERSION_PRIORITY: Final = 10
"""Below what adapters use: one that comes later is asked at once, before ours has been taken back."""
_GROUP_PRIORITY: Final = 100

Registered = Mapping[str, Json | None]
"""APIServices by name, None where there is none: NAME and OTHER_NAMES."""


def api_service(namespace: str, authorities: bytes, *, owner: Json | None) -> Json:
    """The APIService; ``owner`` is the ClusterRole with whose end it goes, too."""
    metadata: Json = {
        "name": NAME,
        "labels": {
            LABEL_NAME: MANAGER,
            LABEL_MANAGED_BY: MANAGER,
            "app.kubernetes.io/part-of": "pagedserve",
        },
    }
    if owner is not None:
        reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"]}
        metadata["ownerReferences"] = [{**reference, **{key: owner["metadata"][key] for key in ("name", "uid")}}]
    return {
        "apiVersion": KINDS["APIService"].api_version,
        "kind": "APIService",
        "metadata": metadata,
        "spec": {
            "group": GROUP,
            "version": VERSION,
            "service": {"namespace": namespace, "name": SERVICE, "port": PORT},
            "groupPriorityMinimum": _GROUP_PRIORITY,
            "versionPriority": VERSION_PRIORITY,
            "caBundle": base64.b64encode(authorities).decode(),
        },
    }


def foreign_of(registered: Registered, namespace: str) -> str:
    """Who else serves the API, as users read it; empty: nobody."""
    others = (found for found in registered.values() if found is not None)
    return "; ".join(_who(found) for found in others if not is_ours(found, namespace))


def needs_apply(existing: Json | None, wanted: Json) -> bool:
    """Whether an apply of ``wanted`` would change anything of what is ours, or missing."""
    return existing is None or any(differences(wanted, existing, manager=FIELD_MANAGER))


def is_ours(existing: Json, namespace: str) -> bool:
    """Whether this installation has made it and it still names our Service."""
    service = table(existing, "spec", "service")
    named = (text(existing, "metadata", "name"), service.get("namespace"), service.get("name"))
    return named == (NAME, namespace, SERVICE) and bool(owned_fields(existing, FIELD_MANAGER))


def published(existing: Json | None, namespace: str) -> tuple[Certificate, ...]:
    """The authorities that the API server trusts for us by now."""
    if existing is None or not is_ours(existing, namespace):
        return ()
    try:
        return read_pem(base64.b64decode(text(existing, "spec", "caBundle")))
    except (BrokenCertificates, ValueError):
        return ()


def trouble_of(existing: Json | None) -> str:
    """Why the API server doesn't send us anything; empty where it does or doesn't say yet."""
    available = condition(existing, "Available")
    # Its message names addresses and errors that change from try to try.
    reason = text(available, "reason") or "no reason given"
    return f"the API server can't reach it (APIService {NAME}: {reason})" if available.get("status") == "False" else ""


def _who(existing: Json) -> str:
    service = table(existing, "spec", "service")
    by = f"Service {service.get('namespace')}/{service.get('name')}" if service else "the API server itself"
    return f"{by} (APIService {existing['metadata']['name']})"
