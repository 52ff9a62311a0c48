"""On a cluster of somebody's the scenarios replace no operator, and leave none."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.installation import BUNDLE, Installation
from e2e.providers.existing import INSTALLED, Existing, occupied
from e2e.providers.provider import Images

from control_client import Client
from control_cluster import Cluster

JSON = dict[str, Any]


class Objects(Client):
    """A client that finds what it is given."""

    def __init__(self, *found: tuple[str, str]) -> None:
        self.found = found

    def find(self, api_version: str, kind: str, name: str, *, namespace: str | None = None) -> JSON | None:
        return {} if (kind, name) in self.found else None


class Written(Cluster):
    """A cluster without a server: what kubectl is told is kept, and the first command fails."""

    def __init__(self) -> None:
        super().__init__(Path("none"), kubectl=Path("none"))
        self.told: list[tuple[str, str]] = []

    def client(self, kubeconfig: Path | None = None, *, user_agent: str = "tests") -> Client:
        return Objects()

    def kubectl(self, *arguments: str, stdin: str | None = None, **how: object) -> subprocess.CompletedProcess[str]:
        self.told.append((arguments[0], stdin or ""))
        assert arguments[0] != "apply", "half of it was refused"
        return subprocess.CompletedProcess(arguments, 0, "", "")


@pytest.mark.parametrize("number", range(len(INSTALLED)))
def test_a_cluster_with_an_operator_is_told_by_what_it_has(number: int) -> None:
    _, kind, name = INSTALLED[number]
    assert occupied(Objects((kind, name))) == f"{kind} {name}"
    assert occupied(Objects()) == ""
    documents = [row for row in yaml.safe_load_all(BUNDLE.read_text()) if row]
    assert (kind, name) in {(row["kind"], row["metadata"]["name"]) for row in documents}


def test_what_was_applied_is_removed_also_where_that_failed() -> None:
    assert Existing.outlives
    cluster = Written()
    installation = Installation(cluster)
    installation.remove()
    assert cluster.told == []
    with pytest.raises(AssertionError, match="half of it"):
        installation.apply(BUNDLE.read_text(), Images(), settings={})
    installation.remove()
    (applied, deleted) = cluster.told
    assert deleted == ("delete", applied[1])
