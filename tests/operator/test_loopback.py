"""Addresses of the loopback interface: whose they are, and that those of the dead are free again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loopback import add_address, address_in, claimed_subnet, remove_address, why_not
from missing import skip_without

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def _root() -> None:
    if reason := why_not():
        skip_without(reason)


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


def test_subnets_lie_side_by_side_where_no_real_host_is() -> None:
    assert address_in(0, 1) == "198.18.0.1"
    assert address_in(77, 1) == "198.19.52.1"
    assert address_in(127, 1023) == "198.19.255.255"
    for subnet, number in ((128, 1), (0, 1024)):
        with pytest.raises(ValueError, match="there is no address"):
            address_in(subnet, number)
