"""The profile command on a tiny model, and how a trace becomes a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import tiny_model
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.phases import Phases
from pagedserve_engine.profiling.command import read_options
from pagedserve_engine.profiling.timeline import STEP, read_timeline
from processes import run_engine


@pytest.fixture(scope="module")
def folder() -> str:
    return str(tiny_model("llama")[1])


def test_the_command_prints_tables_and_keeps_a_timeline(folder: str, tmp_path: Path) -> None:
    output = tmp_path / "profile"
    done = run_engine(
        "profile", "--model", folder, "--batch", "3", "--context", "40", "--steps", "4", "--output", str(output)
    )
    assert done.status == 0, done.log
    assert done.out.startswith("time to ready")
    for words in ("decode: 3 requests decode at 40 tokens", "a prompt of 40 tokens", "products", "attention"):
        assert words in done.out
    written = json.loads((output / "profile.json").read_text())
    assert [load["name"] for load in written["loads"]] == ["decode", "mixed"]
    for load in written["loads"]:
        check_load(load)
        assert json.loads((output / load["trace"]).read_text())["traceEvents"]


def check_load(load: dict[str, Any]) -> None:
    """Every part of a step has its line, and the lines make up the step."""
    parts = {part["part"]: part["seconds"] for part in load["host"]}
    expected = ("schedule", "build inputs", "launch", "products", "norms", "attention", "sampling", "wait")
    assert set(expected) <= set(parts)
    assert sum(parts.values()) == pytest.approx(load["recorded_seconds"], rel=0.05)
    assert load["recorded_steps"] == 4
    assert load["tokens_per_second"] > 0


IMPOSSIBLE = {
    "more than the cache holds": (["--batch", "64", "--context", "500"], ["--batch is 64", "NUM_BLOCKS"]),
    "longer than the model": (["--batch", "1", "--context", "4000"], ["--context is 4000", "MAX_MODEL_LEN"]),
}


@pytest.mark.parametrize(("flags", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_load_that_cannot_be_is_refused_by_name(
    folder: str, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    done = run_engine("profile", "--model", folder, "--num-blocks", "64", "--output", str(tmp_path / "p"), *flags)
    assert done.status == 1
    assert all(word in done.last_line for word in words), done.log
    assert "Traceback" not in done.log


def test_own_flags_are_taken_out_and_the_rest_is_the_engines() -> None:
    options, rest = read_options(["--batch", "3", "--dtype", "float32", "--load", "mixed"])
    assert (options.batch, options.loads, rest) == (3, ("mixed",), ["--dtype", "float32"])
    with pytest.raises(ConfigError, match="--steps is 0"):
        read_options(["--steps", "0"])


def test_phases_add_up_in_their_order_even_where_they_fail() -> None:
    times = iter([0.0, 1.0, 3.0, 3.0, 4.0, 5.0, 7.0, 8.0])
    phases = Phases(lambda: next(times))
    with phases.measure("weights"):
        pass
    with pytest.raises(RuntimeError), phases.measure("graphs"):
        raise RuntimeError
    with phases.measure("weights"):
        pass
    assert phases.seconds == {"weights": 4.0, "graphs": 1.0}
    assert phases.describe() == "8.0 s: weights 4.0 s, graphs 1.0 s"


def event(name: str, start: float, duration: float, **rest: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": "user_annotation", "tid": 1, "ts": start, "dur": duration, **rest}


def test_a_part_is_what_its_operators_leave_of_its_span() -> None:
    operators = [
        event("aten::linear", 30, 20, cat="cpu_op"),
        event("aten::addmm", 32, 15, cat="cpu_op"),
        event("aten::mul", 55, 5, cat="cpu_op"),
        event("aten::add", 200, 5, cat="cpu_op", tid=2),
    ]
    spans = [
        event(STEP, 0, 100),
        event("pagedserve.schedule", 0, 10),
        event("pagedserve.forward", 20, 60),
        event("pagedserve.attention", 60, 10),
        event("aten::mm", 62, 4, cat="cpu_op"),
    ]
    timeline = read_timeline([*operators, *spans])
    found = {part.name: (round(part.seconds * 1e6), part.calls) for part in timeline.host}
    assert found == {
        "schedule": (10, 1),
        "products": (20, 2),
        "attention": (10, 2),
        "other operators": (5, 1),
        "model, between operators": (25, 1),
        "between the parts": (30, 1),
    }
    assert (timeline.num_steps, timeline.device) == (1, ())
    assert timeline.seconds == pytest.approx(100e-6)


def test_kernels_are_told_apart_by_their_names_and_the_rest_is_idle() -> None:
    kernels = [
        event("nvjet_tst_128x64", 10, 20, cat="kernel", tid=7),
        event("_decode_kernel", 30, 10, cat="kernel", tid=7),
        event("Memcpy HtoD", 45, 5, cat="gpu_memcpy", tid=7),
        event("elementwise_kernel", 50, 10, cat="kernel", tid=7),
    ]
    timeline = read_timeline([event(STEP, 0, 100), *kernels])
    assert {part.name: round(part.seconds * 1e6) for part in timeline.device} == {
        "products": 20,
        "attention": 10,
        "copies": 5,
        "other kernels": 10,
        "idle": 55,
    }


def test_a_trace_without_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="no span"):
        read_timeline([event("aten::mm", 0, 1, cat="cpu_op")])
