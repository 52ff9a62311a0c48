from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from pagedserve_operator.errors import SpecError
from pagedserve_operator.fields import Fields, quantity

QUANTITIES = {
    "500m": "0.5",
    "1": "1",
    "2.5": "2.5",
    ".5": "0.5",
    "1Ki": "1024",
    "1.5Gi": "1610612736",
    "1k": "1000",
    "3M": "3000000",
    "1e3": "1000",
    "1E3": "1000",
    "1E": "1000000000000000000",
    "2Ei": "2305843009213693952",
    "1n": "0.000000001",
    "-1": "-1",
    " 4 ": "4",
}


@pytest.mark.parametrize("text", QUANTITIES)
def test_a_quantity_is_its_number_of_base_units(text: str) -> None:
    assert quantity(text) == Decimal(QUANTITIES[text])


@pytest.mark.parametrize(("written", "number"), [(4, 4), (0.5, Decimal("0.5"))])
def test_a_number_without_quotes_is_a_quantity_too(written: float, number: Decimal) -> None:
    assert quantity(written) == number


@pytest.mark.parametrize(
    "text", ["", "Gi", "1 Gi", "1gi", "1KB", "1GiB", "1e", "--1", "1.2.3", "half", "0x10", "1e999999999", "9" * 99]
)
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no quantity: write a number .* 500m, 8 or 16Gi"):
        quantity(text)


def test_absent_and_null_fields_read_as_their_defaults() -> None:
    for values in ({}, {"field": None}, None):
        fields = Fields(values, "spec")
        assert not fields.has("field")
        assert fields.text("field", "default") == "default"
        assert fields.maybe_text("field") is None
        assert fields.integer("field", 3) == 3
        assert fields.maybe_integer("field") is None
        assert fields.number("field", 0.5, low=0, high=1) == 0.5
        assert fields.flag("field", True) is True
        assert fields.maybe_flag("field") is None
        assert fields.quantity("field", "1Gi") == "1Gi"
        assert fields.texts("field") == ()
        assert fields.rows("field") == ()
        assert fields.texts_by_name("field") == {}
        assert fields.quantities("field") == {}
        assert fields.maybe_table("field") is None
        assert fields.child("field").child("below").texts("deeper") == ()


def test_present_fields_read_as_they_are() -> None:
    values: dict[str, Any] = {
        "text": "a",
        "zero": 0,
        "off": False,
        "whole": 1,
        "size": 4,
        "list": ["a", "b"],
        "rows": [{"name": "a"}],
        "table": {"a": "b"},
        "amounts": {"cpu": 2, "memory": "1.5Gi"},
        "empty": {},
    }
    fields = Fields(values, "spec")
    assert fields.text("text", "b") == "a"
    assert fields.integer("zero", 3) == 0
    assert fields.flag("off", True) is False
    assert fields.number("whole", 0.5, low=0, high=1) == 1.0
    assert fields.quantity("size", "1") == "4"
    assert fields.texts("list") == ("a", "b")
    assert fields.rows("rows") == ({"name": "a"},)
    assert fields.texts_by_name("table") == {"a": "b"}
    assert fields.quantities("amounts") == {"cpu": "2", "memory": "1.5Gi"}
    assert fields.maybe_table("empty") == {}
    assert fields.choice("text", "b", ("a", "b")) == "a"


def test_an_empty_string_counts_as_absent() -> None:
    fields = Fields({"field": ""}, "spec")
    assert fields.maybe_text("field") is None
    assert fields.text("field", "default") == "default"
    with pytest.raises(SpecError, match=r"spec\.field: is missing"):
        fields.required_text("field")


def share(fields: Fields) -> float:
    return fields.number("field", 0, low=0, high=0.99)


