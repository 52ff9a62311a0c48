"""How the parts of one operator are tied together, where no cluster is needed to see it."""

from __future__ import annotations

import asyncio

import pytest
from kubernetes.aio.client import Configuration

from control_certificates import Authority
from metrics_world import FakeServer, adapter, authentication
from operators import QUICK
from pagedserve_operator.assembly import Operator
from pagedserve_operator.leader import Leader


def test_resources_are_looked_at_when_their_metrics_api_is_taken_by_somebody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        operator = Operator(QUICK.derive(metrics_api="true"), Configuration())
        server = FakeServer(authentication(Authority.new()), adapter())
        woken = asyncio.Event()

        async def wake_all() -> None:
            woken.set()

        monkeypatch.setattr(Leader, "leading", True)
        monkeypatch.setattr(operator, "wake_all", wake_all)
        for method in ("get", "apply", "delete"):
            monkeypatch.setattr(operator.cluster, method, getattr(server, method))
        try:
            await operator.metrics_api.look()
            async with asyncio.timeout(30):
                await woken.wait()
        finally:
            await operator.metrics_api.close()
            await operator.cluster.close()

    asyncio.run(main())
