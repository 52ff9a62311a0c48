"""Each rule of the CRD, asked through a real API server: what it accepts, what it refuses, and what it says then."""

from __future__ import annotations

import pytest

from control_client import ApiError, Client
from control_cluster import Cluster
from crd import JSON, fields, install, schema
from crd_cases import CHANGES, NAMES, RULES, claim

API = "pagedserve.dev/v1alpha1"
KIND = "InferenceService"


@pytest.fixture(scope="module")
def client(control_plane: Cluster) -> Client:
    install(control_plane)
    return control_plane.client()


def resource(spec: JSON, *, name: str = "a") -> JSON:
    return {
        "apiVersion": API,
        "kind": KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"uri": "hf://a/b"}, **spec},
    }


def try_to_create(client: Client, manifest: JSON) -> str:
    """What the API server says against it; "" where it would take it. Nothing is stored."""
    path = client.path(API, KIND, namespace=manifest["metadata"]["namespace"])
    try:
        client.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", manifest)
    except ApiError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_takes_what_it_should(client: Client, rule: str) -> None:
    for spec in RULES[rule][0]:
        assert try_to_create(client, resource(spec)) == "", spec


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refuses_and_says_what_to_write(client: Client, rule: str) -> None:
    for spec in RULES[rule][1]:
        assert rule in try_to_create(client, resource(spec)), spec


@pytest.mark.parametrize("rule", NAMES)
def test_names_are_such_as_a_service_may_have(client: Client, rule: str) -> None:
    good, bad = NAMES[rule]
    assert [name for name in good if try_to_create(client, resource({}, name=name))] == []
    assert [name for name in bad if rule not in try_to_create(client, resource({}, name=name))] == []


@pytest.mark.parametrize("rule", CHANGES)
def test_a_claim_changes_only_as_claims_can(client: Client, namespace: str, rule: str) -> None:
    good, bad = CHANGES[rule]
    for number, (before, after) in enumerate([*good, *bad]):
        manifest = resource(claim(**before), name=f"claim-{number}")
        manifest["metadata"]["namespace"] = namespace
        stored = client.create(manifest)
        stored["spec"]["cache"]["newClaim"] = after
        said = ""
        try:
            client.replace(stored)
        except ApiError as error:
            said = str(error)
        assert (rule in said) == ((before, after) in bad), (before, after, said)


def test_every_rule_has_its_cases() -> None:
    tried = {**RULES, **NAMES, **CHANGES}
    for path, node in fields(schema()):
        for rule in node.get("x-kubernetes-validations", ()):
            assert any(begin in rule["message"] for begin in tried), f"{path}: {rule['message']}"
