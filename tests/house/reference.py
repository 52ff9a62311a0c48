"""The documents that are made from the code: docs/settings.md and docs/metrics.md. `make docs` writes them again."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.server.traffic import HttpMetrics
from pagedserve_engine.stats import Planned

DOCS = Path(__file__).resolve().parents[2] / "docs"

SETTINGS = """\
# Settings

<!-- Made by `make docs` from EngineConfig; change engine/pagedserve_engine/config.py instead. -->

Each setting has one name: a variable (`MAX_BATCH_TOKENS`), the flag made of it (`--max-batch-tokens`), and the field
of `EngineConfig` (`max_batch_tokens`). Flags win over variables, variables over defaults; an empty variable counts as
absent. `make serve NAME=value` passes variables on. A value that can't be is refused at start, by name.

{table}

Libraries beneath read variables of their own: `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` (the hub's cache, token and
offline mode), `CUDA_VISIBLE_DEVICES`.
"""

METRICS = """\
# Metrics

<!-- Made by `make docs` from EngineMetrics and HttpMetrics; change engine/pagedserve_engine/metrics.py
or server/traffic.py instead. -->

`GET /metrics` answers in Prometheus' format. Units are seconds, bytes, tokens and ratios from 0 to 1. Labels take only
the values that stand here, and every outcome is a series from the start.

{table}

Prompts, outputs and request ids never appear in a metric.

## What to ask

| question | query |
|---|---|
| 95th percentile of the time to first token | `histogram_quantile(0.95, sum by (le) (rate(pagedserve_time_to_first_token_seconds_bucket[5m])))` |
| tokens per second | `sum(rate(pagedserve_generated_tokens_total[1m]))` |
| prefix hits of the last 5 minutes | `rate(pagedserve_cached_tokens_total[5m]) / (rate(pagedserve_cached_tokens_total[5m]) + rate(pagedserve_prompt_tokens_total[5m]))` |
| share of requests that the engine failed | `sum(rate(pagedserve_requests_total{{outcome=~"error\\|timeout"}}[5m])) / sum(rate(pagedserve_requests_total[5m]))` |
| replicas wanted | scale on `pagedserve_queue_wait_seconds`: it is high where requests wait now, and near 0 where none does |

## The gateway's model-server protocol

The Gateway API inference extension picks endpoints by these; its names map so:

| protocol | here |
|---|---|
| TotalQueuedRequests | `pagedserve_requests_waiting` |
| TotalRunningRequests | `pagedserve_requests_running` |
| KVCacheUtilization | `pagedserve_cache_usage_ratio` |
| BlockSize (optional) | label `block_size` of `pagedserve_cache_info` |
| NumGPUBlocks (optional) | label `num_blocks` of `pagedserve_cache_info` |
| LoRA adapters (optional) | none: adapters are not served |
"""


def render_settings() -> str:
    """docs/settings.md."""
    hints = typing.get_type_hints(EngineConfig)
    rows = [
        (
            f"`{field.name.upper()}`",
            "none" if field.default is None else f"`{_plain(field.default)}`",
            _allowed(field, hints[field.name]),
            field.metadata["help"],
        )
        for field in dataclasses.fields(EngineConfig)
    ]
    return SETTINGS.format(table=_table(("variable", "default", "allowed", "meaning"), rows))


def render_metrics() -> str:
    """docs/metrics.md."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    http_metrics = HttpMetrics(registry)
    # Series whose values are known only at run time appear once reported.
    metrics.report_engine(model="…", dtype="…", attention="…", version="…")
    for status in (200, 400, 500):
        http_metrics.count("(the server's)", status)
    planned = Planned(requested=2, actual=2)
    metrics.report_settings(num_blocks=planned, max_batch_tokens=planned, max_model_len=planned, block_size=32)
    rows = [(f"`{_name(family)}`", family.type, _labels(family), family.documentation) for family in registry.collect()]
    return METRICS.format(table=_table(("metric", "type", "labels", "meaning"), rows))


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
            allowed += [f"`{choice}`" for choice in typing.get_args(kind)]
    return ", ".join(allowed)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(family: Metric) -> str:
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    return family.name + suffix


def _labels(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in values.setdefault(label, []):
                values[label].append(value)
    if family.type == "info":
        return ", ".join(f"`{label}`" for label in values)
    return "; ".join(f"`{label}`: {', '.join(known)}" for label, known in values.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def lines() -> Iterator[str]:
        head_cells = list(head)
        yield "| " + " | ".join(head_cells) + " |"
        yield "|---" * len(head_cells) + "|"
        for row in rows:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return "\n".join(lines())


DOCUMENTS = {"settings.md": render_settings, "metrics.md": render_metrics}

if __name__ == "__main__":
    for name, render in DOCUMENTS.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
