"""Every documented scenario has a sample, and every sample is what a user may apply as it is."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from control_cluster import Cluster
from crd import JSON, ROOT, install, schema, strict
from pagedserve_operator.parsing import parse

FILES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
VALIDATOR = jsonschema_rs.validator_for(strict(schema()))


def documents(file: Path) -> list[JSON]:
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]


def service(file: Path) -> JSON:
    (found,) = [document for document in documents(file) if document["kind"] == "InferenceService"]
    return found


def name(file: Path) -> str:
    return file.stem


def referred(spec: JSON) -> set[tuple[str, str]]:
    """The Secrets, ConfigMaps and claims that a spec names and doesn't make."""
    found = {("Secret", reference["name"]) for reference in spec.get("auth", {}).values()}
    claim = re.match(r"pvc://([^/]+)", spec["model"]["uri"])
    found |= {("PersistentVolumeClaim", claim[1])} if claim else set()
    for volume in spec.get("podTemplate", {}).get("volumes", ()):
        found |= {("ConfigMap", volume["configMap"]["name"])} if "configMap" in volume else set()
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_sample_has_no_field_that_the_schema_lacks(file: Path) -> None:
    VALIDATOR.validate(service(file))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_sample_is_read_by_the_operator(file: Path) -> None:
    assert parse(service(file)).key.name == file.stem


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_sample_opens_with_what_it_is_for(file: Path) -> None:
    assert re.match(r"# [A-Z].*[.:]", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_sample_can_be_scaled(file: Path) -> None:
    """By hand or by itself: `kubectl scale` needs a number to start from."""
    spec = service(file)["spec"]
    assert ("replicas" in spec) != ("autoscaling" in spec)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_sample_brings_what_it_refers_to(file: Path) -> None:
    brought = {(document["kind"], document["metadata"]["name"]) for document in documents(file)}
    assert referred(service(file)["spec"]) <= brought


def test_the_samples_cover_the_sections_of_the_spec() -> None:
    shown = {section for file in FILES for section in service(file)["spec"]}
    # Left to their defaults by everybody but the few who know why not.
    assert set(schema()["properties"]["spec"]["properties"]) - shown == {"rollout", "disruption"}


def test_the_document_lists_every_sample() -> None:
    text = (ROOT / "docs" / "resource.md").read_text(encoding="utf-8")
    assert {file.stem for file in FILES} == set(re.findall(r"manifests/samples/([a-z-]+)\.yaml\)", text))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_the_api_server_takes_a_sample(control_plane: Cluster, namespace: str, file: Path) -> None:
    install(control_plane)
    applied = control_plane.kubectl("-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", str(file))
    assert applied.stdout.count("created (server dry run)") == len(documents(file))
    assert "Warning" not in applied.stderr
