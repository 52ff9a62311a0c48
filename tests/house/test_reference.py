from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pagedserve_engine.config import EngineConfig
from pagedserve_operator.config import OperatorConfig
from reference import DOCS, DOCUMENTS, render_fields, render_metrics, render_settings
from reference_engine import engine_registry
from reference_fields import fields_below, schema
from reference_operator import operator_registry


@pytest.mark.parametrize(("name", "render"), DOCUMENTS.items(), ids=DOCUMENTS)
def test_a_generated_document_is_up_to_date(name: str, render: Callable[[], str]) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == render(), "run `make docs` and commit what it writes"


@pytest.mark.parametrize("config", [EngineConfig, OperatorConfig])
def test_every_setting_has_a_row_with_its_meaning(config: type) -> None:
    cells = [[cell.strip() for cell in line.split("|")] for line in render_settings().splitlines() if "| `" in line]
    meanings = {row[1]: row[-2] for row in cells}
    for field in dataclasses.fields(config):
        assert meanings[f"`{field.name.upper()}`"]


def test_metrics_stand_with_their_labels() -> None:
    rows = render_metrics()
    assert (
        "| `pagedserve_requests_total` | counter | `outcome`: stop, length, cancelled, timeout, error, rejected |"
        in rows
    )
    assert "| `pagedserve_num_blocks` | gauge | `kind`: actual, requested |" in rows
    assert "| `pagedserve_cache_info` | info | `block_size`, `num_blocks` |" in rows
    assert "| `pagedserve_operator_api_calls_total` | counter | `verb`, `code` |" in rows


def test_no_metric_is_without_a_series_and_so_without_its_labels() -> None:
    families = [*engine_registry().collect(), *operator_registry().collect()]
    assert [family.name for family in families if not family.samples] == []


def test_fields_stand_with_bounds_defaults_and_rules() -> None:
    text = render_fields()
    assert "| `count` | whole number, 1 to 16 |  | GPUs of one engine" in text
    assert "| `blockSize` | `8`, `16`, `32`, `64`, `128`, `256` | `32` | Tokens of a block" in text
    assert "| `metrics[].averageValue` | quantity |" in text
    assert "| `nodeSelector` | text by key |" in text
    assert "* minReplicas exceeds maxReplicas: lower minReplicas or raise maxReplicas" in text


def test_every_field_and_every_rule_of_the_schema_is_told() -> None:
    text = render_fields()
    spec = schema()["properties"]["spec"]
    assert [path for path, node in fields_below(spec) if node["description"] not in text] == []
    ruled = [node for _, node in fields_below(schema())]
    rules = [rule["message"] for node in [schema(), *ruled] for rule in node.get("x-kubernetes-validations", ())]
    assert len(rules) > 20
    assert [rule for rule in rules if rule not in text] == []
