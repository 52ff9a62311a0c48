"""The kernels inside CUDA graphs: captured once, they serve other lengths and other parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu

ROWS, COLUMNS, BLOCK_SIZE = 16, 64, 32


def captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_captured_decode_step_serves_any_lengths(window: int | None, cache_dtype: torch.dtype) -> None:
    from pagedserve_engine.attention.interface import LayerCall
    from pagedserve_engine.attention.triton import TritonBackend

    generator = torch.Generator("cuda").manual_seed(0)
    table = torch.arange(1, ROWS * COLUMNS + 1, dtype=torch.int32, device="cuda").view(ROWS, COLUMNS)
    seq_lens = torch.ones(ROWS, dtype=torch.int32, device="cuda")
    writes = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    shape = (2, ROWS * COLUMNS + 1, BLOCK_SIZE, 8, 128)
    pages = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).to(cache_dtype)
    query = torch.randn(ROWS, 32, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    call = LayerCall(query=query, keys=pages[0], values=pages[1], scaling=0.1, softcap=None)
    backend = TritonBackend("cuda")
    step = backend.plan_decode(table, seq_lens, writes, window=window, block_size=BLOCK_SIZE)
    graph, out = captured(lambda: step.attend(call))
    for seed in range(5):
        lengths = torch.randint(0, COLUMNS * BLOCK_SIZE + 1, (ROWS,), generator=torch.Generator().manual_seed(seed))
        seq_lens.copy_(lengths)
        table.copy_(table.flip(0))
        graph.replay()
        assert torch.equal(out, step.attend(call))
        assert not out[lengths.to("cuda") == 0].any()


def test_a_captured_sampler_follows_its_parameters() -> None:
    from pagedserve_engine.kernels.sampling import sample

    rows, vocab = 128, 128_256
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    parameters = {
        "inverse_temperature": torch.ones(rows, device="cuda"),
        "top_k": torch.full((rows,), vocab, device="cuda"),
        "top_p": torch.ones(rows, device="cuda", dtype=torch.float64),
        "min_p": torch.zeros(rows, device="cuda"),
        "greedy": torch.ones(rows, device="cuda", dtype=torch.bool),
        "uniform": torch.rand(rows, device="cuda", dtype=torch.float64),
    }
    graph, out = captured(lambda: sample(logits, **parameters))
    graph.replay()
    assert torch.equal(out, logits.argmax(-1))
    parameters["greedy"].fill_(False)
    parameters["top_k"].fill_(50)
    parameters["top_p"].fill_(0.9)
    graph.replay()
    assert torch.equal(out, sample(logits, **parameters))
    assert bool((logits.gather(1, out.unsqueeze(1)) >= logits.topk(50).values[:, -1:]).all())
