"""Addresses of the loopback interface: whose they are, and that those of the dead are free again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loopback import add_address, claimed_subnet, remove_address, why_not

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def _root() -> None:
    if reason := why_not():
        pytest.skip(reason)


def test_what_a_killed_run_left_is_removed_and_nothing_of_the_living() -> None:
    dead, own = "198.19.255.7", "198.19.255.8"
    left = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from loopback import add_address; add_address({dead!r})"
    subprocess.run([sys.executable, "-c", left], check=True)
    assert add_address(own)
    try:
        with claimed_subnet():
            assert not add_address(own), "it is still there"
            assert add_address(dead), "it was removed"
    finally:
        remove_address(own)
        remove_address(dead)
