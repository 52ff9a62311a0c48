"""The operator's settings and metrics as tables, from the classes that define them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import time
from collections.abc import Iterator
from typing import get_type_hints

from prometheus_client import CollectorRegistry, Metric

from helm_templates import variables
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.kinds import CHILDREN
from pagedserve_operator.metrics import Metrics
from pagedserve_operator.names import Key
from pagedserve_operator.workqueue import WorkQueue
from reference_engine import full_name
from tables import code, table

_WORDS = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}


def operator_settings() -> str:
    """A row for each field of OperatorConfig; its meaning is the sentence that stands below it in the class."""
    hints, meanings = get_type_hints(OperatorConfig), field_sentences()
    rows = [
        (
            code(field.name.upper()),
            "empty" if field.default == "" else code(_number(field.default)),
            _WORDS[hints[field.name]],
            meanings[field.name].replace("``", "`"),
        )
        for field in dataclasses.fields(OperatorConfig)
    ]
    return table(("variable", "default", "allowed", "meaning"), rows)


def set_by_manifests() -> str:
    """Settings that an installed operator has otherwise than by default."""
    defaults = {field.name.upper(): field.default for field in dataclasses.fields(OperatorConfig)}
    others = {name: value for name, value in variables().items() if defaults[name] != value}
    return ", ".join(f"{code(name)} to {code(value)}" for name, value in others.items())


def field_sentences() -> dict[str, str]:
    """By field of OperatorConfig, the string below it."""
    (found,) = ast.parse(inspect.getsource(OperatorConfig)).body
    assert isinstance(found, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(found.body, found.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def operator_metrics() -> str:
    """A row for each family of the operator's registry."""
    rows = [
        (code(full_name(family)), family.type, ", ".join(map(code, _labels(family))), family.documentation)
        for family in operator_registry().collect()
    ]
    return table(("metric", "type", "labels", "meaning"), rows)


def operator_registry() -> CollectorRegistry:
    """The registry of an operator that has done something of everything, so that each family has a series."""
    metrics = Metrics()
    resources = metrics.show(
        queue=WorkQueue[str](clock=time.monotonic),
        ages=lambda: dict.fromkeys(CHILDREN, 0.0),
        leading=lambda: True,
    )
    resources.report(Key("default", "chat"), [{"type": "Ready", "status": "True"}])
    metrics.reconciles.labels("unchanged").inc()
    metrics.api_calls.labels("GET", "200").inc()
    metrics.metrics_api_answered(200)
    metrics.engine_read("read")
    return metrics.registry


def _labels(family: Metric) -> Iterator[str]:
    names = {label: None for sample in family.samples for label in sample.labels if label != "le"}
    yield from names


def _number(default: object) -> object:
    return f"{default:g}" if isinstance(default, float) else default
