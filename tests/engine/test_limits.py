import os

import pytest

from pagedserve_engine.limits import Memory, cpu_limit, host_memory

GIB = 1 << 30
V1_UNLIMITED = 9223372036854771712


def tree(root, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def machine(total=64, free=48):
    return {"proc/meminfo": f"MemTotal: {total << 20} kB\nMemFree: 1 kB\nMemAvailable: {free << 20} kB"}


def v2(path, *, limit, used, inactive=0, active=0, shared=0):
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    stat = f"anon 1\nfile {inactive + active + shared}\nactive_file {active}\ninactive_file {inactive}\nshmem {shared}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def v1(path, *, limit, used, inactive=0):
    folder = f"sys/fs/cgroup/memory/{path}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {inactive}\ntotal_active_file 0",
    }


def test_without_limits_the_machines_memory_counts(tmp_path):
    assert host_memory(tree(tmp_path, machine())) == Memory(free=48 * GIB, total=64 * GIB)


def test_a_v2_limit_counts_less_what_cannot_be_reclaimed(tmp_path):
    files = {"proc/self/cgroup": "0::/", **v2("", limit=8 * GIB, used=5 * GIB, inactive=GIB, active=GIB, shared=GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})) == Memory(free=5 * GIB, total=8 * GIB)


def test_max_is_no_limit(tmp_path):
    files = {"proc/self/cgroup": "0::/", **v2("", limit="max", used=5 * GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})).total == 64 * GIB


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = {
        "proc/self/cgroup": "0::/pods/mine/container",
        **v2("pods", limit=16 * GIB, used=15 * GIB),
        **v2("pods/mine", limit=8 * GIB, used=GIB),
        **v2("pods/mine/container", limit="max", used=GIB),
        **v2("pods/other", limit=GIB, used=GIB),
    }
    # Neighbours fill the outer group; the inner one bounds the total.
    assert host_memory(tree(tmp_path, {**machine(), **files})) == Memory(free=GIB, total=8 * GIB)


def test_a_v1_limit_counts(tmp_path):
    files = {
        "proc/self/cgroup": "9:cpu,cpuacct:/box\n4:memory:/box\n0::/",
        **v1("box", limit=4 * GIB, used=2 * GIB, inactive=GIB),
        **v1("", limit=V1_UNLIMITED, used=30 * GIB),
    }
    assert host_memory(tree(tmp_path, {**machine(), **files})) == Memory(free=3 * GIB, total=4 * GIB)


def test_v1s_largest_number_is_no_limit(tmp_path):
    files = {"proc/self/cgroup": "4:memory:/", **v1("", limit=V1_UNLIMITED, used=30 * GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})) == Memory(free=48 * GIB, total=64 * GIB)


def test_a_container_that_sees_only_its_own_part_of_the_tree_finds_its_limit(tmp_path):
    files = {"proc/self/cgroup": "4:memory:/docker/0123", **v1("", limit=4 * GIB, used=GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})).total == 4 * GIB


def test_a_group_outside_the_namespace_is_bounded_by_what_is_seen(tmp_path):
    files = {"proc/self/cgroup": "0::/../../elsewhere", **v2("", limit=4 * GIB, used=GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})).total == 4 * GIB


def test_usage_over_the_limit_leaves_nothing(tmp_path):
    files = {"proc/self/cgroup": "0::/", **v2("", limit=GIB, used=2 * GIB)}
    assert host_memory(tree(tmp_path, {**machine(), **files})).free == 0


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        pytest.param({}, 8, id="no cgroups"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "max 100000"}, 8, id="v2 without a quota"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4, id="v2 with a quota"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2, id="part of a processor is rounded down"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1, id="never below one thread"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "1600000 100000"}, 8, id="a quota above the allowed processors"),
        pytest.param(
            {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3,
            id="a quota further up",
        ),
        pytest.param(
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 200000,
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
            },
            2,
            id="v1 with a quota",
        ),
        pytest.param(
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000},
            8,
            id="v1 without a quota",
        ),
    ],
)
def test_threads_follow_the_tightest_processor_limit(tmp_path, files, threads):
    memberships = {"proc/self/cgroup": "2:cpu,cpuacct:/a\n0::/a/b"}
    assert cpu_limit(tree(tmp_path, {**memberships, **files}), allowed=8) == threads


def test_this_machine_can_be_read():
    memory = host_memory()
    assert 0 < memory.free <= memory.total
    assert 1 <= cpu_limit() <= len(os.sched_getaffinity(0))
