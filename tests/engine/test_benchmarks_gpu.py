"""Every row of the GPU benchmark in small on a CPU, and the arithmetic behind its bars."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.bars import BARS, report, void_reason_of
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.gap import STEP, find_gaps, idle_time
from benchmarks.gpu.groups import GROUPS, SHARE
from benchmarks.gpu.mixed import lengths
from benchmarks.gpu.processes import GroupProcess
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.gpu.shape import Shape
from benchmarks.results import ResultFile, Row

ROOT = Path(__file__).parents[2]
LIMITS = {"bandwidth": 1e10, "product": 1e11}


def bench(folder: Path, rows: list[Row]) -> Bench:
    return Bench(
        scale=TINY,
        device="cpu",
        folder=folder,
        deadline=time.monotonic() + 120,
        limits=LIMITS,
        report=rows.append,
    )


@pytest.mark.parametrize("name", GROUPS)
def test_every_row_of_a_group_has_a_figure_or_a_plain_reason(name: str, tmp_path: Path) -> None:
    rows: list[Row] = []
    GROUPS[name].run(bench(tmp_path, rows))
    for row in rows:
        assert row.value is not None or row.note.startswith("not compared: "), row
    found = {(row.workload, row.engine, row.metric): row for row in rows}
    for workload, engine, metric, unit in GROUPS[name].rows:
        row = found[workload, engine, metric]
        assert row.unit == unit
        assert row.value is None or row.value > 0 or metric == "gap", row


def test_a_cpu_is_held_against_its_own_limits(tmp_path: Path) -> None:
    rows: list[Row] = []
    SHARE.run(replace(bench(tmp_path, rows), limits={}))
    found = {(row.workload, row.metric): row.value for row in rows}
    for workload in TINY.decode:
        assert all((found[workload, metric] or 0) > 0 for metric in ("step", "bound", "product_bound"))


def test_a_process_that_dies_leaves_its_last_words_in_the_rows(tmp_path: Path) -> None:
    with GroupProcess("limits", device="cpu", scale="none such", folder=tmp_path, logs=tmp_path) as process:
        messages = list(process.run(60, {}))
    assert [list(message) for message in messages] == [["machine"]]
    assert process.ending == "not measured: the process ended with status 1: KeyError: 'none such'"


def test_a_row_that_fails_says_why_and_keeps_the_others(tmp_path: Path) -> None:
    rows: list[Row] = []
    here = bench(tmp_path, rows)

    def half() -> Any:
        yield Row("w", "pagedserve", "first", 1.0, "ms")
        raise RuntimeError("the device\nis gone")

    here.attempt("w", "second", "ms", half)
    assert [(row.metric, row.value) for row in rows] == [("first", 1.0), ("second", None)]
    assert rows[1].note == "failed: RuntimeError: the device is gone"


def test_the_command_measures_one_group_and_keeps_it(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--groups", "limits", "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(output.read_text())
    assert {(row["workload"], row["metric"]) for row in stored["rows"]} == {("copy", "bandwidth"), ("product", "rate")}
    assert all(row["value"] > 0 for row in stored["rows"])
    assert stored["hardware"]["card"] == "cpu"
    assert {"torch", "transformers", "python"} <= set(stored["versions"])
    assert "open" in done.stdout
    assert output.with_suffix(".png").exists() == (find_spec("matplotlib") is not None)


def test_a_machine_without_a_device_is_told_what_to_do(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--groups", "limits", "--output", str(tmp_path / "none.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stderr
    assert "--tiny --device cpu" in done.stderr
    assert not (tmp_path / "none.json").exists()


def test_the_shapes_are_those_that_engine_and_operator_agree_on() -> None:
    golden = json.loads((ROOT / "tests/golden/model_shapes.json").read_text())["Llama-3.1-8B"]
    shape = Shape.read(FULL.large)
    embedding = golden["vocab_size"] * golden["hidden_size"]
    norms = golden["hidden_size"] * (2 * golden["layers"] + 1)
    assert shape.layer_weights + shape.head_weights + embedding + norms == golden["parameters"]
    assert shape.cache_bytes() * 32 == golden["block_bytes_bf16"]["32"]


def test_a_step_of_8b_reads_15_gb_and_128_kib_for_each_token() -> None:
    shape = Shape.read(FULL.large)
    assert shape.weight_bytes() == pytest.approx(15.0e9, rel=0.01)
    assert shape.cache_bytes() == 128 << 10
    assert shape.prefill_flop(1, 1) == pytest.approx(15.0e9, rel=0.01)


def test_lengths_lie_within_bounds_and_the_peer_runs_the_first_of_them(tmp_path: Path) -> None:
    here = Bench(scale=FULL, device="cpu", folder=tmp_path, deadline=0, report=lambda row: None)
    ours, peers = lengths(here, FULL.mixed), lengths(here, FULL.mixed_peer)
    assert ours[: len(peers)] == peers
    assert all(100 <= tokens <= 1024 for request in ours for tokens in (request.prompt, request.output))


def trace(*, kernels: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Steps of 100 µs each; kernels as (launched at, start, duration)."""
    events: list[dict[str, Any]] = [
        {"ph": "X", "name": STEP, "cat": "user_annotation", "ts": ts, "dur": 100} for ts in (0, 100, 200)
    ]
    for number, (launched, start, duration) in enumerate(kernels):
        args = {"correlation": number}
        events.append({"ph": "X", "name": "launch", "cat": "cuda_runtime", "ts": launched, "dur": 1, "args": args})
        events.append({"ph": "X", "name": "k", "cat": "kernel", "ts": start, "dur": duration, "args": args})
    return events