REFUSALS: dict[str, tuple[Any, Callable[[Fields], object], str]] = {
    "a number as text": (8, lambda fields: fields.text("field", ""), "must be a string, not 8: quote it"),
    "a list as text": (["a"], lambda fields: fields.maybe_text("field"), "must be a string"),
    "text as a whole number": ("8", lambda fields: fields.integer("field", 0), "must be a whole number, not '8'"),
    "a count too small": (-1, lambda fields: fields.required_integer("field", low=1), "must be at least 1, not -1"),
    "a fraction as a whole number": (1.5, lambda fields: fields.integer("field", 0), "must be a whole number"),
    "a flag as a whole number": (True, lambda fields: fields.integer("field", 0), "must be a whole number, not True"),
    "text as a number": ("0.9", share, "must be a number, not '0.9': write it with"),
    "a flag as a number": (True, share, "must be a number"),
    "above the highest": (1.01, share, "must be from 0 to 0.99, not 1.01"),
    "below the lowest": (-0.5, share, "must be from 0 to 0.99, not -0.5"),
    "beyond every number": (float("inf"), share, "must be from 0 to 0.99, not inf"),
    "no number at all": (float("nan"), share, "must be from 0 to 0.99, not nan"),
    "text as a flag": ("yes", lambda fields: fields.flag("field", True), "must be true or false, not 'yes'"),
    "a number as a flag": (1, lambda fields: fields.maybe_flag("field"), "must be true or false"),
    "an unknown choice": ("c", lambda fields: fields.choice("field", "a", ("a", "b")), "must be one of a, b, not 'c'"),
    "a unit that is none": ("16GB", lambda fields: fields.maybe_quantity("field"), "'16GB' is no quantity"),
    "a list as a quantity": ([1], lambda fields: fields.maybe_quantity("field"), r"\[1\] is no quantity"),
    "text as a list": ("a", lambda fields: fields.texts("field"), "must be a list, not 'a'"),
    "a table as a list": ({}, lambda fields: fields.rows("field"), "must be a list"),
    "a list as a table": ([], lambda fields: fields.child("field"), r"must be an object, not \[\]"),
    "text as a table": ("a", lambda fields: fields.texts_by_name("field"), "must be an object, not 'a'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_value_of_another_type_is_refused_by_its_path(name: str) -> None:
    value, read, message = REFUSALS[name]
    with pytest.raises(SpecError, match=rf"^spec\.field: {message}") as refusal:
        read(Fields({"field": value}, "spec"))
    assert refusal.value.field == "spec.field"


def test_items_are_named_by_their_place() -> None:
    fields = Fields({"list": ["a", 1], "rows": [{}, "b"], "table": {"a": 1}, "amounts": {"cpu": "x"}}, "spec")
    with pytest.raises(SpecError, match=r"^spec\.list\[1\]: must be a string"):
        fields.texts("list")
    with pytest.raises(SpecError, match=r"^spec\.rows\[1\]: must be an object"):
        fields.rows("rows")
    with pytest.raises(SpecError, match=r"^spec\.table\.a: must be a string, not 1: quote it"):
        fields.texts_by_name("table")
    with pytest.raises(SpecError, match=r"^spec\.amounts\.cpu: 'x' is no quantity"):
        fields.quantities("amounts")


def test_what_must_be_there_says_so() -> None:
    fields = Fields({}, "spec.model")
    with pytest.raises(SpecError, match=r"^spec\.model\.uri: is missing: give a value"):
        fields.required_text("uri")
    with pytest.raises(SpecError, match=r"^spec\.model\.layers: is missing: give a whole number"):
        fields.required_integer("layers")


def test_a_table_that_is_read_out_can_be_changed_without_harm() -> None:
    values = {"behavior": {"scaleUp": {}}, "rows": [{"name": "a"}]}
    fields = Fields(values, "spec")
    table = fields.maybe_table("behavior")
    assert table is not None
    table["scaleDown"] = {}
    fields.rows("rows")[0]["name"] = "b"
    assert values == {"behavior": {"scaleUp": {}}, "rows": [{"name": "a"}]}
