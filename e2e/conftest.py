"""One cluster for all scenarios, as E2E_PROVIDER says, with the operator installed; what fails leaves its evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from e2e.evidence import collect
from e2e.installation import BUNDLE, QUICK, Installation
from e2e.interrupts import end_in_order_on_sigterm
from e2e.pair import ENV, QUESTIONS, Pair
from e2e.providers.choice import choose
from e2e.providers.provider import LIFECYCLE, Provider, Unavailable
from e2e.streams import ask
from e2e.waiting import namespaced, wait_answers, wait_served

from control_cluster import Unsupported
from operator_world import World


def pytest_configure() -> None:
    """A run that is told to end by SIGTERM leaves nothing behind."""
    end_in_order_on_sigterm()


@contextmanager
def _entered(make: Callable[[], Provider]) -> Iterator[Provider]:
    """The provider, running; where it can't the test is skipped, but in CI it fails."""
    try:
        provider = make().__enter__()
    except Unavailable as missing:
        if not os.environ.get("CI"):
            pytest.skip(str(missing))
        # Without a cluster no scenario can run, and one line says why; without a second one the others can.
        if make is choose:
            pytest.exit(str(missing), returncode=2)
        pytest.fail(str(missing), pytrace=False)
    try:
        yield provider
    finally:
        provider.__exit__(None, None, None)


@pytest.fixture(scope="session")
def provider() -> Iterator[Provider]:
    """The cluster that all scenarios share."""
    with _entered(choose) as provider:
        yield provider


@pytest.fixture(scope="session")
def installation(provider: Provider) -> Iterator[Installation]:
    """This tree's operator, installed cluster-wide as its bundle does it."""
    installed = Installation(provider.cluster)
    try:
        installed.apply(BUNDLE.read_text(encoding="utf-8"), provider.images, settings=QUICK)
        yield installed
    finally:
        if provider.outlives:
            installed.remove()


@pytest.fixture
def own_provider(provider: Provider) -> Iterator[Provider]:
    """A second cluster, for one scenario alone, without an operator."""
    with _entered(provider.fresh) as fresh:
        yield fresh


@pytest.fixture
def world(provider: Provider, installation: Installation, request: pytest.FixtureRequest) -> Iterator[World]:
    """A namespace for one scenario."""
    with namespaced(provider, request.path.stem.removeprefix("test_").replace("_", "-")) as world:
        yield world


@pytest.fixture(scope="session")
def pair(provider: Provider, installation: Installation) -> Iterator[Pair]:
    """Shared by scenarios that leave two engines there."""
    with namespaced(provider, "pair") as world:
        world.create("pair", model=provider.small_model(), replicas=2, lifecycle=LIFECYCLE, env=ENV)
        wait_served(world, "pair")
        address = wait_answers(world.client, provider.address(world.namespace, "pair"))
        yield Pair(world, "pair", address, {question: ask(address, question) for question in QUESTIONS})
        world.delete("pair")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What failed leaves its evidence while its cluster is still as it was."""
    report: Any = yield
    if report.failed and call.when != "teardown":
        fixtures = getattr(item, "funcargs", {}).values()
        for provider in {found for found in fixtures if isinstance(found, Provider)}:
            folder = collect(provider, item.name)
            report.sections.append(("Evidence", f"logs, events and objects of {provider.name}: {folder}"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fixtures may find that something can't be done here."""
    with _skipped_where_unsupported():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """So may the scenario."""
    with _skipped_where_unsupported():
        yield


@contextmanager
def _skipped_where_unsupported() -> Iterator[None]:
    """A scenario that needs more than the provider offers is skipped with what is lacking."""
    try:
        yield
    except Unsupported as missing:
        pytest.skip(str(missing))