def test_a_gap_lies_between_the_kernels_of_two_steps_wherever_the_host_is() -> None:
    # The host is a step ahead: what it launches in a step runs in the next one.
    found = find_gaps(trace(kernels=[(10, 110, 40), (20, 150, 30), (110, 185, 60), (210, 251, 20)]))
    assert found.between == [5.0, 6.0]
    assert found.idle == pytest.approx(11 / 3)


def test_steps_that_overlap_on_the_device_have_no_gap() -> None:
    assert find_gaps(trace(kernels=[(10, 20, 100), (110, 115, 20)])).between == [0.0]


def test_a_trace_without_kernels_is_an_error_rather_than_no_gap() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        find_gaps(trace(kernels=[]))


def test_idle_time_counts_what_nothing_covers() -> None:
    assert idle_time([(0, 10), (5, 8), (12, 20), (20, 21)]) == 2


def test_a_slow_h100_voids_the_run_and_another_card_does_not() -> None:
    assert "2.50 TB/s" in void_reason_of("NVIDIA H100 80GB HBM3", 2.5)
    assert not void_reason_of("NVIDIA H100 80GB HBM3", 3.0)
    assert not void_reason_of("NVIDIA A10G", 0.5)


def test_bars_stay_open_until_their_rows_are_there(tmp_path: Path) -> None:
    machine = {"card": "NVIDIA H100 80GB HBM3"}
    results = ResultFile(tmp_path / "gpu.json", versions={}, settings={}, machine=machine)
    assert {bar.verdict(results)[1] for bar in BARS} == {"open"}
    results.add([Row("decode_8", "pagedserve", "step_over_bound", 1.2, "x")])
    results.add([Row("mixed_8b", name, "throughput", value, "tok/s") for name, value in
                 (("pagedserve", 9000.0), ("transformers_cb", 3000.0))])  # fmt: skip
    verdicts = [bar.verdict(results)[1] for bar in BARS]
    assert (verdicts.count("met"), verdicts.count("missed")) == (1, 1)
    results.add([Row("copy", "device", "bandwidth", 2.0, "TB/s")])
    assert report(results).startswith("VOID")
