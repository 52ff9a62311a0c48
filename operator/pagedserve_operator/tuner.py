"""From a resource to its Tuning: the one kept on the Deployment, else resolved and sized from what can be read now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.desired import Facts, decide_rollout, needs_free_gpus
from pagedserve_operator.desired.source import model_source
from pagedserve_operator.gpus.labels import read_node
from pagedserve_operator.gpus.resolve import free_gpus, resolve
from pagedserve_operator.names import ANNOTATION_INPUTS, ANNOTATION_TUNING
from pagedserve_operator.shapes import choose_shape
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning, decide, inputs_hash, memory_of_pod

NODES_SECONDS: Final = 5.0
"""How long a list of nodes serves: a thousand resources that come at once need one, not a thousand."""

FetchConfig = Callable[[InferenceService], Awaitable[Json | None]]
"""A model's config.json, None where it can't be had."""


class Lists(Protocol):
    """Where nodes and pods are listed."""

    async def list(self, kind: str) -> list[Json]:
        """Every object of the kind."""


class Tuner:
    """Owns nothing but a short-lived list of nodes."""

    def __init__(self, cluster: Lists, config: OperatorConfig, fetch_config: FetchConfig) -> None:
        self._cluster = cluster
        self._config = config
        self._fetch_config = fetch_config
        self._nodes: tuple[float, list[Json]] | None = None
        self._listing = asyncio.Lock()
        self._changes = 0

    def kept(self, deployment: Json | None) -> Tuning | None:
        """The decision that stands on the Deployment, whatever it was made for."""
        return Tuning.from_json(_annotations(deployment).get(ANNOTATION_TUNING, ""))

    async def tune(self, service: InferenceService, deployment: Json | None) -> Tuning:
        """The kept decision while what the user can see stays the same, else a new one; raises TuningError."""
        kept = self.kept(deployment)
        if kept is not None and _annotations(deployment).get(ANNOTATION_INPUTS) == inputs_hash(service):
            return kept
        spec = service.spec
        # What no engine reads is not worth a look at its size.
        model_source(spec.model.uri)
        nodes = None if spec.gpu.type == "cpu" else await self._read_nodes()
        gpu = resolve(
            spec.gpu,
            None if nodes is None else [found for node in nodes for found in read_node(node)],
            min_compute_capability=self._config.min_compute_capability,
            cpu_memory_mib=memory_of_pod(spec),
        )
        config = None if spec.model.architecture is not None else await self._fetch_config(service)
        shape = choose_shape(spec.model, config)
        return decide(service, gpu=gpu, shape=shape, default_image=self._config.engine_image)

    async def surge(
        self, service: InferenceService, tuning: Tuning, facts: Facts, *, deployment: Json | None, blocked: bool
    ) -> int | None:
        """Facts.surge; looks for free GPUs only where that decides."""
        free = 0
        if needs_free_gpus(service, tuning, facts, deployment=deployment):
            free = await self._free(service, tuning)
        return decide_rollout(service, tuning, facts, deployment=deployment, free_gpus=free, blocked=blocked)

    def forget_nodes(self) -> None:
        """Nodes have changed: the next one who asks lists them."""
        self._nodes = None
        self._changes += 1

    async def _free(self, service: InferenceService, tuning: Tuning) -> int:
        nodes = await self._read_nodes()
        if nodes is None:
            return 0
        pods = await self._cluster.list("Pod")
        gpu = service.spec.gpu
        return free_gpus(nodes, pods, tuning.gpu, node_selector=gpu.node_selector, tolerations=gpu.tolerations)

    async def _read_nodes(self) -> list[Json] | None:
        if not self._config.read_nodes:
            return None
        async with self._listing:
            now = asyncio.get_running_loop().time()
            if self._nodes is not None and now - self._nodes[0] <= NODES_SECONDS:
                return self._nodes[1]
            changes, nodes = self._changes, await self._cluster.list("Node")
            # One that changed while they were listed may be missing in what was listed.
            self._nodes = (now, nodes) if changes == self._changes else None
            return nodes


def _annotations(deployment: Json | None) -> Json:
    return ((deployment or {}).get("metadata") or {}).get("annotations") or {}
