"""An engine in a process of its own: loads once, then answers one JSON line for each JSON line.

Run by ``benchmarks.processes`` with the interpreter of the engine's environment. Standard output belongs to the
protocol; whatever the engine prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from benchmarks.adapters import Adapter, Settings, load
from benchmarks.workloads import Request


def main() -> None:
    engine, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        adapter = load(engine, settings)
    except Exception as error:
        _answer(answers, _failure(error))
        return
    _answer(answers, {"seconds": time.perf_counter() - started, "versions": adapter.versions})
    for line in sys.stdin:
        requests = [Request(**request) for request in json.loads(line)]
        _answer(answers, _run(adapter, requests))
    # Engines with processes and threads of their own may hang in their exit handlers; the parent has all it wants.
    os._exit(0)


def _run(adapter: Adapter, requests: list[Request]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        outcome = adapter.run(requests)
    except Exception as error:
        return _failure(error)
    seconds = time.perf_counter() - started
    asked = [request.max_tokens for request in requests]
    if outcome.output_lens != asked:
        return {"error": f"output lengths differ from those asked for: {outcome.output_lens} instead of {asked}"}
    return {"seconds": seconds, **dataclasses.asdict(outcome)}


def _failure(error: Exception) -> dict[str, Any]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"}


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


if __name__ == "__main__":
    main()
