"""The fused decoder's kernels against the same operations in torch."""

from __future__ import annotations

import pytest
import torch

from pagedserve_engine import float8
from pagedserve_engine.kernels.ops import TritonOps, quantize_rows
from pagedserve_engine.kernels.products import int8_linear
from pagedserve_engine.model.ops import TorchOps
from pagedserve_engine.model.quantization_products import quantize_rows as quantize_in_torch
from triton_device import DEVICE, on_the_device

pytestmark = on_the_device

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
OURS, THEIRS = TritonOps(), TorchOps()


def random(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return (torch.randn(size, generator=generator) * scale).to(dtype).to(DEVICE)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def assert_rows_near(ours: tuple[torch.Tensor, torch.Tensor], theirs: torch.Tensor) -> None:
    """Rows in 8 bits stand for ``theirs`` within half a step of theirs, and a rounding of what they were made from."""
    rows, scales = ours
    assert rows.dtype is torch.float8_e4m3fn
    assert scales.shape == (len(theirs), 1)
    wide = float8.widen(rows, torch.float32) * scales
    torch.testing.assert_close(wide, theirs.float(), rtol=2**-4 + 2e-2, atol=float(scales.max()) * 2**-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [64, 576])
def test_norms_are_torch_norms(dtype: torch.dtype, offset: float, width: int) -> None:
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, scale=0.3)
    assert_near(
        OURS.add_rms_norm(x, None, weight, 1e-5, offset=offset),
        THEIRS.add_rms_norm(x, None, weight, 1e-5, offset=offset),
        dtype,
    )
    ours, theirs = random(6, width, dtype=dtype)[1:].clone(), random(6, width, dtype=dtype)[1:].clone()
    normed = OURS.add_rms_norm(x, ours, weight, 1e-5, offset=offset)
    assert_near(normed, THEIRS.add_rms_norm(x, theirs, weight, 1e-5, offset=offset), dtype)
    assert_near(ours, theirs, dtype)


def test_a_norm_may_come_in_8_bits() -> None:
    x, weight = random(5, 576, dtype=torch.bfloat16), random(576, dtype=torch.bfloat16)
    residual = random(6, 576, dtype=torch.bfloat16)[1:]
    theirs = THEIRS.add_rms_norm(x, residual.clone(), weight, 1e-5, offset=1.0)
    assert_rows_near(OURS.add_rms_norm_quantized(x, residual.clone(), weight, 1e-5, offset=1.0), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [48, 1536])
def test_gates_are_torch_gates(dtype: torch.dtype, activation: str, width: int) -> None:
    gate_up = random(3, 2 * width, dtype=dtype, scale=3.0)
    theirs = THEIRS.gated(gate_up, activation)  # type: ignore[arg-type]
    assert_near(OURS.gated(gate_up, activation), theirs, dtype)  # type: ignore[arg-type]
    assert_rows_near(OURS.gated_quantized(gate_up, activation), theirs)  # type: ignore[arg-type]


def test_a_gate_far_from_zero_is_open_or_shut() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 2.0, 3.0]], device=DEVICE)
    for activation in ("silu", "gelu_tanh"):
        ours = OURS.gated(gate_up, activation)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, torch.tensor([[0.0, 600.0]], device=DEVICE))


def test_rows_in_8_bits_have_the_scale_that_torch_gives_them() -> None:
    x = random(7, 100, dtype=torch.bfloat16)
    x[3] = 0
    ours, (rows, scales) = quantize_rows(x), quantize_in_torch(x)
    torch.testing.assert_close(ours[1], scales)
    torch.testing.assert_close(
        float8.widen(ours[0], torch.float32), float8.widen(rows, torch.float32), rtol=0.13, atol=0
    )


def test_every_number_of_8_bits_is_stored_as_torch_stores_it() -> None:
    """The scale of a row whose largest is 448 is 1: what is left is the conversion, ties and subnormals included."""
    steps = torch.arange(0, 2 * 448 * 512, 7, dtype=torch.float32).reshape(1, -1) / 1024
    x = torch.cat((steps, -steps, torch.full((1, 1), 448.0)), 1).to(DEVICE)
    rows, scales = quantize_rows(x)
    assert scales.item() == 1.0
    assert torch.equal(rows.view(torch.uint8) & 0x7F, float8.narrow(x).view(torch.uint8) & 0x7F)
    assert torch.equal(float8.widen(rows, torch.float32), float8.widen(float8.narrow(x), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (9, 3, 64, 64), (4, 1, 80, 32), (2, 2, 256, 256)])
def test_queries_turn_and_the_cache_is_written(
    dtype: torch.dtype, normed: bool, shape: tuple[int, int, int, int]
) -> None:
    heads, kv_heads, head_dim, rotary_dim = shape
    tokens, width = 5, (heads + 2 * kv_heads) * head_dim
    qkv = random(tokens, width, dtype=dtype)
    norms = [random(head_dim, dtype=dtype), random(head_dim + 1, dtype=dtype)[1:]] if normed else [None, None]
    cos_sin = random(40, rotary_dim)
    positions = torch.tensor([0, 7, 30, 3, 0], device=DEVICE)
    writes = torch.tensor([17, 9, 11, 30, -1], device=DEVICE)
    results = []
    for ops in (OURS, THEIRS):
        keys, values = torch.zeros(2, 4, 8, kv_heads, head_dim, dtype=dtype, device=DEVICE)
        query = ops.rope_and_write(
            qkv,
            q_norm=norms[0],
            k_norm=norms[1],
            cos_sin=cos_sin,
            positions=positions,
            write_indices=writes,
            keys=keys,
            values=values,
            heads=heads,
            eps=1e-6,
            offset=1.0,
        )
        if ops is OURS:
            assert not keys[0].any()  # what is padded goes nowhere
        results.append((query, keys[:, 1:], values[:, 1:]))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, dtype)


def test_a_cache_of_8_bits_is_written_saturated() -> None:
    qkv = random(3, 5 * 16, dtype=torch.bfloat16, scale=300.0)
    cos_sin = torch.cat((torch.ones(24, 8), torch.zeros(24, 8)), 1).to(DEVICE)
    places = torch.tensor([8, 9, 31], device=DEVICE)
    results = []
    for ops in (OURS, THEIRS):
        keys, values = torch.zeros(2, 4, 8, 1, 16, device=DEVICE).to(torch.float8_e4m3fn)
        ops.rope_and_write(
            qkv,
            q_norm=None,
            k_norm=None,
            cos_sin=cos_sin,
            positions=places - 8,
            write_indices=places,
            keys=keys,
            values=values,
            heads=3,
            eps=1e-6,
            offset=0.0,
        )
        results.append(float8.widen(torch.stack((keys, values)), torch.float32))
    torch.testing.assert_close(*results)
    assert results[0].abs().max() == 448


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize(("outputs", "width"), [(100, 130), (192, 1100)])
@pytest.mark.parametrize("processors", [1, 6])
def test_products_with_int8_weights_are_torch_products(rows: int, outputs: int, width: int, processors: int) -> None:
    x = random(rows, width, dtype=torch.bfloat16)
    weight = (random(outputs, width) * 40).clamp(-127, 127).to(torch.int8)
    scale = random(outputs).abs() / 100
    theirs = (x.float() @ weight.float().T * scale).to(torch.bfloat16)
    assert_near(int8_linear(x, weight, scale, processors=processors), theirs, torch.bfloat16)
