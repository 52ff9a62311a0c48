"""Lets the locked build of torch run where CUDA's libraries are left out, for an engine that has processors alone.

The lock holds one torch for all machines. It links against some 2.5 GB of libraries that a processor never calls, and
the loader refuses torch without them. Each gets a stand-in of a few KB: a library of its name with the functions that
torch names, which report an error. CUDA's runtime stays, for it answers "no device"; so does the profiler's library.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CUDA = re.compile(r"^lib(cu|nv|nccl)")
DRIVER = "libcuda.so.1"
"""Comes with a node's GPU, and is looked for only there."""


@dataclass
class StandIn:
    """A library that is missing: the names that others want of it, functions and data, by version."""

    soname: str
    functions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    data: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def stem(self) -> str:
        """``nccl`` of ``libnccl.so.2``: what its functions begin with."""
        return self.soname.removeprefix("lib").split(".so")[0].lower()

    def source(self) -> str:
        """In C."""
        rows = [_function(name) for names in self.functions.values() for name in sorted(names)]
        rows += [f"long {name}[16];" for names in self.data.values() for name in sorted(names)]
        return "\n".join(rows) + "\n"

    def versions(self) -> str:
        """The linker's version script; empty where no name has a version."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for by_version in (self.functions, self.data):
            for version, names in by_version.items():
                wanted[version] |= names
        wanted.pop("", None)
        return "".join(f"{version} {{ global: {'; '.join(sorted(names))}; }};\n" for version, names in wanted.items())


def main() -> None:
    """Put the stand-ins beside torch's own libraries, drop what is left of CUDA, and import torch."""
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations  # type: ignore[union-attr]
    folder = Path(torch) / "lib"
    found = missing(folder, folder.parents[1] / "nvidia")
    for stand_in in found:
        compile_into(folder, stand_in)
        print(f"{stand_in.soname}: {sum(map(len, stand_in.functions.values()))} functions stand in")
    drop_unneeded(folder, folder.parents[1] / "nvidia")
    check = "import torch; assert not torch.cuda.is_available(); x = torch.ones(8, 8); assert (x @ x).sum() == 512"
    subprocess.run([sys.executable, "-c", check], check=True)


def missing(folder: Path, kept: Path) -> list[StandIn]:
    """What torch's libraries in ``folder`` need and neither they nor the packages in ``kept`` have."""
    there = {path.name for path in (*folder.glob("*.so*"), *kept.rglob("*.so*"))}
    libraries = sorted(folder.glob("*.so*"))
    needed = {name for path in libraries for name in _needed(path)}
    found = {name: StandIn(name) for name in sorted(needed - there - {DRIVER}) if CUDA.match(name)}
    for path in libraries:
        files = dict(_versions(path))
        for name, version, kind in _undefined(path):
            stand_in = found.get(files.get(version, "")) if version else _owner(name, found)
            if stand_in is not None:
                (stand_in.data if kind == "OBJECT" else stand_in.functions)[version].add(name)
    return list(found.values())


def compile_into(folder: Path, stand_in: StandIn) -> None:
    """Build the library."""
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "stand_in.c", Path(scratch) / "versions"
        source.write_text(stand_in.source())
        script.write_text(stand_in.versions())
        command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-w", "-fno-builtin", f"-Wl,-soname,{stand_in.soname}"]
        if script.stat().st_size:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, "-o", folder / stand_in.soname, source], check=True)


def drop_unneeded(folder: Path, kept: Path) -> None:
    """Headers, static libraries and whatever else no library of torch links against."""
    needed = {name for path in folder.glob("*.so*") for name in _needed(path)}
    for path in kept.rglob("*"):
        if path.is_file() and path.name not in needed:
            path.unlink()


def _function(name: str) -> str:
    if "String" in name or "LastError" in name:
        return f'const char *{name}(void) {{ return "CUDA is left out of this image"; }}'
    return f"int {name}(void) {{ return {int('GetVersion' not in name)}; }}"


def _owner(name: str, found: dict[str, StandIn]) -> StandIn | None:
    owners = [stand_in for stand_in in found.values() if name.lower().startswith(stand_in.stem)]
    return max(owners, key=lambda stand_in: len(stand_in.stem), default=None)


def _needed(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", path))


def _versions(path: Path) -> Iterator[tuple[str, str]]:
    """(Version, the file that is to have it)."""
    file = ""
    for said, name in re.findall(r"(File|Name): (\S+)", _readelf("--version-info", path)):
        if said == "File":
            file = name
        else:
            yield name, file


def _undefined(path: Path) -> Iterator[tuple[str, str, str]]:
    """(Name, version or nothing, kind) of what others must define."""
    for row in _readelf("--dyn-syms", path).splitlines():
        columns = row.split()
        if len(columns) > 7 and columns[4] == "GLOBAL" and columns[6] == "UND":
            name, _, version = columns[7].partition("@")
            yield name, version, columns[3]


def _readelf(what: str, path: Path) -> str:
    return subprocess.run(["readelf", "--wide", what, path], stdout=subprocess.PIPE, check=True, text=True).stdout


if __name__ == "__main__":
    main()
