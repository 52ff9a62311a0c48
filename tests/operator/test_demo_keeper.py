"""The demo's local cluster is held once, and whoever ends it says what is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.keeper import RUNS, Keeper, alone, kept, state_file
from e2e.providers.provider import Unavailable


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def test_a_second_keeper_says_that_one_runs_and_leaves_its_state() -> None:
    with alone():
        state_file().write_text(json.dumps({"pid": 1, "kubeconfig": "elsewhere"}))
        second = Keeper()
        with pytest.raises(Unavailable, match=RUNS):
            second.start()
        second.stop(keep=False)
        assert json.loads(state_file().read_text())["kubeconfig"] == "elsewhere"
        with pytest.raises(Unavailable, match=RUNS), alone():
            pass
    with alone():
        assert kept() is None, "process 1 is no keeper"
