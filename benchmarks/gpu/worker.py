"""One group of rows in a process of its own: JSON lines out, first the machine, then each row as soon as it is done.

Standard output belongs to the protocol; whatever libraries print goes to standard error. The imports that take long
come before the word "go", so that they overlap with the group that runs before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.groups import GROUPS, SHARE
from benchmarks.gpu.scale import SCALES


def main() -> None:
    order = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    import torch
    import transformers  # noqa: F401

    if order["group"] != "limits":
        import pagedserve_engine.assembly  # noqa: F401
    go = json.loads(sys.stdin.readline())
    if order["device"] == "cuda" and not torch.cuda.is_available():
        _answer(answers, {"error": f"torch {torch.__version__} sees no CUDA device"})
        return
    _answer(answers, {"machine": machine(order["device"])})
    bench = Bench(
        scale=SCALES[order["scale"]],
        device=order["device"],
        folder=Path(order["folder"]),
        deadline=time.monotonic() + go["seconds"],
        limits=go["limits"],
        report=lambda row: _answer(answers, {"row": dataclasses.asdict(row)}),
    )
    (SHARE if order["group"] == "share" else GROUPS[order["group"]]).run(bench)
    # Threads of a peer may hang in their exit handlers; the parent has all it wants.
    os._exit(0)


def machine(device: str) -> dict[str, Any]:
    """The device's name and memory, and the versions that run."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "card": "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
        found["versions"]["cuda"] = torch.version.cuda
    try:
        import triton
    except ImportError:
        return found
    found["versions"]["triton"] = triton.__version__
    return found


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


if __name__ == "__main__":
    main()
