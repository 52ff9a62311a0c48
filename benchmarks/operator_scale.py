"""``python -m benchmarks.operator_scale``: a thousand InferenceServices at once, and then ten minutes of nothing.

A real control plane (etcd, API server, controllers, scheduler) with KWOK's nodes, the operator as a process of its own.
Writes and times are counted from the API server's audit log, memory from the kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import yaml

from benchmarks.processes import ROOT
from benchmarks.results import RESULTS_FOLDER, hardware

sys.path.insert(0, str(ROOT / "tests" / "support"))

from control_audit import AuditEntry
from control_cluster import Cluster
from controlplane import find_control_plane
from fake_nodes import FakeNodes
from operators import OperatorProcess

GPUS_PER_NODE = 8
APPLIERS = 16
CONVERGING_SECONDS = 900.0
NAMESPACE = "default"
AGENT = "pagedserve-operator/"
BARS = {"writes_per_resource_most": 14, "operator_peak_mib": 250, "steady_writes": 0}


@dataclass(frozen=True)
class Arrival:
    """What one run of arrivals showed; seconds are from the first apply, or for one resource from its own apply."""

    resources: int
    applied_seconds: float
    converged_seconds: float
    deployment_p50_seconds: float
    deployment_p99_seconds: float
    ready_p50_seconds: float
    writes_per_resource_mean: float
    writes_per_resource_most: int
    writes_by_kind: dict[str, int]
    operator_peak_mib: float
    operator_cpu_seconds: float


def main() -> int:
    options = _arguments()
    with ExitStack() as stack:
        cluster = stack.enter_context(find_control_plane())
        cluster.kubectl("create", "-f", str(ROOT / "crds" / "inferenceservices.yaml"))
        nodes = stack.enter_context(FakeNodes(cluster))
        for index in range(-(-options.resources // GPUS_PER_NODE)):
            nodes.add_gpu_node(f"gpu-{index:03}", product="NVIDIA-L4", gpus=GPUS_PER_NODE, memory_mib=23034)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        operator = stack.enter_context(OperatorProcess(cluster.kubeconfig, folder, **_REAL))
        arrival = _arrive(cluster, operator, options.resources)
        _show(f"{options.resources:,} InferenceServices at once", vars(arrival))
        steady = _stay(cluster, operator, options.steady_seconds)
        _show(f"steady for {options.steady_seconds:g} s", steady)
        result = {"hardware": hardware(), "arrival": vars(arrival), "steady": steady, "bars": BARS}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return _judge({**vars(arrival), **steady})


_REAL = {"LEASE_SECONDS": "15", "RENEW_DEADLINE_SECONDS": "10", "RENEW_SECONDS": "2"}
"""The lease as in production; the other settings of a test's operator are the defaults."""


