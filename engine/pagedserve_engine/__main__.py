"""The command line: arguments to a configuration to the right entry, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pagedserve_engine.config import EngineConfig, read_termination_path
from pagedserve_engine.errors import EngineError, StartupError
from pagedserve_engine.logs import configure_logging

_COMMANDS = {
    "serve": "serve the model over the OpenAI API",
    "profile": "show where a step's time goes: a table and a timeline; takes the settings of serve, and --output",
    "plan-memory": "print what the model, a step and the cache would take (--json for a JSON document), and end",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed (the reason is the last line), 2 wrong arguments."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": _serve,
        "profile": _profile,
        "plan-memory": _plan_memory,
    }
    if not arguments or arguments[0] not in commands:
        return _usage(arguments)
    return commands[arguments[0]](arguments[1:])


def _usage(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pagedserve-engine", description="A language model over the OpenAI API.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        subparsers.add_parser(name, help=f"{text}; {name} --help lists every setting", add_help=False)
    parser.parse_args(arguments)
    return 2


def _serve(arguments: list[str]) -> int:
    try:
        config = EngineConfig.read(arguments, prog="pagedserve-engine serve")
        configure_logging(config.log_format, config.log_level)
        # Heavy imports come after the settings are known to be right.
        from prometheus_client import CollectorRegistry, disable_created_metrics

        from pagedserve_engine.frontend import AsyncEngine
        from pagedserve_engine.metrics import EngineMetrics
        from pagedserve_engine.server.app import serve

        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        serve(config, AsyncEngine(config, EngineMetrics(registry)), registry)
    except (StartupError, EngineError) as error:
        return _terminate(error, read_termination_path(arguments))
    return 0


def _profile(arguments: list[str]) -> int:
    try:
        from pagedserve_engine.profiling.command import run

        run(arguments)
    except (StartupError, EngineError) as error:
        return _terminate(error, None)
    return 0


def _plan_memory(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        config = EngineConfig.read(
            [argument for argument in arguments if argument != "--json"], prog="pagedserve-engine plan-memory"
        )
        configure_logging(config.log_format, config.log_level)
        from pagedserve_engine.assembly import plan_only
        from pagedserve_engine.memory import render_table, to_json

        plan, estimate = plan_only(config)
        print((to_json if as_json else render_table)(plan, estimate=estimate))
    except StartupError as error:
        return _terminate(error, None)
    return 0


def _terminate(error: StartupError | EngineError, path: Path | None) -> int:
    """Say in one line why the process ends: on standard error, and in the file that the platform reads."""
    line = " ".join(error.message.split())
    print(f"pagedserve-engine: {line}", file=sys.stderr)
    if path is not None and path.exists():
        try:
            path.write_text(line[:4096])
        except OSError as problem:
            print(f"pagedserve-engine: {path} can't be written: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
