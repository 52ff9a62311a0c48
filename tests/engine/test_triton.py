"""The Triton kernels in Triton's interpreter: their cases, each module in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = sorted((Path(__file__).parent / "triton_cases").glob("test_*.py"))


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem.removeprefix("test_"))
def test_kernels_do_in_the_interpreter_what_torch_does(cases: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=300", str(cases)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout, done.stdout
