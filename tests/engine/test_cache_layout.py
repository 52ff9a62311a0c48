import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.cache.layout import UNBOUNDED, CacheLayout, group_layers
from pagedserve_engine.errors import UnsupportedModelError

GEMMA_270M = (["sliding"] * 5 + ["full"]) * 3


def build(layer_types, *, window=None, kv_heads=1, head_dim=4, block_size=4, dtype_bytes=2):
    return CacheLayout.build(
        layer_types,
        window=window,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype_bytes=dtype_bytes,
    )


def test_a_model_of_one_attention_type_is_one_group():
    (group,) = group_layers(["full"] * 30, None)
    assert (group.index, group.kind, group.window, group.layers) == (0, "full", None, tuple(range(30)))


def test_a_mixed_model_splits_into_groups_of_equally_many_layers():
    groups = group_layers(GEMMA_270M, 512)
    assert [(group.index, group.kind, group.window) for group in groups] == [
        (0, "full", None),
        *((index, "sliding", 512) for index in range(1, 6)),
    ]
    assert groups[0].layers == (5, 11, 17)
    assert {len(group.layers) for group in groups} == {3}
    assert sorted(layer for group in groups for layer in group.layers) == list(range(18))


def test_a_purely_sliding_model_is_one_sliding_group():
    (group,) = group_layers(["sliding"] * 4, 16)
    assert (group.kind, group.window, len(group.layers)) == ("sliding", 16, 4)


@pytest.mark.parametrize(
    ("layer_types", "window", "param"),
    [
        pytest.param(["full", "chunked"], None, "layer_types", id="an unknown attention type"),
        pytest.param([], None, "layer_types", id="no layer at all"),
        pytest.param(["sliding"], None, "sliding_window", id="a sliding layer without a window"),
        pytest.param(["sliding"], 0, "sliding_window", id="an empty window"),
    ],
)
def test_layers_that_cannot_be_paged_are_refused_by_name(layer_types, window, param):
    with pytest.raises(UnsupportedModelError) as caught:
        group_layers(layer_types, window)
    assert caught.value.param == param


def test_every_layer_has_one_place_of_its_own():
    layout = build(GEMMA_270M, window=512)
    places = [layout.place(layer) for layer in range(18)]
    assert len(set(places)) == 18
    assert all(layout.groups[group].layers[index] == layer for layer, (group, index) in enumerate(places))
    with pytest.raises(KeyError):
        layout.place(18)


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "expected"),
    [
        pytest.param(32, 8, 128, 32 * 128 * 1024, id="Llama-3.1-8B: 128 KiB a token"),
        pytest.param(30, 3, 64, 2 * 30 * 3 * 64 * 32 * 2, id="SmolLM2-135M"),
    ],
)
def test_block_bytes_count_keys_and_values_of_a_group(layers, kv_heads, head_dim, expected):
    assert build(["full"] * layers, kv_heads=kv_heads, head_dim=head_dim, block_size=32).block_bytes == expected


def test_a_mixed_models_block_holds_one_groups_layers_only():
    layout = build(GEMMA_270M, window=512, head_dim=256, block_size=32)
    assert layout.block_bytes == 2 * 3 * 1 * 256 * 32 * 2


def test_a_table_row_has_an_entry_for_every_begun_block():
    layout = build(["full"])
    assert [layout.max_blocks_per_sequence(length) for length in (1, 4, 5, 8)] == [1, 1, 2, 2]


def most_blocks_held(window, block_size, num_tokens, chunks):
    """Play a prefill by ``chunks`` and then decoding; count the most blocks that the window keeps at once."""
    most, computed = 0, 0
    for chunk in [*chunks, *[1] * num_tokens]:
        chunk = min(chunk, num_tokens - computed)
        if chunk == 0:
            break
        held = range(max(0, computed - window + 1) // block_size, -(-(computed + chunk) // block_size))
        most = max(most, len(held))
        computed += chunk
    return most


@given(
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(1, 12),
    st.lists(st.integers(1, 12), max_size=12),
)
def test_no_split_of_a_prefill_holds_more_than_blocks_for_says(window, block_size, num_tokens, chunk, chunks):
    layout = build(["sliding", "full"], window=window, block_size=block_size)
    held = most_blocks_held(window, block_size, num_tokens, [min(size, chunk) for size in chunks])
    assert held + -(-num_tokens // block_size) <= layout.blocks_for(num_tokens, chunk)


def test_blocks_for_a_window_is_reached_in_the_worst_alignment():
    layout = build(["sliding"], window=6, block_size=4)
    assert layout.blocks_for(100, 4) == 3
    # The chunk at positions 8 to 12 looks back to position 3, its block's last.
    assert layout.blocks_for(100, 5) == 4
    assert most_blocks_held(6, 4, 100, [5, 3, 5, 5]) == 4


@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 60), st.integers(1, 12))
def test_the_largest_length_fits_and_one_more_does_not(window, block_size, num_blocks, chunk):
    layout = build(["sliding", "full"], window=window, block_size=block_size)
    length = layout.largest_length(num_blocks, chunk)
    assert length == 0 or layout.blocks_for(length, chunk) <= num_blocks - 1
    assert layout.blocks_for(length + 1, chunk) > num_blocks - 1


def test_full_attention_fills_every_block_but_the_null_block():
    assert build(["full"] * 2).largest_length(11, 2048) == 40


def test_windows_alone_never_limit_the_length():
    layout = build(["sliding"], window=6, block_size=4)
    assert layout.largest_length(layout.blocks_for(10**6, 5) + 1, 5) == UNBOUNDED
    assert layout.largest_length(layout.blocks_for(10**6, 5), 5) == 12
