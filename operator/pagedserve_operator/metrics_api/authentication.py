"""Who asks: the API server says so in headers, and its client certificate proves that it is the API server.

Which authority signs that certificate, what names it may have and which headers it uses stands in a ConfigMap that
every Kubernetes has. TLS has verified the certificate against that authority before anything here is called.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pagedserve_operator.metrics_api.refusals import Unauthenticated
from pagedserve_operator.spec import Json
from pagedserve_operator.status.observed import table

NAMESPACE: Final = "kube-system"
CONFIG_MAP: Final = "extension-apiserver-authentication"
_PLACE: Final = f"ConfigMap {NAMESPACE}/{CONFIG_MAP}"

Certificate = Mapping[str, Any]
"""As ``ssl.SSLSocket.getpeercert()`` gives it: only a verified one has a subject."""
Headers = Sequence[tuple[str, str]]
"""Names, whose case doesn't matter, and values; a name may occur more than once."""


class NoFrontProxy(Exception):
    """The ConfigMap doesn't say whom to trust: the API server runs without aggregation layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontProxy:
    """Whom to trust; header names compare without case."""

    authority: str
    """PEM of the certificates that sign the API server's client certificate."""
    names: frozenset[str]
    """Common names that this certificate may have; empty: any."""
    user_headers: tuple[str, ...]
    uid_headers: tuple[str, ...]
    group_headers: tuple[str, ...]
    extra_prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever asked the API server."""

    user: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()


def read_front_proxy(config_map: Json | None) -> FrontProxy:
    """What the ConfigMap says; raises NoFrontProxy with what it lacks."""
    data = table(config_map, "data")
    authority = data.get("requestheader-client-ca-file")
    if not isinstance(authority, str) or "BEGIN CERTIFICATE" not in authority:
        raise NoFrontProxy(f"{_PLACE} has no requestheader-client-ca-file: start the API server with that flag")
    users = _names(data, "requestheader-username-headers")
    if not users:
        raise NoFrontProxy(f"{_PLACE} has no requestheader-username-headers: start the API server with that flag")
    return FrontProxy(
        authority=authority,
        names=frozenset(_names(data, "requestheader-allowed-names")),
        user_headers=users,
        uid_headers=_names(data, "requestheader-uid-headers"),
        group_headers=_names(data, "requestheader-group-headers"),
        extra_prefixes=_names(data, "requestheader-extra-headers-prefix"),
    )


def identify(front_proxy: FrontProxy, certificate: Certificate | None, headers: Headers) -> Caller:
    """Whoever the front proxy says that asks; raises Unauthenticated where it isn't the front proxy that says so."""
    names = list(_common_names(certificate or {}))
    if not names:
        raise Unauthenticated("only the API server may ask here: present its proxy client certificate")
    if front_proxy.names and not front_proxy.names.intersection(names):
        raise Unauthenticated(f"the client certificate of {', '.join(names)} isn't the API server's")
    user = next(_values(headers, front_proxy.user_headers), "")
    if not user:
        raise Unauthenticated(f"nobody is named: no header {' or '.join(front_proxy.user_headers)}")
    return Caller(
        user=user,
        uid=next(_values(headers, front_proxy.uid_headers), ""),
        groups=tuple(_values(headers, front_proxy.group_headers)),
        extra=_extra(headers, front_proxy.extra_prefixes),
    )


def _values(headers: Headers, names: Iterable[str]) -> Iterator[str]:
    for wanted in names:
        yield from (value for name, value in headers if value and name.lower() == wanted.lower())


def _extra(headers: Headers, prefixes: Iterable[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, list[str]] = {}
    for prefix in prefixes:
        for name, value in headers:
            if name.lower().startswith(prefix.lower()):
                key = urllib.parse.unquote(name[len(prefix) :].lower())
                found.setdefault(key, []).append(value)
    return tuple(sorted((key, tuple(values)) for key, values in found.items()))


def _common_names(certificate: Certificate) -> Iterable[str]:
    for part in certificate.get("subject", ()):
        for field, value in part:
            if field == "commonName":
                yield value


def _names(data: Json, key: str) -> tuple[str, ...]:
    """A JSON list of strings; what is no such list counts as absent."""
    try:
        found = json.loads(data.get(key) or "[]")
    except (TypeError, ValueError):
        return ()
    return tuple(name for name in found if isinstance(name, str) and name) if isinstance(found, list) else ()
