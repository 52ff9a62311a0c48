"""How the scenarios are run: which run is a dry one, and that a change's check runs them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.run import why_dry

ROOT = Path(__file__).parents[2]


def test_a_dry_run_is_asked_for_or_comes_where_no_daemon_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert why_dry({"DRY_RUN": "1"}) == "DRY_RUN asks for it"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "docker" in why_dry({"DRY_RUN": "0"})


def test_a_changes_check_runs_the_scenarios_and_fails_where_they_cannot_run() -> None:
    check = (ROOT / ".ci" / "run").read_text()
    assert 'export CI="${CI:-1}"' in check
    assert "make e2e E2E_PROVIDER=kind DRY_RUN=1" in check
    (test,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("test:")]
    assert "test-e2e" in test.split("##")[0].split()


def test_a_cluster_that_was_asked_for_and_is_not_there_ends_the_run_in_one_line() -> None:
    environment = {**os.environ, "E2E_PROVIDER": "existing", "PYTHONPATH": str(ROOT / "tests" / "support")}
    for name in ("CI", "KUBECONFIG"):
        environment.pop(name, None)
    words = [sys.executable, "-m", "e2e.run", "-q"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, "KUBECONFIG names: set it" in done.stdout) == (2, True), done.stdout + done.stderr
    assert "skipped" not in done.stdout
