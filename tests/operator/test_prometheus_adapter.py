"""The rules for clusters where prometheus-adapter serves the custom metrics API already."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from manifest_files import MANIFESTS
from pagedserve_operator.engine_metrics import ENGINE_METRICS

VALUES = MANIFESTS / "prometheus-adapter" / "values.yaml"


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(VALUES.read_text(encoding="utf-8"))["rules"]["custom"]
    return found


def test_there_is_a_rule_for_each_metric_under_its_own_name() -> None:
    assert {rule["name"]["as"] for rule in rules()} == set(ENGINE_METRICS.values())


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["name"]["as"])
def test_a_rule_finds_the_engines_series_by_pod_and_namespace(rule: dict[str, Any]) -> None:
    assert rule["seriesQuery"].split("{")[0] == rule["name"]["as"]
    overrides = rule["resources"]["overrides"]
    assert {label: row["resource"] for label, row in overrides.items()} == {"namespace": "namespace", "pod": "pod"}
    for label in overrides:
        assert f'{label}!=""' in rule["seriesQuery"]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["name"]["as"])
def test_a_rule_gives_one_value_for_each_pod(rule: dict[str, Any]) -> None:
    # A gauge of one pod may be there twice for a moment, after a restart; it is never added up.
    assert rule["metricsQuery"] == "max by (<<.GroupBy>>) (<<.Series>>{<<.LabelMatchers>>})"
