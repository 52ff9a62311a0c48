"""The compiled operations against their formulas in torch, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pagedserve_engine.float8 import FLOAT8, narrow
from pagedserve_engine.native.library import load_library
from pagedserve_engine.native.ops import NativeOps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, FLOAT8: 8e-3}

variants = pytest.mark.parametrize("variant", load_library().variants)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def ops(variant: str) -> NativeOps:
    return NativeOps(load_library(), variant)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    tolerance = scale * CLOSE[ours.dtype]
    torch.testing.assert_close(ours.float(), expected.float(), atol=tolerance, rtol=tolerance)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


@variants
@dtypes
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 37), (300, 64)])
def test_a_sum_is_rounded_into_the_residual_and_normed(
    variant: str, dtype: torch.dtype, offset: float, tokens: int, width: int
) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((tokens, width), (tokens, width), (width,)))
    expected = residual + x
    ours = ops(variant).add_rms_norm(x, residual, weight, 1e-5, offset=offset)
    assert torch.equal(residual, expected)
    assert_close(ours, rms_norm(expected, weight, offset), scale=4)
    assert_close(ops(variant).add_rms_norm(x, None, weight, 1e-5, offset=offset), rms_norm(x, weight, offset), scale=4)


def rotated(heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second, rest = heads.float().split([half, half, heads.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@variants
@dtypes
@pytest.mark.parametrize("cache_dtype", [*DTYPES, FLOAT8], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, None), (64, 64, 0.0), (256, 256, 1.0), (24, 12, None)])
def test_heads_are_normed_turned_and_written_to_their_pages(
    variant: str, dtype: torch.dtype, cache_dtype: torch.dtype, shape: tuple[int, int, float | None]
) -> None:
    head_dim, rotary_dim, offset = shape
    tokens, heads, kv_heads = 5, 4, 2
    packed = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 8).to(dtype)[:, 8:]
    angles = torch.rand(40, rotary_dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    positions, places = torch.tensor([3, 39, 0, 7, 8]), torch.tensor([9, 2, 31, -1, 5])
    q_norm, k_norm = (None, None) if offset is None else torch.randn(2, head_dim).to(dtype)
    keys, values = torch.zeros(2, 4, 8, kv_heads, head_dim, dtype=cache_dtype)
    query = ops(variant).rope_and_write(
        packed,
        q_norm=q_norm,
        k_norm=k_norm,
        cos_sin=cos_sin,
        positions=positions,
        write_indices=places,
        keys=keys,
        values=values,
        heads=heads,
        eps=1e-5,
        offset=offset or 0.0,
    )
    split = packed.reshape(tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = split.split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, offset or 0.0), rms_norm(k, k_norm, offset or 0.0)
    assert_close(query, rotated(q, cos_sin[positions]).to(dtype), scale=8)
    written = places >= 0
    # As float32: 8-bit floats can't be taken by index.
    flat_keys, flat_values = keys.float().flatten(0, 1), values.float().flatten(0, 1)
    tolerance = 8 * max(CLOSE[dtype], CLOSE[cache_dtype])
    expected = rotated(k, cos_sin[positions])[written].clamp(-448, 448)
    torch.testing.assert_close(flat_keys[places[written]], expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(flat_values[places[written]], v[written].to(cache_dtype).float())
    untouched = torch.ones(32, dtype=torch.bool).index_fill(0, places[written], False)
    assert not flat_keys[untouched].any()


@variants
def test_every_number_is_rounded_into_8_bits_as_torch_rounds_it(variant: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    ordered = every[~every.isnan()].sort().values
    between = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2, torch.linspace(-500, 500, 3001), every[127:128]])
    numbers = torch.cat([between, torch.zeros(-len(between) % 8)]).view(1, -1)
    width = numbers.shape[1]
    keys, values = torch.zeros(2, 1, 1, 1, width, dtype=FLOAT8)
    ops(variant).rope_and_write(
        torch.cat([numbers, numbers, numbers], 1),
        q_norm=None,
        k_norm=None,
        cos_sin=torch.tensor([[1.0, 0.0]]),
        positions=torch.tensor([0]),
        write_indices=torch.tensor([0]),
        keys=keys,
        values=values,
        heads=1,
        eps=1e-5,
        offset=0.0,
    )
    expected = narrow(numbers[0])
    assert torch.equal(values.view(torch.uint8).flatten(), expected.view(torch.uint8))


@variants
@dtypes
@pytest.mark.parametrize("width", [1536, 21])
def test_the_activated_half_multiplies_the_other(variant: str, dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(7, 2 * width) * 4).to(dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert_close(ops(variant).gated(gate_up, "silu"), functional.silu(gate) * up, scale=2)
    expected = functional.gelu(gate, approximate="tanh") * up
    assert_close(ops(variant).gated(gate_up, "gelu_tanh"), expected, scale=2)


@variants
def test_activations_are_exact_to_a_millionth_and_keep_what_is_no_number(variant: str) -> None:
    gate = torch.cat([torch.linspace(-80, 80, 20_001), torch.logspace(-30, 1, 5_000), torch.tensor([1e30, -1e30])])
    ours = ops(variant).gated(torch.cat([gate, torch.ones_like(gate)])[None], "silu")[0]
    torch.testing.assert_close(ours, functional.silu(gate.double()).float(), rtol=1e-6, atol=1e-37)
    ours = ops(variant).gated(torch.cat([gate, torch.ones_like(gate)])[None], "gelu_tanh")[0]
    torch.testing.assert_close(ours, functional.gelu(gate.double(), approximate="tanh").float(), rtol=2e-6, atol=1e-6)
    assert ops(variant).gated(torch.tensor([[float("nan"), 1.0]]), "silu").isnan().all()


@variants
@dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (37, 45), (128, 7)])
def test_products_sum_in_float32_whatever_the_dtypes(
    variant: str, dtype: torch.dtype, weight_dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    weight, bias = torch.randn(outputs, inputs).to(weight_dtype), torch.randn(outputs)
    packed = ops(variant).pack(weight)
    for tokens in (1, 2, 3, 4, 5, 6, 13, 100):
        x = torch.randn(tokens, inputs).to(dtype)
        exact = x.double() @ weight.double().T
        scale = 2 * inputs**0.5
        assert_close(ops(variant).linear(x, packed), exact.to(dtype), scale=scale)
        assert_close(ops(variant).linear(x, packed, bias), (exact + bias).to(dtype), scale=scale)


@variants
def test_a_rows_product_does_not_depend_on_its_batch(variant: str) -> None:
    packed = ops(variant).pack(torch.randn(200, 300))
    x = torch.randn(40, 300)
    together = ops(variant).linear(x, packed)
    assert all(torch.equal(ops(variant).linear(x[at : at + 1], packed)[0], together[at]) for at in range(40))


def test_a_residual_of_another_kind_is_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match="residual"):
        ops("portable").add_rms_norm(x, x.bfloat16(), torch.ones(8), 1e-5, offset=0.0)
