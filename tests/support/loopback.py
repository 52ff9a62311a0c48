"""Addresses of the loopback interface, which pods and Services of a test's cluster are reached at; needs root."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LABELLED = re.compile(r" inet ([\d.]+)/32 .* lo:(\d+)\\")
_SUBNETS = range(100, 200)


def why_not() -> str:
    """One line on why no address can be added here; empty where one can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "pods and Services with addresses of their own need root and `ip`"
    return ""


def add_address(address: str) -> bool:
    """Whether the address is new here; raises OSError where it can't be added."""
    done = _change("add", address)
    if done.returncode and "exists" not in done.stderr and "already assigned" not in done.stderr:
        raise OSError(f"ip addr add {address}: {done.stderr.strip()}")
    return done.returncode == 0


def sweep() -> None:
    """Remove the addresses of runs that are dead: each bears the number of the process that added it."""
    told = subprocess.run(["ip", "-o", "addr", "show", "dev", "lo"], capture_output=True, text=True).stdout
    for address, pid in _LABELLED.findall(told):
        if not Path("/proc", pid).exists():
            remove_address(address)


def remove_address(address: str) -> None:
    """Remove it; it is no error where it isn't there."""
    _change("del", address)


@contextmanager
def claimed_subnet() -> Iterator[int]:
    """A number S that nobody else on this machine gives to pods (10.S.x.y) as long as this is entered.

    The node's own address 10.S.0.1 is the claim, since an address can be added only once.
    """
    sweep()
    for subnet in random.sample(_SUBNETS, len(_SUBNETS)):
        address = f"10.{subnet}.0.1"
        if add_address(address):
            break
    else:
        raise OSError("every subnet for pods is taken: `ip addr show lo` tells what earlier runs left there")
    try:
        yield subnet
    finally:
        remove_address(address)


def _change(action: str, address: str) -> subprocess.CompletedProcess[str]:
    label = ["label", f"lo:{os.getpid()}"] if action == "add" else []
    command = ["ip", "addr", action, f"{address}/32", "dev", "lo", *label]
    return subprocess.run(command, capture_output=True, text=True)
