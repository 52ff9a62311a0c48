"""How the demo waits, and what it says where it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from e2e.narration import Broken, Narrator, failure
from e2e.pair import ENV
from e2e.providers.kind import why_no_daemon
from e2e.providers.provider import Unavailable
from e2e.stage import why_local

RESOURCE = Path(__file__).parents[2] / "e2e" / "demo.yaml"


def test_the_demo_waits_as_long_as_something_changes(capsys: pytest.CaptureFixture[str]) -> None:
    states = iter([["one"], ["one", "two"], ["two"], ["three"]])
    Narrator().follow(lambda: next(states), until=lambda rows: rows == ["three"], seconds=-1, every=0)
    told = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert told == ["one", "two", "three"]


def test_the_demo_breaks_where_nothing_changes() -> None:
    with pytest.raises(Broken, match="nothing more within -1 s: stuck"):
        Narrator().follow(lambda: ["stuck"], until=lambda _: False, seconds=-1, every=0)


def test_a_failure_is_one_line_that_says_what_failed() -> None:
    assert failure(Broken("two streams\nbroke")) == "two streams broke"
    assert failure(KeyError("status")) == "KeyError: 'status'"
    assert "timed out" in failure(subprocess.TimeoutExpired(["kubectl"], 3))


def test_the_demos_engines_share_the_cores_before_and_after_the_update() -> None:
    assert yaml.safe_load(RESOURCE.read_text())["spec"]["env"] == ENV


def test_the_demo_plays_on_kind_or_local_alone() -> None:
    assert why_local({"E2E_PROVIDER": "local"}) == "E2E_PROVIDER says so"
    assert why_local({"E2E_PROVIDER": ""}) == why_no_daemon()
    with pytest.raises(Unavailable, match="set E2E_PROVIDER to kind or local"):
        why_local({"E2E_PROVIDER": "existing"})
