"""The fused decoder's and the sampler's kernels compile for both generations of cards."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

SAMPLING = {"VOCAB": 128_256, "BLOCKS": 1002, "PADDED": 1024}
ROPE = {
    "HEADS": 32,
    "KV_HEADS": 8,
    "HEAD_DIM": 128,
    "ROTARY_DIM": 128,
    "OFFSET": 0.0,
    "NORMED": True,
    "D": 128,
    "SIZE": 8,
}
REDUCE = {"HEADS": 32, "HEAD_DIM": 128, "D": 128, "N": 64, "CHUNK": 16, "WINDOWED": True}
NORM = {"WIDTH": 4096, "PADDED": 4096, "OFFSET": 1.0, "ADDS": True, "QUANTIZED": True}
GATE = {"WIDTH": 14_336, "PADDED": 16_384, "SILU": True}

INT8 = {
    "N": 4096,
    "K": 4096,
    "ROWS": 32,
    "OUTPUTS": 64,
    "COLUMNS": 128,
    "SPLIT": True,
    "FLOAT32_DOT": False,
}

CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("pagedserve_engine.kernels.sampling", "summary_kernel", SAMPLING, 4),
    ("pagedserve_engine.kernels.sampling", "choice_kernel", SAMPLING, 16),
    ("pagedserve_engine.kernels.rope", "rope_kernel", ROPE, 4),
    ("pagedserve_engine.kernels.norms", "norm_kernel", NORM, 8),
    ("pagedserve_engine.kernels.norms", "gate_quantize_kernel", GATE, 16),
    ("pagedserve_engine.kernels.products", "int8_kernel", INT8, 4),
    ("pagedserve_engine.attention.triton_kernels", "reduce_kernel", REDUCE, 4),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("module", "name", "constants", "num_warps"), CASES, ids=[case[1] for case in CASES])
def test_a_kernel_compiles_and_keeps_to_its_registers(
    capability: int, module: str, name: str, constants: dict[str, Any], num_warps: int
) -> None:
    import importlib

    from triton_compiling import compile_kernel

    small = "*fp8e4nv" if capability >= 89 else "*u8"
    types = {"keys": small, "values": small, "weight": "*i8" if name == "int8_kernel" else "*bf16", "share": "i32"}
    if name in ("norm_kernel", "gate_quantize_kernel"):
        types["out"] = small
    if name == "int8_kernel":
        types |= {"scale": "*fp32", "out": "*fp32"}
    kernel = getattr(importlib.import_module(module), name)
    assert compile_kernel(kernel, capability, constants, types=types, num_warps=num_warps).spilled == 0
