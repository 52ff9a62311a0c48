"""Addresses of the loopback interface, which pods and Services of a test's cluster are reached at; needs root."""

from __future__ import annotations

import ipaddress
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LABELLED = re.compile(r" inet ([\d.]+)/32 .* lo:(\d+)\\")
_NETWORK = ipaddress.ip_network("198.18.0.0/15")
"""Set aside for tests of networks (RFC 2544), so that no real host is hidden by an address of ours."""
SUBNET_SIZE = 1024
_SUBNETS = range(_NETWORK.num_addresses // SUBNET_SIZE)
_CLAIMED = _SUBNETS[80:]
"""Those below are given by hand, to nodes that run alone."""


def why_not() -> str:
    """One line on why no address can be added here; empty where one can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "pods and Services with addresses of their own need root and `ip`"
    return ""


def address_in(subnet: int, number: int) -> str:
    """Address ``number`` (below SUBNET_SIZE) of a subnet."""
    if subnet not in _SUBNETS or number not in range(SUBNET_SIZE):
        raise ValueError(f"there is no address {number} in subnet {subnet}")
    return str(_NETWORK[subnet * SUBNET_SIZE + number])


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
    """The number of a subnet that nobody else on this machine gives to pods as long as this is entered.

    The node's own address, number 1, is the claim, since an address can be added only once.
    """
    sweep()
    for subnet in random.sample(_CLAIMED, len(_CLAIMED)):
        address = address_in(subnet, 1)
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
