"""The documents that are made from the code, for docs/. `make docs` writes them again."""

from __future__ import annotations

from pathlib import Path

from reference_conditions import conditions_sections
from reference_engine import engine_metrics, engine_settings
from reference_fields import columns, name_rules, spec_sections, status_section
from reference_operator import operator_metrics, operator_settings, set_by_manifests

DOCS = Path(__file__).resolve().parents[2] / "docs"

SETTINGS = """\
# Settings

<!-- Made by `make docs` from EngineConfig and OperatorConfig; change engine/pagedserve_engine/config.py or
operator/pagedserve_operator/config.py instead. -->

## Engine

Each setting has one name: a variable (`MAX_BATCH_TOKENS`), the flag made of it (`--max-batch-tokens`), and the field
of `EngineConfig` (`max_batch_tokens`). Flags win over variables, variables over defaults; an empty variable counts as
absent. `make serve NAME=value` passes variables on. A value that can't be is refused at start, by name.

On Kubernetes the operator sets those that a [field of the resource](fields.md) names; `spec.env` takes the others.

{engine}

Libraries beneath read variables of their own: `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` (the hub's cache, token and
offline mode), `CUDA_VISIBLE_DEVICES`.

## Operator

Variables of the container of Deployment `pagedserve-operator`. An empty variable counts as absent; a value that can't be
ends the process at start, with the variable's name. `READ_NODES` is `false` where `WATCH_NAMESPACE` is set and it isn't.
Manifests and chart set {installed}. [Which resources](guide/upgrading.md#the-engine) take another `ENGINE_IMAGE`, and when.

{operator}
"""

METRICS = """\
# Metrics

<!-- Made by `make docs` from EngineMetrics, HttpMetrics and the operator's Metrics; change
engine/pagedserve_engine/metrics.py, server/traffic.py or operator/pagedserve_operator/metrics.py instead. -->

## Engine

`GET /metrics` answers in Prometheus' format. Units are seconds, bytes, tokens and ratios from 0 to 1. Labels take only
the values that stand here, and every outcome is a series from the start.

{engine}

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

## Operator

`GET /metrics` on port 8081 of the operator's pods (`METRICS_PORT`). Of several replicas one leads; the others show
`pagedserve_operator_leading 0` and count no resources.

{operator}
"""

FIELDS = """\
# Fields of an InferenceService

<!-- Made by `make docs` from crds/inferenceservices.yaml; change that instead. -->

`kubectl explain psvc.spec` tells the same. `[]` stands for each row of a list, `{{}}` for each key. A default that depends
on something else, or that must not count as written, stands in the meaning alone. Fields that aren't here are refused.

{names}

## Spec

{spec}

## Status

Written by the operator alone. [Conditions and reasons](conditions.md) tells what `conditions` may say.

{status}

## Columns

{columns}
"""

CONDITIONS = """\
# Conditions and reasons

<!-- Made by `make docs` from tests/house/reasons.py, which a test compares with what operator/pagedserve_operator/errors.py
and status/ can write. -->

```sh
kubectl get psvc                   # Ready and its reason, a line for each resource
kubectl describe psvc my-model     # every condition with its message, and the events
kubectl wait --for=condition=Ready psvc/my-model --timeout=15m
```

The message names the field, the pod or the object at fault, and what to change. A condition's `observedGeneration` is the
generation that it is about: pods of an older spec that still answer keep `Ready` true. `lastTransitionTime` moves
with the status alone.

{sections}
"""


def render_settings() -> str:
    """docs/settings.md."""
    return SETTINGS.format(engine=engine_settings(), operator=operator_settings(), installed=set_by_manifests())


def render_metrics() -> str:
    """docs/metrics.md."""
    return METRICS.format(engine=engine_metrics(), operator=operator_metrics())


def render_fields() -> str:
    """docs/fields.md."""
    return FIELDS.format(names=name_rules(), spec=spec_sections(), status=status_section(), columns=columns())


def render_conditions() -> str:
    """docs/conditions.md."""
    return CONDITIONS.format(sections=conditions_sections())


DOCUMENTS = {
    "settings.md": render_settings,
    "metrics.md": render_metrics,
    "fields.md": render_fields,
    "conditions.md": render_conditions,
}

if __name__ == "__main__":
    for name, render in DOCUMENTS.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
