"""Kernels compiled for cards that are not there, and what the compiler says that they take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    "table": "*i32",
    "seq_lens": "*i32",
    "query_starts": "*i32",
    "partial": "*fp32",
    "log_totals": "*fp32",
    "scale": "fp32",
    "softcap": "fp32",
    "eps": "fp32",
    "scales": "*fp32",
    "cos_sin": "*fp32",
    "positions": "*i64",
    "write_indices": "*i64",
    "inverse_temperature": "*fp32",
    "top_k": "*i64",
    "top_p": "*fp64",
    "min_p": "*fp32",
    "greedy": "*i1",
    "uniform": "*fp64",
    "peaks": "*fp32",
    "sums": "*fp32",
    "blocks": "*i32",
    "token_ids": "*i64",
    **dict.fromkeys(("window", "splits", "rows"), "i32"),
}
"""Of the kernels' parameters by name; strides are int32, what is left are activations."""

_UNALIGNED = {*("table", "seq_lens", "query_starts", "table_stride"), *("window", "splits", "rows")}
_FLOATS = {"eps", "scale", "softcap"}


@dataclass(frozen=True)
class Resources:
    """Of one program."""

    shared: int
    """Bytes of shared memory."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack."""


def compile_kernel(
    kernel: Any,
    capability: int,
    constants: Mapping[str, object],
    *,
    types: Mapping[str, str] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """``kernel`` for compute capability ``capability`` (80 for 8.0), its pointers and strides multiples of 16."""
    names = kernel.arg_names
    known = {**TYPES, **(types or {})}
    signature = {name: "constexpr" if name in constants else _type(name, known) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] != "constexpr" and name not in _UNALIGNED | _FLOATS
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _resources(compiled.asm["cubin"], compiled.metadata.shared)


def _type(name: str, known: Mapping[str, str]) -> str:
    return known.get(name, "i32" if name.endswith("stride") else "*bf16")


def _resources(cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Resources(shared, int(found[1]), int(found[2]))