def _arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator_scale", description=__doc__)
    parser.add_argument("--resources", type=int, default=1000)
    parser.add_argument("--steady-seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS_FOLDER / "operator.json")
    return parser.parse_args(arguments)


def _arrive(cluster: Cluster, operator: OperatorProcess, number: int) -> Arrival:
    mark, began = cluster.audit.mark(), time.monotonic()
    client = cluster.client()
    sample = yaml.safe_load((ROOT / "manifests" / "samples" / "hub-any-gpu.yaml").read_text())
    manifests = [
        {**sample, "metadata": {"name": f"model-{index:04}", "namespace": NAMESPACE}} for index in range(number)
    ]
    with ThreadPoolExecutor(APPLIERS) as appliers:
        list(appliers.map(client.create, manifests))
    applied = time.monotonic() - began
    client.wait(lambda: _ready(cluster) == number, "every resource is Ready", seconds=CONVERGING_SECONDS, every=1.0)
    converged = time.monotonic() - began
    process = psutil.Process(operator.pid)
    entries = cluster.audit.since(mark)
    writes = [entry for entry in entries if entry.is_write and entry.user_agent.startswith(AGENT)]
    per_resource = Counter(_resource_of(entry) for entry in writes if entry.resource != "leases")
    created = {entry.name: _at(entry) for entry in entries if _is_creation(entry, "inferenceservices")}
    deployed = {entry.name: _at(entry) for entry in writes if _is_creation(entry, "deployments")}
    ready = {entry.name: _at(entry) for entry in writes if entry.subresource == "status"}
    waits = sorted(deployed[name] - created[name] for name in created)
    return Arrival(
        resources=number,
        applied_seconds=round(applied, 1),
        converged_seconds=round(converged, 1),
        deployment_p50_seconds=round(statistics.median(waits), 2),
        deployment_p99_seconds=round(waits[min(len(waits) - 1, int(len(waits) * 0.99))], 2),
        ready_p50_seconds=round(statistics.median(ready[name] - created[name] for name in created), 2),
        writes_per_resource_mean=round(statistics.mean(per_resource.values()), 2),
        writes_per_resource_most=max(per_resource.values()),
        writes_by_kind=dict(Counter(" ".join(filter(None, _kind(entry))) for entry in writes)),
        operator_peak_mib=round(_peak_mib(operator.pid), 1),
        operator_cpu_seconds=round(sum(process.cpu_times()[:2]), 1),
    )


def _stay(cluster: Cluster, operator: OperatorProcess, seconds: float) -> dict[str, object]:
    # What the arrival set off in the cluster ends first: the last status is seconds old.
    mark, began = cluster.audit.mark(), time.monotonic()
    before = sum(psutil.Process(operator.pid).cpu_times()[:2])
    for minute in _ticks(seconds):
        print(f"  {minute:5.0f} s, {len(_writes(cluster, mark))} writes", file=sys.stderr, flush=True)
    writes = _writes(cluster, mark)
    metrics = operator.metrics()
    return {
        "steady_seconds": round(time.monotonic() - began, 1),
        "steady_writes": len(writes),
        "steady_writes_by_kind": dict(Counter(" ".join(filter(None, _kind(entry))) for entry in writes)),
        "steady_looks": sum(value for (name, _), value in metrics.items() if name.endswith("reconciles_total")),
        "steady_cpu_share": round((sum(psutil.Process(operator.pid).cpu_times()[:2]) - before) / max(seconds, 1), 3),
        "operator_peak_mib": round(_peak_mib(operator.pid), 1),
    }


def _writes(cluster: Cluster, mark: int) -> list[AuditEntry]:
    return [
        entry
        for entry in cluster.audit.writes(mark, but=("leases",))
        if entry.user_agent.startswith("pagedserve-operator")
    ]


def _ticks(seconds: float) -> Iterator[float]:
    began = time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 0:
        time.sleep(min(60.0, left))
        yield time.monotonic() - began


def _ready(cluster: Cluster) -> int:
    resources = cluster.client().list("pagedserve.dev/v1alpha1", "InferenceService", namespace=NAMESPACE)
    return sum(
        any(
            row["type"] == "Ready" and row["status"] == "True"
            for row in resource.get("status", {}).get("conditions", ())
        )
        for resource in resources
    )


def _is_creation(entry: AuditEntry, resource: str) -> bool:
    return entry.resource == resource and not entry.subresource and entry.code == 201


def _resource_of(entry: AuditEntry) -> str:
    # An event's name is the resource's, a point, and a random part.
    return entry.name.split(".")[0]


def _kind(entry: AuditEntry) -> tuple[str, str, str]:
    return entry.verb, entry.resource, entry.subresource


def _at(entry: AuditEntry) -> float:
    return datetime.fromisoformat(entry.at).timestamp()


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _show(title: str, values: dict[str, object]) -> None:
    print(title, flush=True)
    for name, value in values.items():
        print(f"  {name:28} {value}", flush=True)


def _judge(values: dict[str, object]) -> int:
    missed = [f"{name} is {values[name]}, above {bar}" for name, bar in BARS.items() if float(str(values[name])) > bar]
    print("; ".join(missed) or "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
