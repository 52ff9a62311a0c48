"""What the container lets this process have: memory and processor time, from cgroups v1 and v2.

A group is bounded by its own limit and by those of all groups above it, so every reader walks up from the process's
group to the mount. Readers take the root folder, so that tests can give them a tree of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

_UNLIMITED: Final = 1 << 60
"""Bytes: v1 writes "no limit" as the largest number of whole pages below 2**63."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device's memory: what exists or may be used, and what of it is free now."""

    free: int
    total: int


def host_memory(root: Path = ROOT) -> Memory:
    """The tightest of physical memory and every memory limit on the way up, for the total and for what is free.

    The kernel gives file cache back under pressure, so it counts as free.
    """
    bounds = [_physical_memory(root)]
    bounds += [bound for folder in _folders_v2(root) if (bound := _memory_v2(folder))]
    bounds += [bound for folder in _folders_v1(root, "memory") if (bound := _memory_v1(folder))]
    return Memory(free=max(0, min(bound.free for bound in bounds)), total=min(bound.total for bound in bounds))


def cpu_limit(root: Path = ROOT, *, allowed: int | None = None) -> int:
    """Threads that can run at once: the tightest processor quota in whole threads, and at most the ``allowed`` ones.

    ``allowed`` is the number of processors that the scheduler may put this process on, asked where not given. Part of
    a processor is rounded down, since one thread too many is throttled and the others wait for it; never below 1.
    """
    allowed = len(os.sched_getaffinity(0)) if allowed is None else allowed
    shares = [share for folder in _folders_v2(root) if (share := _cpu_share_v2(folder))]
    shares += [share for folder in _folders_v1(root, "cpu") if (share := _cpu_share_v1(folder))]
    return max(1, int(min([allowed, *shares])))


def _physical_memory(root: Path) -> Memory:
    values = _table(root / "proc/meminfo")
    return Memory(free=values["MemAvailable:"] * 1024, total=values["MemTotal:"] * 1024)


def _memory_v2(folder: Path) -> Memory | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    stat = _table(folder / "memory.stat")
    reclaimable = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return Memory(free=limit - max(0, used - reclaimable), total=limit)


def _memory_v1(folder: Path) -> Memory | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    stat = _table(folder / "memory.stat")
    reclaimable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return Memory(free=limit - max(0, used - reclaimable), total=limit)


def _cpu_share_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _cpu_share_v1(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _folders_v2(root: Path) -> Iterator[Path]:
    for controllers, path in _memberships(root):
        if not controllers:
            yield from _upwards(root / "sys/fs/cgroup", path)


def _folders_v1(root: Path, controller: str) -> Iterator[Path]:
    for controllers, path in _memberships(root):
        if controller in controllers.split(","):
            # Mounted by all of its names, "cpu,cpuacct", or by one.
            for name in dict.fromkeys((controllers, controller)):
                yield from _upwards(root / "sys/fs/cgroup" / name, path)


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """(controllers, path of the group) of this process; v2 has no controllers here."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        yield controllers, path


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of those above it, as far as this mount shows them.

    Inside a container the path is often the host's while the mount shows the container's own part alone: then only
    the mount itself exists.
    """
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        if folder.is_dir():
            yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The file's number; None where there is no file, or the number means "no limit"."""
    text = _text(path)
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _table(path: Path) -> dict[str, int]:
    """The file's lines of a name, a number and perhaps a unit."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
