"""The decoder's small operations in torch, which say what the compiled ones must compute."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pagedserve_engine.model.ops import Activation, TorchOps, choose_ops

OPS = TorchOps()
HEADS, KV_HEADS, SIZE = 4, 2, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_those_of_the_families(offset: float, dtype: torch.dtype) -> None:
    theirs = (Gemma2RMSNorm if offset else LlamaRMSNorm)(48, eps=1e-5).to(dtype)
    theirs.weight.data.normal_()
    x = torch.randn(5, 48).to(dtype)
    assert torch.equal(OPS.add_rms_norm(x, None, theirs.weight, 1e-5, offset=offset), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_kept_in_the_residual_and_normed(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 48).to(dtype), torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    total = residual + x
    normed = OPS.add_rms_norm(x, residual, weight, 1e-6, offset=0.0)
    assert torch.equal(residual, total)
    assert torch.equal(normed, OPS.add_rms_norm(total, None, weight, 1e-6, offset=0.0))


def angles(positions: int, rotary_dim: int) -> torch.Tensor:
    turns = torch.randn(positions, rotary_dim // 2)
    return torch.cat((turns.cos(), turns.sin()), dim=-1)


def norm_weight(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def rope(
    qkv: torch.Tensor, cos_sin: torch.Tensor, *, pages: torch.Tensor, writes: list[int], norms: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = pages.clone(), pages.clone()
    weights = (
        (torch.randn(SIZE, generator=torch.Generator().manual_seed(i)) for i in range(2)) if norms else (None,) * 2
    )
    q_norm, k_norm = weights
    query = OPS.rope_and_write(
        qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        cos_sin=cos_sin,
        positions=torch.tensor([3, 0, 7]),
        write_indices=torch.tensor(writes),
        keys=keys,
        values=values,
        heads=HEADS,
        eps=1e-6,
        offset=0.0,
    )
    return query, keys.view(-1, KV_HEADS, SIZE), values.view(-1, KV_HEADS, SIZE)


@pytest.mark.parametrize("norms", [False, True])
def test_heads_are_normed_turned_and_written_as_transformers_turns_them(norms: bool) -> None:
    qkv, cos_sin = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE), angles(9, SIZE)
    query, keys, values = rope(qkv, cos_sin, pages=torch.zeros(2, 4, KV_HEADS, SIZE), writes=[5, 2, 7], norms=norms)
    q, k, v = (part.view(1, 3, -1, SIZE) for part in qkv.split((HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE), 1))
    if norms:
        for at, part in enumerate((q, k)):
            norm = LlamaRMSNorm(SIZE, eps=1e-6)
            norm.weight.data = norm_weight(at)
            q, k = (norm(part), k) if at == 0 else (q, norm(part))
    cos, sin = cos_sin[[3, 0, 7]].chunk(2, -1)
    whole = (torch.cat((part, part), -1)[None] for part in (cos, sin))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, *whole, unsqueeze_dim=2)
    torch.testing.assert_close(query, expected_q[0])
    torch.testing.assert_close(keys[[5, 2, 7]], expected_k[0])
    assert torch.equal(values[[5, 2, 7]], v[0])
    untouched = [0, 1, 3, 4, 6]
    assert not keys[untouched].any()
    assert not values[untouched].any()


def test_only_the_first_numbers_of_a_head_turn_where_rotation_is_partial() -> None:
    qkv, cos_sin = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE), angles(9, 6)
    query, _, _ = rope(qkv, cos_sin, pages=torch.zeros(2, 4, KV_HEADS, SIZE), writes=[5, 2, 7])
    plain = qkv[:, : HEADS * SIZE].view(3, HEADS, SIZE)
    assert torch.equal(query[..., 6:], plain[..., 6:])
    cos, sin = cos_sin[[3, 0, 7]].unsqueeze(1).chunk(2, -1)
    torch.testing.assert_close(query[..., :3], plain[..., :3] * cos - plain[..., 3:6] * sin)


def test_padding_is_written_where_nobody_reads() -> None:
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE)
    _, keys, _ = rope(qkv, angles(9, SIZE), pages=torch.zeros(2, 4, KV_HEADS, SIZE), writes=[5, -1, -1])
    assert keys[5].any()
    assert not keys[[*range(1, 5), 6, 7]].any(), "padding left the null block's first page"


def test_an_8_bit_cache_saturates() -> None:
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * SIZE) * 1e4
    pages = torch.zeros(2, 4, KV_HEADS, SIZE).to(torch.float8_e4m3fn)
    _, _, values = rope(qkv, angles(9, SIZE), pages=pages, writes=[5, 2, 7])
    expected = qkv[:, -KV_HEADS * SIZE :].view(3, KV_HEADS, SIZE).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(values[[5, 2, 7]].float(), expected.float())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_first_half_gates_the_second(activation: Activation) -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    active = torch.nn.SiLU()(gate) if activation == "silu" else torch.nn.GELU(approximate="tanh")(gate)
    torch.testing.assert_close(OPS.gated(torch.cat((gate, up), 1), activation), active * up)


def test_without_triton_a_gpu_computes_them_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pagedserve_engine.kernels.ops", None)
    assert isinstance(choose_ops(torch.device("cuda")), TorchOps)
    assert "slower" in caplog.text
