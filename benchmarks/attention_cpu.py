"""``python -m benchmarks.attention_cpu``: one layer's attention on a CPU, compiled kernels beside torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedserve_engine.attention.interface import AttentionBackend, GroupInputs, LayerCall
from pagedserve_engine.attention.native import NativeBackend
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.inputs import page_indices
from pagedserve_engine.native.library import load_library

BLOCK_SIZE = 32
HEADS = {"SmolLM2 (9/3, 64)": (9, 3, 64), "Gemma 3 270M (4/1, 256)": (4, 1, 256)}
LAYERS = 4
"""Caches that take turns, so that no layer finds its own in the processor's cache."""

Row = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """Rows of (context, queries)."""

    name: str
    rows: tuple[Row, ...]


CASES = (
    Case("decode, 16 of 1k", ((1024, 1),) * 16),
    Case("64 mixed rows", (*((16 * row, 1) for row in range(61)), (0, 200), (100, 300), (500, 64))),
    Case("decode, 1 of 8k", ((8192, 1),)),
    Case("512-token prefill at 0", ((0, 512),)),
    Case("512-token prefill at 4k", ((4096, 512),)),
)


def step_inputs(rows: Sequence[Row], blocks: int) -> GroupInputs:
    """The step of ``rows``, each with blocks of its own, in any order."""
    contexts = np.array([context for context, _ in rows], np.int32)
    queries = np.array([queries for _, queries in rows], np.int32)
    columns = -(-(contexts + queries) // BLOCK_SIZE)
    order = np.random.default_rng(0).permutation(blocks - 1).astype(np.int32) + 1
    table = np.zeros((len(rows), columns.max()), np.int32)
    for row, (stop, count) in enumerate(zip(np.cumsum(columns), columns, strict=True)):
        table[row, :count] = order[stop - count : stop]
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    of_row = np.repeat(np.arange(len(rows)), queries)
    positions = np.arange(starts[-1]) - (starts[:-1] - contexts)[of_row]
    return GroupInputs(
        block_table=table,
        query_lens=queries,
        context_lens=contexts,
        num_decodes=int((queries == 1).sum()),
        block_size=BLOCK_SIZE,
        window=None,
        device_table=torch.from_numpy(table),
        query_starts=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(contexts + queries),
        write_indices=torch.from_numpy(page_indices(table, of_row, positions, block_size=BLOCK_SIZE)),
    )


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of ``repeats``: what else the machine does only ever adds. One thread is timed by its own clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    times = []
    for _ in range(repeats):
        started = clock()
        work()
        times.append(clock() - started)
    return min(times) * 1e3


def layers(case: Case, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[GroupInputs, list[LayerCall]]:
    query_heads, kv_heads, head_dim = heads
    blocks = sum(-(-(context + queries) // BLOCK_SIZE) for context, queries in case.rows) + 1
    pages = (blocks, BLOCK_SIZE, kv_heads, head_dim)
    tokens = sum(queries for _, queries in case.rows)
    calls = [
        LayerCall(
            query=torch.randn(tokens, query_heads, head_dim).to(dtype),
            keys=torch.randn(pages).to(dtype),
            values=torch.randn(pages).to(dtype),
            scaling=head_dim**-0.5,
            softcap=None,
        )
        for _ in range(LAYERS)
    ]
    return step_inputs(case.rows, blocks), calls


def measure(backend: AttentionBackend, inputs: GroupInputs, calls: list[LayerCall], repeats: int) -> float:
    """Milliseconds of one layer, the plan's share of a step among them."""

    def step() -> None:
        planned = backend.plan_group(inputs)
        for call in calls:
            planned.attend(call)

    return milliseconds(step, repeats) / len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", choices=load_library().variants, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native, reference = NativeBackend(load_library(), options.variant), ReferenceBackend()
    print("| model | step | dtype | native ms | torch ms | times |\n|---|---|---|---|---|---|")
    for model, heads in HEADS.items():
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                inputs, calls = layers(case, heads, dtype)
                ours = measure(native, inputs, calls, options.repeats)
                theirs = measure(reference, inputs, calls, options.repeats)
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {model} | {case.name} | {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |", flush=True
                )


if __name__ == "__main__":
    main()
