"""What a failed scenario leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.evidence import collect
from e2e.providers.existing import Existing


def test_each_cluster_of_a_scenario_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2E_EVIDENCE", str(tmp_path / "evidence"))
    first, second = (collect(Existing({}), "test_upgrade[case one]") for _ in range(2))
    assert first != second
    assert "test_upgrade-case-one" in first.name
    assert "existing" in first.name
    assert (second / "incomplete.txt").exists(), "a cluster that isn't there is said, not raised"
