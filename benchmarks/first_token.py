"""``make serve`` from a fresh clone to the first streamed token: what a newcomer waits for.

Clones the last commit into a temporary folder, so the environment is made and the small model converted anew;
packages come from uv's cache.
``python -m benchmarks.first_token`` prints one JSON line with seconds since the clone began.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import ROOT, Process
from benchmarks.servers import HOST, POLL_SECONDS, answers, free_port

LIMIT_SECONDS = 800.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fresh-clone-") as folder:
        started = time.monotonic()
        clone = Path(folder) / "pagedserve"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        port = free_port()
        environment = {name: text for name, text in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        environment |= {"HOST": HOST, "PORT": str(port), "CACHE_DIR": str(Path(folder) / "cache")}
        with Process(["make", "-C", str(clone), "serve"], environment) as process:
            try:
                _wait_until_ready(process, port, started + LIMIT_SECONDS)
                ready = time.monotonic() - started
                _read_first_token(port)
            except (TimeoutError, RuntimeError, OSError) as error:
                sys.exit(f"{error}: {process.last_words()}")
            print(json.dumps({"ready": round(ready, 2), "first_token": round(time.monotonic() - started, 2)}))


def _wait_until_ready(process: Process, port: int, deadline: float) -> None:
    while not answers(port, "/health/ready"):
        if process.child.poll() is not None:
            raise RuntimeError("make serve ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {LIMIT_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


def _read_first_token(port: int) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    body = {"prompt": "The capital of France is", "max_tokens": 8, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = response.readline()
    if response.status != 200 or not first.startswith(b"data: {"):
        raise RuntimeError(f"status {response.status}, first line {first!r}")
    connection.close()


if __name__ == "__main__":
    main()
