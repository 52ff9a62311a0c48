"""Compiles the kernels with the system's C++ compiler.

The package's build hook runs this file by its path where nothing else of the engine is importable: standard library
only. ``python -m pagedserve_engine.native.build`` builds again by hand.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
LIBRARY = Path(__file__).parent / "kernels.so"

COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ["-std=c++17", "-O3", "-w", "-fPIC", "-fvisibility=hidden"]
_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


class BuildError(Exception):
    """The kernels could not be compiled; the message says why."""


def digest() -> str:
    """Of all sources: a library carries the digest of what it was compiled from."""
    found = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def build(target: Path = LIBRARY) -> None:
    """Compile every instruction set into the library ``target``; raises BuildError."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler on the PATH ({', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory() as folder:
        units = _units(platform.machine().lower() in ("x86_64", "amd64"))
        objects = [Path(folder) / f"{at}.o" for at in range(len(units))]
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(SOURCE / name), "-o", str(to)]
            for (name, flags), to in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_run, commands))
        library = Path(folder) / target.name
        _run([compiler, "-shared", *map(str, objects), "-o", str(library)])
        # A process that runs the old library keeps it: the new one takes its name, not its place.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(library, partial)
        partial.replace(target)


def _units(is_x86: bool) -> list[tuple[str, list[str]]]:
    """(Source, flags) of every object."""
    units = [("dispatch.cpp", [f'-DDIGEST="{digest()}"']), ("variant.cpp", ["-DKERNELS=kPortable"])]
    if is_x86:
        units.append(("variant.cpp", ["-DKERNELS=kAvx2", *_AVX2]))
        units.append(("variant.cpp", ["-DKERNELS=kAvx512", *_AVX512]))
    return units


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
