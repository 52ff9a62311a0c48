"""Secrets and ConfigMaps that a resource refers to: are they there, and a hash of those that must roll the pods.

API keys must exist but don't count: the engine reads their file again by itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pagedserve_operator.errors import SecretNotFound, SpecError
from pagedserve_operator.spec import InferenceService, Json


class Objects(Protocol):
    """Where objects are read."""

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None."""


@dataclass(frozen=True, slots=True)
class _Reference:
    field: str
    kind: str
    name: str
    key: str
    optional: bool
    rolls: bool


def refers(service: InferenceService) -> bool:
    """Whether anything is referred to, and so must be looked at now and then."""
    return any(True for _ in _references(service))


async def hash_of_referenced(service: InferenceService, objects: Objects) -> str:
    """A hash of the values whose change must roll the pods, "" where there are none; raises SecretNotFound."""
    found: dict[tuple[str, str], Json | None] = {}
    values: list[list[str | None]] = []
    for reference in _references(service):
        place = (reference.kind, reference.name)
        if place not in found:
            found[place] = await objects.get(reference.kind, service.key.namespace, reference.name)
        value = _value(reference, found[place], service.key.namespace)
        if reference.rolls:
            values.append([reference.kind, reference.name, reference.key, value])
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16] if values else ""


async def hub_token(service: InferenceService, objects: Objects) -> str | None:
    """The hub's token, None where the resource has none; raises SpecError for one that no request can carry."""
    reference = service.spec.hf_token
    if reference is None:
        return None
    secret = await objects.get("Secret", service.key.namespace, reference.name)
    value = ((secret or {}).get("data") or {}).get(reference.key)
    if value is None:
        return None
    token = base64.b64decode(value).decode(errors="replace").strip()
    if not (token.isascii() and token.isprintable()):
        raise SpecError(
            "spec.auth.hfTokenSecretRef",
            f"key {reference.key!r} of Secret {reference.name!r} is no token: store the hub's token alone, as text",
        )
    return token


def _references(service: InferenceService) -> Iterator[_Reference]:
    spec = service.spec
    if spec.api_keys is not None:
        yield _Reference("spec.auth.apiKeysSecretRef", "Secret", spec.api_keys.name, spec.api_keys.key, False, False)
    if spec.hf_token is not None:
        yield _Reference("spec.auth.hfTokenSecretRef", "Secret", spec.hf_token.name, spec.hf_token.key, False, True)
    for entry in spec.env:
        yield from _references_of_env(entry)


def _references_of_env(entry: Json) -> Iterator[_Reference]:
    source = entry.get("valueFrom") or {}
    for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
        reference = source.get(field)
        if reference:
            where = f"spec.env[{entry.get('name')}].valueFrom.{field}"
            optional = bool(reference.get("optional"))
            yield _Reference(where, kind, str(reference.get("name")), str(reference.get("key")), optional, True)


def _value(reference: _Reference, found: Json | None, namespace: str) -> str | None:
    data = {**((found or {}).get("data") or {}), **((found or {}).get("binaryData") or {})}
    if reference.key in data or reference.optional:
        value = data.get(reference.key)
        return None if value is None else str(value)
    if found is None:
        raise SecretNotFound(
            f"{reference.field}: there is no {reference.kind} {reference.name!r} in namespace {namespace}: create it, "
            "or correct the name"
        )
    raise SecretNotFound(
        f"{reference.field}: {reference.kind} {reference.name!r} has no key {reference.key!r} (it has "
        f"{', '.join(sorted(data)) or 'none'}): add it, or correct the key"
    )
