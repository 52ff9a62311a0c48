from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import written_reasons
from documents import ROOT
from pagedserve_operator.errors import ConditionType
from pagedserve_operator.status import scaling
from pagedserve_operator.status.pods import TROUBLES
from reasons import CONDITIONS, EVENTS, GROUPS
from reference import render_conditions
from written_reasons import (
    READ,
    error_reasons,
    event_names,
    retry_seconds,
    status_reasons,
    words_of_kubernetes,
)

TOLD = [reason for group in GROUPS for reason in group.reasons]


def test_every_condition_is_told() -> None:
    assert list(CONDITIONS) == list(get_args(ConditionType))


def test_every_reason_that_the_operator_can_write_is_told_and_no_other() -> None:
    written = error_reasons() | status_reasons()
    assert written - {*TOLD, *EVENTS} == set()
    assert set(TOLD) - written == set()


def test_no_reason_is_told_twice() -> None:
    assert len(TOLD) == len(set(TOLD))


def test_every_event_of_the_operator_is_told_and_no_other() -> None:
    assert event_names() == set(EVENTS)


def test_what_somebody_must_act_on_has_a_cure() -> None:
    cured = {reason for group in GROUPS for reason, words in group.reasons.items() if len(words) > 1}
    assert (error_reasons() | set(TROUBLES)) - cured == set()


def test_the_guide_to_autoscaling_tells_every_reason_of_its_condition() -> None:
    source = Path(scaling.__file__).read_text(encoding="utf-8")
    written = set(re.findall(r'_condition\("\w+", "(\w+)"', source))
    assert "KEDAMissing" in written
    page = (ROOT / "docs" / "guide" / "autoscaling.md").read_text(encoding="utf-8")
    assert written - set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set()


def test_troubles_stand_in_the_order_of_telling() -> None:
    told = [reason for reason in TOLD if reason in TROUBLES]
    assert told == list(TROUBLES)


def test_words_that_are_only_read_are_still_read() -> None:
    assert words_of_kubernetes() == READ


def test_the_page_says_when_an_error_is_looked_at_again() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.* \| after (.+) \|$", render_conditions(), re.MULTILINE)
    assert dict(rows)["SecretNotFound"] == "15 s"
    assert dict(rows)["GPUUnsupported"] == "a change"
    assert {reason for reason, seconds in retry_seconds().items() if seconds} <= {reason for reason, _ in rows}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('Condition(type="Ready", status="False", reason="OutOfCoffee")', {"OutOfCoffee"}),
        ('x = ("OutOfCoffee", f"{y} is short")', {"OutOfCoffee"}),
        ('x = "OutOfCoffee" if y else "Suspended"', {"OutOfCoffee", "Suspended"}),
        ('x = y == "OutOfCoffee"', set()),
        ('"""OutOfCoffee"""', set()),
        ('x: Literal["OutOfCoffee"]', set()),
        ('Word = Literal["OutOfCoffee"]', set()),
        ('__all__ = ["OutOfCoffee"]', set()),
        ('x = condition(y, "PodScheduled")', set()),
    ],
)
def test_a_reason_is_found_wherever_it_is_written(
    line: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text(f"import this\n{line}\n", encoding="utf-8")
    monkeypatch.setattr(written_reasons, "FOLDER", tmp_path)
    assert status_reasons() == found
