"""One whole operator in one event loop: watches wake keys, workers reconcile them while this process leads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import kopf
from kubernetes.aio.client import Configuration

from pagedserve_operator import handlers, probes
from pagedserve_operator.cluster import Cluster, load_configuration
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.desired import Facts
from pagedserve_operator.errors import ApiError
from pagedserve_operator.hub import Hub
from pagedserve_operator.keys import Autoscalers, Nodes, key_of_resource, keys_of_autoscaler
from pagedserve_operator.leader import Leader
from pagedserve_operator.memoryless import NoDiffBase, NoProgress
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.metrics_api import MetricsApi
from pagedserve_operator.names import KIND, Key
from pagedserve_operator.reconcile import Reconciler
from pagedserve_operator.referenced import hub_token
from pagedserve_operator.server_clock import ServerClock, reading
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuner import Tuner
from pagedserve_operator.watches import WatchAges, counting, kopf_session, noticing_gaps, stamping
from pagedserve_operator.workers import Workers
from pagedserve_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

LISTING_REQUESTS: Final = 3
"""A list of everything may take as long as so many other requests."""
WATCHES_END_SECONDS: Final = 10.0
"""Kopf may hang on its way out of a watch that failed; nothing that counts waits for it."""


class Operator:
    """Owns the queue, the lease and the sessions; ``run`` returns when told to ``stop``, or raises."""

    def __init__(self, config: OperatorConfig, configuration: Configuration) -> None:
        self.config = config
        self.metrics = Metrics()
        self.queue: WorkQueue[Key] = WorkQueue(clock=time.monotonic)
        self.ages = WatchAges()
        self.clock = ServerClock()
        self.cluster = Cluster(
            configuration,
            fence=self._fence,
            request_seconds=config.request_seconds,
            middlewares=(counting(self.metrics), reading(self.clock)),
        )
        self.leader = Leader(self.cluster, config, on_gain=self._wake_all_soon)
        # Resources whose engines' metrics don't reach their autoscaler say why.
        self.metrics_api = MetricsApi(
            self.cluster, self.leader, config, counters=self.metrics, now=self.clock.now, on_change=self._wake_all_soon
        )
        self.resources = self.metrics.show(
            queue=self.queue,
            ages=self.ages.ages,
            leading=lambda: self.leader.leading,
            clock_ahead=lambda: self.clock.ahead_seconds,
            metrics_api=lambda: self.metrics_api.state,
        )
        self.hub = Hub(
            endpoint=config.hub_endpoint,
            timeout_seconds=config.hub_timeout_seconds,
            most_waiting=max(1, config.workers // 2),
        )
        self.tuner = Tuner(self.cluster, config, self._fetch_config)
        self.autoscalers = Autoscalers()
        self.reconciler = Reconciler(
            self.cluster,
            self.tuner,
            self.resources,
            autoscalers_near=self.autoscalers.near,
            basis=_basis(config),
            metrics_trouble=lambda: self.metrics_api.trouble,
        )
        self.workers = Workers(self.queue, self.leader, self.reconciler, self.metrics, config)
        self.port = 0
        """Where /metrics and the probes are, once running."""
        self._configuration = configuration
        # For every session that kopf opens: what was listed before stays known.
        self._watching = (counting(self.metrics), stamping(self.ages), noticing_gaps(self._watch_begun_anew))
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._nodes = Nodes()
        self._listing: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """End ``run`` in good order: no look begins, the lease is given up."""
        self._stop.set()

    async def run(self) -> None:
        """Work until stopped; raises what any part of it dies of."""
        config = self.config
        serving = probes.serving(
            self.metrics.registry,
            unhealthy=self._unhealthy,
            unready=self._unready,
            host=config.metrics_host,
            port=config.metrics_port,
        )
        async with serving as self.port, self._closing():
            tasks = [
                asyncio.create_task(self._watch(), name="watches"),
                asyncio.create_task(self.leader.run(), name="leader"),
                asyncio.create_task(self.metrics_api.run(), name="metrics API"),
                *self.workers.start(),
            ]
            stop = asyncio.create_task(self._stop.wait(), name="stop")
            await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
            await self._end([*tasks[1:], stop], watches=tasks[0])

    def wake(self, keys: Iterable[Key]) -> None:
        """Look at these soon."""
        for key in keys:
            self.queue.add_after(key, self.config.gather_seconds)

    async def wake_all(self) -> None:
        """Look at every resource."""
        found = await self.cluster.list(KIND, self.config.watch_namespace or None)
        # One that is known and not found has gone unseen.
        for key in dict.fromkeys([*map(key_of_resource, found), *self.resources.keys()]):
            self.queue.add(key)

    def node_changed(self, node: Mapping[str, Any], deleted: bool) -> None:
        """A node came, went, or has other GPUs now: what waits for nodes is looked at."""
        if self._nodes.saw(node, deleted):
            self.tuner.forget_nodes()
            self.wake(self.reconciler.waiting_for_nodes)

    def autoscaler_changed(self, autoscaler: Mapping[str, Any], deleted: bool) -> None:
        """An autoscaler came, went or changed: whoever's Deployment it scales is looked at."""
        if self.autoscalers.saw(autoscaler, deleted):
            self.wake(keys_of_autoscaler(autoscaler))

    def _fence(self) -> None:
        self.leader.fence()

    @asynccontextmanager
    async def _closing(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.cluster.close()

    async def _end(self, tasks: list[asyncio.Task[Any]], *, watches: asyncio.Task[None]) -> None:
        self._stop.set()
        await self.workers.finish()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        # Only now is no write on its way.
        await self.leader.release()
        ended, left = await asyncio.wait([watches], timeout=WATCHES_END_SECONDS)
        results.extend(await asyncio.gather(*ended, return_exceptions=True))
        for task in left:
            logger.warning("the watches don't end: the operator does without waiting for them")
            task.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _watch(self) -> None:
        registry, settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = NoDiffBase()
        settings.persistence.progress_storage = NoProgress()
        settings.scanning.disabled = bool(self.config.watch_namespace)
        settings.process.ultimate_exiting_timeout = None
        settings.watching.inactivity_timeout = self.config.watch_silence_seconds
        settings.networking.request_timeout = LISTING_REQUESTS * self.config.request_seconds
        kopf.on.login(registry=registry)(self._login)
        nodes = self.node_changed if self.config.read_nodes else None
        self.ages.expect(handlers.watched(nodes=self.config.read_nodes))
        handlers.register(
            registry, settings, wake=self.wake, autoscaler_changed=self.autoscaler_changed, node_changed=nodes
        )
        await kopf.operator(
            registry=registry,
            settings=settings,
            standalone=True,
            clusterwide=not self.config.watch_namespace,
            namespaces=[self.config.watch_namespace] if self.config.watch_namespace else [],
            stop_flag=self._stop,
            ready_flag=self._ready,
        )

    async def _fetch_config(self, service: InferenceService) -> Json | None:
        if not self.config.fetch_model_config:
            return None
        token = await hub_token(service, self.cluster)
        fetched = await self.hub.fetch_config(service.spec.model.uri, service.spec.model.revision, token)
        if fetched.reason:
            logger.info("%s: no config.json: %s", service.key, fetched.reason)
        return fetched.config

    async def _login(self, **_: Any) -> kopf.AiohttpSession:
        return kopf_session(self._configuration, self._watching)

    def _watch_begun_anew(self, kind: str) -> None:
        logger.info("the watch of %s begins anew: looking at everything, as what went meanwhile is never told", kind)
        self._wake_all_soon()

    def _wake_all_soon(self) -> None:
        if not all(task.done() for task in self._listing):
            return
        task = asyncio.create_task(self._wake_all_stubbornly())
        self._listing.add(task)
        task.add_done_callback(self._listing.discard)

    async def _wake_all_stubbornly(self) -> None:
        while self.leader.leading:
            try:
                return await self.wake_all()
            except ApiError as error:
                logger.warning("resources not listed: %s", error)
                await asyncio.sleep(1.0)

    def _unhealthy(self) -> list[str]:
        stale = self.ages.stale(self.config.watch_stale_seconds)
        return [f"no sign of life from the watch of {kind}" for kind in stale]

    def _unready(self) -> list[str]:
        return [] if self._ready.is_set() and self.ages.seen(KIND) else ["not watching yet"]


def _basis(config: OperatorConfig) -> Facts:
    return Facts(
        targets=config.targets,
        prometheus_url=config.prometheus_url,
        metrics_reader=config.operator_namespace if config.serves_metrics_api else "",
    )


async def run(config: OperatorConfig, *, on_start: Callable[[Operator], None] = lambda _: None) -> None:
    """Run one operator until it is stopped; ``on_start`` gets it before it works."""
    operator = Operator(config, await load_configuration(config.kubeconfig))
    on_start(operator)
    await operator.run()
