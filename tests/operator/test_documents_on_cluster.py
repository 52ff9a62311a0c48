"""The documents on a real API server: their resources pass the CRD's rules, the guide's commands work as written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from control_client import ApiError, Client
from control_cluster import Cluster
from crd import JSON
from documents import Document, commands, documents, files, resources
from fake_nodes import FakeNodes
from operator_world import install_crd
from operators import QUICK, OperatorThread

PAGES = documents()
RESOURCES = [(block.place, resource) for page in PAGES for block in page.blocks for resource in resources(block)]
GIVEN: Final = {"hub-token.txt": "hf_secret", "api-keys.txt": "one\ntwo\n"}
"""What the reader of a page has in a file."""
NOT_HERE: Final = re.compile(
    r"[|>]|--watch|--raw|port-forward|logs|apiservice|loader|pagedserve-system|-f manifests|-k |nodes|"
    r"delete (clusterrole|crd|namespace|rolebinding|psvc --all)"
)
"""Commands that go on for ever, need containers that run, or concern the cluster and its operator."""


def lines(page: Document) -> list[str]:
    """The calls of kubectl that can be made here, in order."""
    found = [command for block in page.blocks for command, _ in commands(block)]
    return [line for line in found if line.startswith("kubectl ") and not NOT_HERE.search(line)]


WALKED = [page for page in PAGES if page.path.parent.name == "guide" and lines(page)]


@pytest.fixture(scope="module")
def client(control_plane: Cluster) -> Client:
    install_crd(control_plane)
    return control_plane.client()


@pytest.mark.parametrize("row", RESOURCES, ids=lambda row: row[0])
def test_a_resource_in_a_page_passes_the_rules(client: Client, row: tuple[str, JSON]) -> None:
    path = client.path("pagedserve.dev/v1alpha1", "InferenceService", namespace="default")
    try:
        client.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", row[1])
    except ApiError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="module")
def cluster(control_plane: Cluster, _kubelets: FakeNodes) -> Iterator[Cluster]:
    """One with a GPU node and an operator."""
    install_crd(control_plane)
    _kubelets.add_gpu_node("documents-l4", product="NVIDIA-L4", memory_mib=23034, gpus=64)
    with OperatorThread(control_plane.kubeconfig, QUICK):
        yield control_plane
    _kubelets.clear()


@pytest.fixture
def folder(cluster: Cluster, namespace: str, tmp_path: Path) -> Path:
    """The files of all pages, and the resources that a page may be about, ready."""
    for name, text in {**files(), **GIVEN}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    chat = (tmp_path / "chat.yaml").read_text(encoding="utf-8")
    mine = chat.replace("name: chat", "name: my-model")
    for text in (chat, mine, (tmp_path / "scaled.yaml").read_text(encoding="utf-8")):
        cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=text)
    cluster.kubectl("-n", namespace, "wait", "--for=condition=Ready", "psvc", "--all", "--timeout=60s")
    return tmp_path


@pytest.mark.parametrize("page", WALKED, ids=lambda page: page.path.stem)
def test_commands_of_a_page_work_as_written(cluster: Cluster, namespace: str, folder: Path, page: Document) -> None:
    for line in lines(page):
        _, *words = (_placed(word, folder) for word in shlex.split(line))
        done = cluster.kubectl("-n", namespace, *words, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"


def _placed(word: str, folder: Path) -> str:
    """Relative files are the reader's folder's."""
    return str(folder / word) if (folder / word).is_file() else word.replace("=./", f"={folder}/")


def test_most_commands_of_the_guide_are_tried() -> None:
    assert sum(len(lines(page)) for page in WALKED) > 20
