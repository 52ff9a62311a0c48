"""The products of quantised weights on a CUDA device are those that a CPU emulates."""

from __future__ import annotations

import pytest
import torch

from pagedserve_engine.model.quantization import choose_quantization


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("rows", [1, 16, 64, 65, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gpus_products_are_a_cpus(kind: str, rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, wide = torch.randn(rows, 256, generator=generator).bfloat16(), torch.randn(512, 256, generator=generator)
    bias = torch.randn(512, generator=generator).bfloat16() if biased else None
    outputs = []
    for device in ("cpu", "cuda"):
        quantize = choose_quantization(kind, torch.device(device))
        assert quantize is not None
        layer = quantize(wide.to(device), None if bias is None else bias.to(device))
        outputs.append(layer(x.to(device)).float().cpu())
    expected, found = outputs
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
