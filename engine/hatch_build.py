"""The build hook: compiles the CPU kernels into the package, and tags the wheel for the platform where it could.

Without a compiler the package installs all the same, and says at run time what is missing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelsHook(BuildHookInterface[Any]):
    """Compiles before hatchling collects the files of a wheel, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling."""
        if self.target_name != "wheel":
            return
        builder = _load(Path(self.root) / "pagedserve_engine/native/build.py")
        try:
            builder.build()
        except (builder.BuildError, OSError) as error:
            # A library of other sources would be refused at run time; one that cannot be made again must not ship.
            builder.LIBRARY.unlink(missing_ok=True)
            self.app.display_warning(
                f"attention on a CPU will run in torch, 2 to 8 times slower while decoding: {error}"
            )
            return
        if version == "editable":
            return
        build_data["artifacts"].append("pagedserve_engine/native/kernels.so")
        build_data["pure_python"] = False
        # The library is called through ctypes: it fits every Python of this platform.
        platform = next(tag.platform for tag in sys_tags() if "manylinux" not in tag.platform)
        build_data["tag"] = f"py3-none-{platform}"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
