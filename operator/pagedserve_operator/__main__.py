"""``pagedserve-operator run`` and ``size``: arguments to settings to the right entry, nothing else."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pagedserve_operator import assembly, logs
from pagedserve_operator.assembly import Operator
from pagedserve_operator.config import ConfigError, OperatorConfig, read_config
from pagedserve_operator.errors import OperatorError
from pagedserve_operator.offline import size_file


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for what went wrong, 2 for what was asked wrongly."""
    asked = _parser().parse_args(arguments)
    try:
        config = read_config()
        if asked.command == "size":
            return _size(asked.file, config, nodes=asked.nodes)
        logs.configure(form=config.log_format, level=config.log_level)
        asyncio.run(assembly.run(config, on_start=_stop_on_signals))
    except (ConfigError, OperatorError) as error:
        print(f"pagedserve-operator: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pagedserve-operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "run", help="reconcile InferenceServices until told to stop; settings come from the environment"
    )
    size = commands.add_parser("size", help="print how a resource's engine would be sized; needs no cluster")
    size.add_argument("file", help="YAML of an InferenceService; - for standard input")
    size.add_argument("--nodes", type=Path, help="`kubectl get nodes -o yaml`, to resolve `gpu.type: auto`")
    return parser


def _stop_on_signals(operator: Operator) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, operator.stop)


def _size(file: str, config: OperatorConfig, *, nodes: Path | None) -> int:
    text = sys.stdin.read() if file == "-" else _read(Path(file))
    for part in asyncio.run(size_file(text, config, nodes=_read(nodes) if nodes else None)):
        print(part)
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise OperatorError(f"{file} can't be read: {why}") from error


if __name__ == "__main__":
    sys.exit(main())
