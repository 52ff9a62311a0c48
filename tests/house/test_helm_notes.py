"""What helm says after an installation: every command in it can be given as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from crd import schema, strict
from helm_program import Helm, find_helm
from helm_templates import CHART
from manifest_files import by_place

CRD = ("CustomResourceDefinition", "inferenceservices.pagedserve.dev")


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(find_helm(), tmp_path_factory.mktemp("helm"))


def notes(helm: Helm, *given: str) -> str:
    arguments = ("install", "pagedserve", str(CHART), "--dry-run=client", "--namespace", "here")
    sets = [argument for value in given for argument in ("--set", value)]
    return helm.run(*arguments, *sets).stdout.partition("NOTES:")[2]


def line(text: str, start: str) -> str:
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found


@pytest.mark.parametrize("watched", ["", "models"])
def test_the_notes_serve_a_first_model_and_say_what_stays(helm: Helm, watched: str) -> None:
    told = notes(helm, f"watchNamespace={watched}")
    first = yaml.safe_load(told.partition("<<END\n")[2].partition("\nEND\n")[0])
    jsonschema_rs.validate(strict(schema()), first)
    assert ("gpu" in first["spec"]) == bool(watched)
    assert "leaves the CustomResourceDefinition, every InferenceService" in " ".join(told.split())
    assert ("kubectl delete crd inferenceservices.pagedserve.dev" in told) != bool(watched)
    assert "helm uninstall pagedserve --namespace here" in told


@pytest.mark.parametrize(
    ("given", "certificates"),
    [("replicas=1", True), ("watchNamespace=models", False), ("settings.metricsApi=false", False)],
)
def test_certificates_stay_only_where_there_are_any(helm: Helm, given: str, certificates: bool) -> None:
    told = notes(helm, given)
    assert "the operator's Lease" in told
    assert ("and certificates" in told) == certificates


def test_the_crd_can_be_installed_from_a_packed_chart(helm: Helm, tmp_path: Path) -> None:
    helm.run("package", str(CHART), "--destination", str(tmp_path))
    (packed,) = tmp_path.glob("pagedserve-*.tgz")
    command, _, applied = line(notes(helm, "watchNamespace=models"), "helm template").partition(" | ")
    assert applied == "kubectl apply --server-side -f -"
    words = [str(packed) if word == "CHART" else word for word in shlex.split(command)]
    assert set(by_place(helm.run(*words[1:]).stdout)) == {CRD}


def test_the_notes_name_the_images_that_nodes_must_pull(helm: Helm) -> None:
    told = notes(helm, "image.repository=registry.example/operator", "engineImage=registry.example/engine:2")
    assert "registry.example/operator:" in told
    assert "registry.example/engine:2." in told


def test_an_upgrade_keeps_the_values_that_were_given(helm: Helm) -> None:
    assert "--reset-then-reuse-values" in shlex.split(line(notes(helm), "helm upgrade pagedserve CHART"))
