"""The compiled kernels' attention against the definition, for every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_oracle import Row, Shape, compare
from pagedserve_engine.attention.native import NativeBackend
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.float8 import FLOAT8
from pagedserve_engine.native.library import VARIANTS, load_library

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(rows: list[Row], shape: Shape, variant: str | None = None) -> None:
    ours, expected = compare(NativeBackend(load_library(), variant), rows, shape)
    torch.testing.assert_close(
        ours.float(), expected, atol=TOLERANCE[shape.dtype], rtol=TOLERANCE[shape.dtype], msg=lambda m: f"{shape}: {m}"
    )


variants = pytest.mark.parametrize("variant", load_library().variants)


shapes = st.builds(
    lambda heads, **rest: Shape(heads=heads[0], kv_heads=heads[1], **rest),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (9, 3), (4, 1), (5, 1), (7, 1), (8, 1), (16, 2), (70, 1)]),
    head_dim=st.sampled_from([16, 48, 64, 80, 112]),
    block_size=st.sampled_from([1, 3, 8, 32]),
    window=st.none() | st.integers(1, 100),
    softcap=st.none() | st.just(2.0),
    dtype=st.sampled_from(list(TOLERANCE)),
    cache_dtype=st.sampled_from([*TOLERANCE, FLOAT8]),
)


@variants
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 20)), min_size=1, max_size=6),
    shape=shapes,
    threads=st.sampled_from([1, 2]),
)
def test_any_mix_of_rows_attends_as_the_definition_says(
    variant: str, rows: list[Row], shape: Shape, threads: int
) -> None:
    if shape.head_dim % load_library().lanes(variant):
        shape = replace(shape, head_dim=64)
    with torch_threads(threads):
        check(rows, shape, variant)


@pytest.mark.parametrize("head_dim", [8, 24, 72, 128, 256])
def test_any_head_size_finds_an_instruction_set(head_dim: int) -> None:
    check([(40, 1), (9, 11)], Shape(head_dim=head_dim, scaling=head_dim**-0.5))


@variants
@pytest.mark.parametrize("window", [None, 700])
def test_a_long_row_is_split_over_its_keys_without_a_seam(variant: str, window: int | None) -> None:
    check([(2000, 1), (1111, 2), (300, 1)], Shape(head_dim=64, window=window), variant)


def test_what_is_batched_beside_a_row_and_the_threads_change_no_bit_of_it() -> None:
    library = load_library()
    shape = Shape(heads=9, kv_heads=3, head_dim=64, block_size=32)
    with torch_threads(1):
        alone, _ = compare(NativeBackend(library), [(1000, 1), (1000, 40)], shape)
    with torch_threads(2):
        again, _ = compare(NativeBackend(library), [(1000, 1), (1000, 40)], shape)
    assert torch.equal(alone, again)


def test_another_instruction_set_than_the_processors_is_refused() -> None:
    library = load_library()
    absent = [name for name in VARIANTS if name not in library.variants]
    for variant in absent:
        with pytest.raises(ValueError, match="instruction set"):
            compare(NativeBackend(library, variant), [(3, 1)], Shape())


@pytest.mark.parametrize("shape", [Shape(head_dim=12), Shape(dtype=torch.float64), Shape(cache_dtype=torch.int8)])
def test_what_the_kernels_do_not_know_is_refused_with_the_cure(shape: Shape) -> None:
    with pytest.raises(ConfigError, match="set it to reference"):
        compare(NativeBackend(load_library()), [(3, 1)], shape)
