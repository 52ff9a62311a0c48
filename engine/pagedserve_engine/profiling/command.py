"""The command: build the core as ``serve`` would, run each load under the profiler, print and keep what it saw."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from pagedserve_engine.assembly import Core, build_core
from pagedserve_engine.config import EngineConfig, build_parser
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.logs import configure_logging
from pagedserve_engine.profiling.load import Load, LoadRun
from pagedserve_engine.profiling.report import LoadReport, render_load, render_start, to_json
from pagedserve_engine.profiling.spans import name_parts
from pagedserve_engine.profiling.timeline import read_timeline

_DESCRIPTION = """Where a step's time goes: runs synthetic requests through the real core, with the settings of `serve`,
and writes a timeline for https://ui.perfetto.dev (<load>.trace.json) and the figures that it prints (profile.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command takes beside the engine's settings."""

    output: Path
    batch: int
    context: int
    steps: int
    loads: tuple[Literal["decode", "mixed"], ...]


def read_options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own flags, and the arguments that are the engine's. Raises ConfigError for a number below 1."""
    parser = _parser()
    parser.parse_args(list(arguments))  # help and unknown flags, over everything
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_flags(own)
    found, rest = own.parse_known_args(list(arguments))
    for name in ("batch", "context", "steps"):
        if getattr(found, name) < 1:
            raise ConfigError(f"--{name} is {getattr(found, name)}: give a number of at least 1", param=name)
    loads: tuple[Literal["decode", "mixed"], ...] = ("decode", "mixed") if found.load == "both" else (found.load,)
    options = Options(output=found.output, batch=found.batch, context=found.context, steps=found.steps, loads=loads)
    return options, rest


def _parser() -> argparse.ArgumentParser:
    settings = build_parser("pagedserve-engine profile")
    parser = argparse.ArgumentParser(
        prog="pagedserve-engine profile",
        description=_DESCRIPTION,
        parents=[settings],
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    _add_flags(parser)
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profile")
    group.add_argument("--output", type=Path, default=Path("profile"), help="folder to write to (default: profile)")
    group.add_argument("--batch", type=int, default=16, help="requests that decode together (default: 16)")
    group.add_argument("--context", type=int, default=512, help="tokens that each of them holds (default: 512)")
    group.add_argument("--steps", type=int, default=16, help="steps that are recorded (default: 16)")
    group.add_argument(
        "--load", choices=("decode", "mixed", "both"), default="both", help="what runs (default: both, one by one)"
    )


def run(arguments: Sequence[str]) -> None:
    """Profile and print; raises StartupError or EngineError where it can't."""
    options, rest = read_options(arguments)
    config = EngineConfig.read(rest, prog="pagedserve-engine profile")
    configure_logging(config.log_format, config.log_level)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    core = build_core(config)
    start = StartReport(time.perf_counter() - started, core.phases)
    print(render_start(start.seconds, start.phases), flush=True)
    # Before any span is in the way: a step's true time.
    loads = [_load(name, options) for name in options.loads]
    plain = {load.name: _run_plain(core, load) for load in loads}
    name_parts(core.processor)
    reports = [profile_load(core, load, options.output, plain_seconds=plain[load.name]) for load in loads]
    for report in reports:
        print("\n" + render_load(report), flush=True)
    document = to_json(reports, head=_head(core), start_seconds=start.seconds, phases=start.phases)
    (options.output / "profile.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{options.output}: " + ", ".join(sorted(path.name for path in options.output.iterdir())))


@dataclass(frozen=True, slots=True)
class StartReport:
    """How long the core took to build."""

    seconds: float
    phases: Mapping[str, float]


def _load(name: Literal["decode", "mixed"], options: Options) -> Load:
    return Load(
        name=name,
        batch=options.batch,
        context=options.context,
        steps=options.steps,
        arrivals=name == "mixed",
    )


def _run_plain(core: Core, load: Load) -> float:
    """Seconds of a step without the profiler."""
    running = LoadRun(core, load)
    try:
        running.prepare()
        return running.measure() / load.steps
    finally:
        running.end()


def profile_load(core: Core, load: Load, folder: Path, *, plain_seconds: float) -> LoadReport:
    """Run ``load`` under the profiler and write its trace into ``folder``."""
    on_gpu = core.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    running = LoadRun(core, load)
    try:
        running.prepare()
        with profile(activities=activities, acc_events=True) as profiler:
            running.measure()
            if on_gpu:
                torch.cuda.synchronize(core.device)
        generated = running.num_generated
    finally:
        running.end()
    trace = folder / f"{load.name}.trace.json"
    profiler.export_chrome_trace(str(trace))
    timeline = read_timeline(json.loads(trace.read_text())["traceEvents"])
    return LoadReport(load, plain_seconds, generated, timeline, trace.name)


def _head(core: Core) -> dict[str, object]:
    device = torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else "cpu"
    return {
        "model": core.name,
        "device": device,
        "dtype": str(core.dtype).removeprefix("torch."),
        "attention": core.attention,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
