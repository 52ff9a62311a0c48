"""``pagedserve-operator size``: a resource's YAML in, the sizing with its breakdown out, no cluster needed."""

from __future__ import annotations

from typing import Any

import yaml

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import SpecError
from pagedserve_operator.hub import Hub
from pagedserve_operator.names import KIND
from pagedserve_operator.parsing import parse
from pagedserve_operator.report import report
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuner import Tuner


class NodesFile:
    """Nodes of a saved ``kubectl get nodes -o yaml``."""

    def __init__(self, nodes: list[Json]) -> None:
        self._nodes = nodes

    async def list(self, kind: str) -> list[Json]:
        """The nodes; nothing else was saved."""
        return self._nodes if kind == "Node" else []


async def size_file(text: str, config: OperatorConfig, *, nodes: str | None) -> list[str]:
    """A report for each InferenceService in ``text``; raises UserError as the operator would show it."""
    resources = [document for document in _documents(text, "the file") if document.get("kind") == KIND]
    if not resources:
        raise SpecError("kind", f"the file holds no {KIND}: give one")
    tuner = _tuner(config, nodes)
    return [report(service, await tuner.tune(service, None)) for service in map(parse, resources)]


def _tuner(config: OperatorConfig, nodes: str | None) -> Tuner:
    hub = Hub(endpoint=config.hub_endpoint, timeout_seconds=config.hub_timeout_seconds)

    async def fetch_config(service: InferenceService) -> Json | None:
        model = service.spec.model
        return (await hub.fetch_config(model.uri, model.revision, None)).config if config.fetch_model_config else None

    if nodes is None:
        return Tuner(NodesFile([]), config.derive(read_nodes=False), fetch_config)
    return Tuner(NodesFile(_nodes(nodes)), config, fetch_config)


def _nodes(text: str) -> list[Json]:
    lists = [document.get("items", [document]) for document in _documents(text, "--nodes")]
    nodes = [node for listed in lists if isinstance(listed, list) for node in listed]
    if not nodes or not all(_is_node(node) for node in nodes):
        raise SpecError("--nodes", "must hold nodes: give what `kubectl get nodes -o yaml` prints")
    return nodes


def _is_node(value: Any) -> bool:
    tables = [value.get(name) for name in ("metadata", "spec", "status")] if isinstance(value, dict) else [None]
    return all(isinstance(table, dict) for table in tables)


def _documents(text: str, where: str) -> list[dict[str, Any]]:
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise SpecError(where, f"is no YAML: {' '.join(str(error).split())}") from error
    if not all(isinstance(document, dict) for document in documents):
        raise SpecError(where, "must hold objects: give the YAML of resources")
    return documents
