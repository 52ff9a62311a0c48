"""The engine's settings and metrics as tables, from the classes that define them."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.server.traffic import HttpMetrics
from pagedserve_engine.stats import Planned
from tables import code, table


def engine_settings() -> str:
    """A row for each field of EngineConfig."""
    hints = typing.get_type_hints(EngineConfig)
    rows = [
        (
            code(field.name.upper()),
            "none" if field.default is None else code(field.default),
            _allowed(field, hints[field.name]),
            field.metadata["help"],
        )
        for field in dataclasses.fields(EngineConfig)
    ]
    return table(("variable", "default", "allowed", "meaning"), rows)


def engine_metrics() -> str:
    """A row for each family of the engine's registry."""
    rows = [
        (code(full_name(family)), family.type, _labels(family), family.documentation)
        for family in engine_registry().collect()
    ]
    return table(("metric", "type", "labels", "meaning"), rows)


def engine_registry() -> CollectorRegistry:
    """The registry of an engine that has started and answered, so that each family has a series."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    http_metrics = HttpMetrics(registry)
    # Series whose values are known only at run time appear once reported.
    metrics.report_engine(model="…", dtype="…", attention="…", version="…")
    for status in (200, 400, 500):
        http_metrics.count("(the server's)", status)
    planned = Planned(requested=2, actual=2)
    metrics.report_settings(num_blocks=planned, max_batch_tokens=planned, max_model_len=planned, block_size=32)
    return registry


def full_name(family: Metric) -> str:
    """As it is asked for in a query."""
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    return family.name + suffix


def _allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    kinds = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
    allowed = [words[kind] for kind in kinds if kind in words]
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None:
        allowed[0] += f" ≥ {low:g}" if high is None else f", {low:g} to {high:g}"
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            allowed += [code(choice) for choice in typing.get_args(kind)]
    return ", ".join(allowed)


def _labels(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in values.setdefault(label, []):
                values[label].append(value)
    if family.type == "info":
        return ", ".join(code(label) for label in values)
    return "; ".join(f"{code(label)}: {', '.join(known)}" for label, known in values.items())
