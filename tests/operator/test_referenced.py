from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from children import service
from pagedserve_operator.errors import SecretNotFound, SpecError
from pagedserve_operator.referenced import hash_of_referenced, hub_token, refers

Objects = dict[tuple[str, str], dict[str, str]]
KEYS = {"auth": {"apiKeysSecretRef": {"name": "keys"}}}
TOKEN = {"auth": {"hfTokenSecretRef": {"name": "hub"}}}


class Store:
    """Secrets and ConfigMaps of one namespace by kind and name, and which were read."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.read: list[tuple[str, str, str]] = []

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.read.append((kind, namespace, name))
        data = self._objects.get((kind, name))
        return None if data is None else {"data": data}


def env(kind: str, *, name: str = "other", key: str = "password", **more: Any) -> dict[str, Any]:
    return {"env": [{"name": "PASSWORD", "valueFrom": {kind: {"name": name, "key": key, **more}}}]}


def hashed(spec: dict[str, Any], objects: Objects) -> str:
    return asyncio.run(hash_of_referenced(service(spec), Store(objects)))


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_nothing_referred_to_is_no_hash_and_no_read() -> None:
    store = Store({})
    parsed = service({"env": [{"name": "A", "value": "b"}, {"name": "C", "valueFrom": {"fieldRef": {}}}]})
    assert not refers(parsed)
    assert asyncio.run(hash_of_referenced(parsed, store)) == ""
    assert store.read == []


@pytest.mark.parametrize("spec", [KEYS, TOKEN, env("secretKeyRef"), env("configMapKeyRef")])
def test_whatever_is_referred_to_is_looked_at_now_and_then(spec: dict[str, Any]) -> None:
    assert refers(service(spec))


ROLLING: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "the hub's token": (TOKEN, ("Secret", "hub"), "token"),
    "a Secret in env": (env("secretKeyRef"), ("Secret", "other"), "password"),
    "a ConfigMap in env": (env("configMapKeyRef"), ("ConfigMap", "other"), "password"),
}


@pytest.mark.parametrize("name", ROLLING)
def test_a_changed_value_changes_the_hash_and_other_keys_do_not(name: str) -> None:
    spec, place, key = ROLLING[name]
    before = hashed(spec, {place: {key: "a"}})
    assert before
    assert hashed(spec, {place: {key: "b"}}) != before
    assert hashed(spec, {place: {key: "a", "unrelated": "c"}}) == before


def test_rotated_api_keys_do_not_change_the_hash() -> None:
    rotated = [hashed(KEYS, {("Secret", "keys"): {"api-keys": value}}) for value in ("a", "b")]
    assert rotated == ["", ""]


MISSING: dict[str, tuple[dict[str, Any], Objects, str]] = {
    "no Secret with API keys": (
        KEYS,
        {},
        r"spec\.auth\.apiKeysSecretRef: there is no Secret 'keys' in namespace models: create it, or correct the name",
    ),
    "no key in it": (
        KEYS,
        {("Secret", "keys"): {"b": "", "a": ""}},
        r"apiKeysSecretRef: Secret 'keys' has no key 'api-keys' \(it has a, b\): add it, or correct the key",
    ),
    "an empty Secret": (TOKEN, {("Secret", "hub"): {}}, r"has no key 'token' \(it has none\)"),
    "no Secret with the hub's token": (TOKEN, {}, r"spec\.auth\.hfTokenSecretRef: there is no Secret 'hub'"),
    "no Secret in env": (
        env("secretKeyRef"),
        {},
        r"spec\.env\[PASSWORD\]\.valueFrom\.secretKeyRef: there is no Secret",
    ),
    "a ConfigMap of a Secret's name": (env("secretKeyRef"), {("ConfigMap", "other"): {"password": "a"}}, "no Secret"),
    "no ConfigMap in env": (env("configMapKeyRef"), {}, r"configMapKeyRef: there is no ConfigMap 'other'"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named_by_field_with_the_cure(name: str) -> None:
    spec, objects, message = MISSING[name]
    with pytest.raises(SecretNotFound, match=message):
        hashed(spec, objects)


def test_what_is_optional_may_be_missing_and_rolls_when_it_comes() -> None:
    spec = env("secretKeyRef", optional=True)
    without = hashed(spec, {})
    assert without
    assert hashed(spec, {("Secret", "other"): {}}) == without
    assert hashed(spec, {("Secret", "other"): {"password": "a"}}) != without


def test_a_secret_that_is_named_twice_is_read_once_from_the_resources_namespace() -> None:
    store = Store({("Secret", "other"): {"a": "1", "b": "2"}})
    entries = [entry for key in ("a", "b") for entry in env("secretKeyRef", key=key)["env"]]
    asyncio.run(hash_of_referenced(service({"env": entries}), store))
    assert store.read == [("Secret", "models", "other")]


def test_the_hubs_token_is_decoded_and_stripped() -> None:
    assert (
        asyncio.run(hub_token(service(TOKEN), Store({("Secret", "hub"): {"token": encoded("hf_abc\n")}}))) == "hf_abc"
    )


@pytest.mark.parametrize("objects", [{}, {("Secret", "hub"): {"other": encoded("hf_abc")}}])
def test_without_a_token_the_hub_is_asked_anonymously(objects: Objects) -> None:
    assert asyncio.run(hub_token(service(), Store(objects))) is None
    assert asyncio.run(hub_token(service(TOKEN), Store(objects))) is None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"hf_abc\nhf_def", "hf_\u20ac".encode()])
def test_a_token_that_no_request_can_carry_is_the_authors_to_cure(content: bytes) -> None:
    store = Store({("Secret", "hub"): {"token": base64.b64encode(content).decode()}})
    with pytest.raises(SpecError, match=r"^spec\.auth\.hfTokenSecretRef: key 'token' of Secret 'hub' is no token"):
        asyncio.run(hub_token(service(TOKEN), store))
