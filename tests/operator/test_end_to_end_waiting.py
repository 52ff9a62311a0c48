"""What scenarios wait for, and that nothing of theirs stays."""

from __future__ import annotations

from typing import Any, cast

import pytest
from e2e.providers.provider import Provider
from e2e.waiting import namespaced

from control_cluster import Cluster

JSON = dict[str, Any]


class Given:
    """A provider that is a cluster and nothing more."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster


def fail(given: Given, names: list[str]) -> None:
    with namespaced(cast(Provider, given), "fails") as world:
        names.append(world.namespace)
        raise ZeroDivisionError


def test_a_scenarios_namespace_goes_with_it_also_when_it_fails(control_plane: Cluster) -> None:
    names: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail(Given(control_plane), names)
    found = control_plane.client().find("v1", "Namespace", names[0])
    assert found is None or "deletionTimestamp" in found["metadata"]
