"""What is made of the chart is up to date, and its values are what templates use and what the operator takes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

import helm_settings
from bundle import ROOT
from crd import JSON
from helm_chart import render, stale
from helm_templates import CHART, EDITS, Unplaced, templates
from pagedserve_operator.config import OperatorConfig


def values() -> JSON:
    found: JSON = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return found


def schema() -> JSON:
    found: JSON = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return found


MADE = render()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_what_is_made_of_the_chart_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == MADE[path], "run `make chart` and commit what it writes"


def test_no_template_is_left_of_a_manifest_that_is_gone() -> None:
    assert stale() == []


def test_the_chart_is_of_the_operators_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "operator/pyproject.toml").read_text(), re.MULTILINE)
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_a_manifest_that_changes_stops_the_edits_that_lose_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITS, ("Deployment", "pagedserve-operator"), [(r"^  novel: .*$", "")])
    with pytest.raises(Unplaced, match=r"Deployment pagedserve-operator has no place for the edit '\^  novel"):
        templates()


def test_every_value_has_a_comment_above_it() -> None:
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for above, line in pairwise(lines) if re.match(r" *[a-zA-Z]+:", line) and "#" not in above] == []


def test_every_value_is_used_by_a_template() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (CHART / "templates").iterdir())
    unused = [path for path in leaves(values()) if f".Values.{path}" not in text]
    assert unused == []


def leaves(node: JSON, above: str = "") -> Iterator[str]:
    """Paths of the values, as far down as templates name them."""
    for name, value in node.items():
        path = f"{above}{name}"
        if isinstance(value, dict) and value and path not in ("settings", "resources"):
            yield from leaves(value, f"{path}.")
        else:
            yield path


def test_the_schema_knows_every_value_and_no_other() -> None:
    jsonschema_rs.validate(schema(), values())
    assert set(schema()["properties"]) - {"global"} == set(values())
    assert closed(schema()) == []


def closed(node: JSON, path: str = "") -> list[str]:
    """Objects of the schema that would take names that nobody knows."""
    below = {**node.get("properties", {}), "[]": node.get("items", {})}
    found = [path] if "properties" in node and node.get("additionalProperties") is not False else []
    return found + [each for name, inner in below.items() if inner for each in closed(inner, f"{path}.{name}")]


def test_every_setting_of_the_operator_is_a_value() -> None:
    named = helm_settings.names()
    assert set(named) | set(helm_settings.SET_ELSEWHERE) == set(OperatorConfig.__dataclass_fields__)
    assert set(schema()["properties"]["settings"]["properties"]) == set(named.values())


@pytest.mark.parametrize("name", helm_settings.names())
def test_what_the_operator_refuses_is_refused_by_the_schema(name: str) -> None:
    validator = jsonschema_rs.validator_for(schema())
    default = getattr(OperatorConfig(), name)
    given = copy.deepcopy(values())
    for value in odd_values(default):
        given["settings"] = {helm_settings.names()[name]: value}
        if helm_settings.refuses(name, read(default, value)):
            assert not validator.is_valid(given), f"{name}: {value!r}"
    for value in usual_values(default):
        given["settings"] = {helm_settings.names()[name]: value}
        assert validator.is_valid(given), f"{name}: {value!r}"


def read(default: object, value: Any) -> Any:
    """A value as the operator reads its variable: Helm takes broken numbers for texts."""
    return float(value) if isinstance(default, float) else value


def odd_values(default: object) -> list[Any]:
    # Two settings are bounded by others, from above, which no schema says.
    zeros = ["0", "0.0", "00", "00.00", "-1.0"]
    odd: dict[type, list[Any]] = {
        int: [-1, 0, 65536],
        float: [-1.0, 0.0, *zeros],
        str: ["nonsense", "1.", "TEXT"],
        bool: [],
    }
    return odd[type(default)]


def usual_values(default: object) -> list[Any]:
    """The default itself, and as a text where Helm makes one of it."""
    return [default, *([str(default), "10", "0.05", "7.0"] if isinstance(default, float) else [])]
