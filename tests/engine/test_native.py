"""The compiled kernels' attention against the definition, for every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_oracle import Row, Shape, compare, group_inputs
from pagedserve_engine.attention import backends
from pagedserve_engine.attention.interface import LayerCall
from pagedserve_engine.attention.native import NativeBackend
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.float8 import FLOAT8
from pagedserve_engine.native import build, library
from pagedserve_engine.native.library import VARIANTS, MissingLibraryError, load_library

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
    rows: list[Row] = [(1000, 1), (90, 1), (5, 1), (700, 1), (60, 40)]
    table = np.arange(1, 5 * 40 + 1, dtype=np.int32).reshape(5, 40)
    keys, values = torch.randn(2, 201, 32, 3, 64)
    query = torch.randn(44, 9, 64)

    def attend(first: int, last: int, tokens: slice) -> torch.Tensor:
        decodes = sum(queries == 1 for _, queries in rows[first:last])
        inputs = group_inputs(table[first:last], rows[first:last], num_decodes=decodes, block_size=32)
        call = LayerCall(query=query[tokens], keys=keys, values=values, scaling=0.125, softcap=None)
        return NativeBackend(load_library()).plan_group(inputs).attend(call)

    with torch_threads(1):
        together = attend(0, 5, slice(0, 44))
    with torch_threads(2):
        assert torch.equal(attend(0, 5, slice(0, 44)), together)
        assert torch.equal(attend(0, 1, slice(0, 1)), together[:1])
        assert torch.equal(attend(4, 5, slice(4, 44)), together[4:])


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


def test_a_cpu_attends_with_the_compiled_kernels() -> None:
    assert backends.choose_backend("auto").name == "native"


def test_without_them_it_attends_in_torch_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    monkeypatch.setattr(backends, "load_library", load_library.__wrapped__)
    assert backends.choose_backend("auto").name == "reference"
    assert "install g++" in caplog.text
    with pytest.raises(ConfigError, match=r"ATTENTION is 'native'.*install g\+\+"):
        backends.choose_backend("native")


def test_a_library_of_another_source_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "digest", lambda: "another")
    with pytest.raises(MissingLibraryError, match="reinstall"):
        load_library.__wrapped__()


def test_the_kernels_need_a_cpu() -> None:
    with pytest.raises(ConfigError, match="need a CPU"):
        backends.choose_backend("native", "cuda")


def test_building_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-compiler-of-this-name",))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path / "kernels.so")


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("false",))
    with pytest.raises(build.BuildError, match="failed"):
        build.build(tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())
