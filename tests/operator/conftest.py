"""The control plane that the operator's tests share: it takes seconds to start, so one serves them all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from e2e.interrupts import end_in_order_on_sigterm

from control_cluster import Cluster, Unsupported
from controlplane import NoControlPlane, find_control_plane
from fake_nodes import FakeNodes
from missing import skip_without


def pytest_configure() -> None:
    """A run that is told to end by SIGTERM leaves nothing behind."""
    end_in_order_on_sigterm()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A real control plane. Without any the test is skipped, but in CI it fails."""
    try:
        found = find_control_plane()
    except NoControlPlane as missing:
        skip_without(str(missing))
    with found:
        yield found


@pytest.fixture
def namespace(control_plane: Cluster) -> Iterator[str]:
    """A new namespace, in which pods can be created; it goes with all that is in it."""
    client, name = control_plane.client(), f"test-{uuid.uuid4().hex[:8]}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    client.wait(
        lambda: client.find("v1", "ServiceAccount", "default", namespace=name),
        f"the default service account of namespace {name}",
    )
    yield name
    client.delete("v1", "Namespace", name)


@pytest.fixture(scope="session")
def _kubelets(control_plane: Cluster) -> Iterator[FakeNodes]:
    with FakeNodes(control_plane) as nodes:
        yield nodes


@pytest.fixture
def fake_nodes(_kubelets: FakeNodes) -> Iterator[FakeNodes]:
    """No node, until the test adds some; they go with it."""
    yield _kubelets
    _kubelets.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _skipped_where_unsupported():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _skipped_where_unsupported():
        yield


@contextmanager
def _skipped_where_unsupported() -> Iterator[None]:
    """On a cluster that the user named, tests that need more than it offers are skipped, each with what it lacks."""
    try:
        yield
    except Unsupported as missing:
        pytest.skip(str(missing))
