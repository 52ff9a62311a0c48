import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.errors import ConfigError, MemoryPlanError
from pagedserve_engine.memory import (
    MemoryInputs,
    available_memory,
    estimate_memory,
    format_bytes,
    plan_memory,
    render_table,
    to_json,
)

MIB, GIB = 1 << 20, 1 << 30

# 32 layers, 8 KV heads of 128 in two bytes: 4 MiB a block.
LLAMA_8B = CacheLayout.build(["full"] * 32, window=None, num_kv_heads=8, head_dim=128, block_size=32, dtype_bytes=2)
HYBRID = CacheLayout.build(
    ["sliding"] * 15 + ["full"] * 3, window=512, num_kv_heads=1, head_dim=256, block_size=32, dtype_bytes=2
)

ROOMY = MemoryInputs(
    total=80 * GIB,
    max_memory_percent=0.9,
    weights=15 * GIB,
    activation_bytes_per_token=MIB / 2,
    static_buffers=100 * MIB,
    graphs=900 * MIB,
    layout=LLAMA_8B,
    num_blocks=1024,
    max_batch_tokens=2048,
    max_model_len="auto",
    model_max_len=131072,
    max_num_seqs=256,
    device_type="cuda",
)


def with_room(mebibytes, **changes):
    """Inputs that leave so much for activations and cache."""
    return replace(ROOMY, free=15 * GIB + 1000 * MIB + mebibytes * MIB, **changes)


def test_what_fits_is_taken_as_given():
    plan = plan_memory(ROOMY)
    assert (plan.num_blocks, plan.max_batch_tokens, plan.max_model_len) == (1024, 2048, 1023 * 32)
    assert plan.lowered == ()
    assert plan.cache == 4 * GIB
    assert plan.used == 15 * GIB + 1000 * MIB + GIB + 4 * GIB


def test_given_numbers_are_never_raised():
    plan = plan_memory(replace(ROOMY, num_blocks=2, max_batch_tokens=1, max_model_len=2))
    assert (plan.num_blocks, plan.max_batch_tokens, plan.max_model_len) == (2, 1, 2)


def test_the_budget_is_a_share_of_the_total_and_at_most_what_is_free():
    assert ROOMY.budget == 72 * GIB
    assert replace(ROOMY, free=20 * GIB).budget == 20 * GIB
    assert replace(ROOMY, free=79 * GIB).budget == 72 * GIB


def test_the_batch_gives_way_before_the_blocks():
    # 1,024 blocks take 4 GiB; 1,024 tokens of activations take 512 MiB.
    plan = plan_memory(with_room(512 + 4096))
    assert (plan.num_blocks, plan.max_batch_tokens) == (1024, 1024)
    assert plan.lowered == ("MAX_BATCH_TOKENS from 2048 to 1024",)


def test_blocks_give_way_once_the_batch_is_small():
    plan = plan_memory(with_room(256 + 400))
    assert (plan.num_blocks, plan.max_batch_tokens, plan.max_model_len) == (100, 512, 99 * 32)
    assert plan.lowered == ("NUM_BLOCKS from 1024 to 100", "MAX_BATCH_TOKENS from 2048 to 512")


def test_a_batch_given_small_is_not_lowered():
    assert plan_memory(with_room(150 + 400, max_batch_tokens=300)).max_batch_tokens == 300


def test_an_uneven_batch_is_halved_to_the_floor_and_not_below():
    assert plan_memory(with_room(256 + 400, max_batch_tokens=1500)).max_batch_tokens == 512


def test_auto_takes_all_blocks_that_fit():
    plan = plan_memory(replace(ROOMY, num_blocks="auto", max_batch_tokens="auto"))
    assert plan.max_batch_tokens == 2048
    assert plan.num_blocks == (72 * GIB - 15 * GIB - 1000 * MIB - GIB) // (4 * MIB)
    assert plan.max_model_len == 131072
    assert plan.budget - plan.used < 4 * MIB
    assert plan.lowered == ()


def test_auto_on_a_cpu_takes_no_more_than_can_be_in_use():
    inputs = replace(ROOMY, num_blocks="auto", device_type="cpu", max_num_seqs=4, max_model_len=1024)
    assert plan_memory(inputs).num_blocks == 1 + 4 * 32
    assert plan_memory(replace(inputs, max_num_seqs=10**6)).num_blocks > 10_000


def test_an_explicit_length_lowers_an_auto_pools_batch():
    # 4,096 tokens need 129 blocks, 516 MiB; only a batch of 512 leaves that.
    plan = plan_memory(with_room(256 + 516, num_blocks="auto", max_model_len=4096))
    assert (plan.max_batch_tokens, plan.max_model_len, plan.num_blocks) == (512, 4096, 129)


def test_an_auto_length_is_the_models_or_what_fits():
    assert plan_memory(replace(ROOMY, model_max_len=8192)).max_model_len == 8192
    assert plan_memory(replace(ROOMY, num_blocks=11)).max_model_len == 320


def test_a_hybrid_models_length_counts_what_its_windows_hold():
    plan = plan_memory(replace(ROOMY, layout=HYBRID, num_blocks=1024, max_model_len="auto", model_max_len=32768))
    assert HYBRID.blocks_for(plan.max_model_len, 2048) <= 1023
    assert plan.max_model_len == 32 * (1023 - 5 * 81)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param(
            {"weights": 73 * GIB},
            MemoryPlanError,
            ["weights take 73.00 GiB", "72.00 GiB", "1.00 GiB short"],
            id="weights beyond the budget",
        ),
        pytest.param(
            {"max_model_len": 65536},
            MemoryPlanError,
            ["MAX_MODEL_LEN is 65536", "1025 blocks (4.00 GiB) short", "at most 32736", "NUM_BLOCKS to 2049"],
            id="an explicit length beyond the given blocks",
        ),
        pytest.param(
            {"max_model_len": 65536, "free": 15 * GIB + (1000 + 256 + 400) * MIB},
            MemoryPlanError,
            ["MAX_MODEL_LEN is 65536", "1949 blocks (7.61 GiB) short", "at most 3168", "MAX_MEMORY_PERCENT"],
            id="an explicit length beyond what memory holds",
        ),
        pytest.param(
            {"max_model_len": 131073},
            ConfigError,
            ["MAX_MODEL_LEN is 131073", "131072"],
            id="an explicit length beyond the model",
        ),
        pytest.param(
            {"free": 15 * GIB + 1000 * MIB + 256 * MIB},
            MemoryPlanError,
            ["steps of 512 tokens", "smallest cache", "MAX_BATCH_TOKENS"],
            id="no room for a cache",
        ),
        pytest.param(
            {"layout": HYBRID, "num_blocks": 6},
            MemoryPlanError,
            ["NUM_BLOCKS is 6", "6 layer groups", "at least 7"],
            id="fewer blocks than layer groups",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(changes, error, words):
    with pytest.raises(error) as caught:
        plan_memory(replace(ROOMY, **changes))
    for word in words:
        assert word in str(caught.value)


@given(
    st.fixed_dictionaries(
        {
            "total": st.integers(GIB, 40 * GIB),
            "weights": st.integers(1, 20 * GIB),
            "activation_bytes_per_token": st.integers(0, MIB),
            "num_blocks": st.just("auto") | st.integers(2, 5000),
            "max_batch_tokens": st.just("auto") | st.integers(1, 10_000),
            "max_model_len": st.just("auto") | st.integers(2, 40_000),
            "layout": st.sampled_from([LLAMA_8B, HYBRID]),
            "device_type": st.sampled_from(["cpu", "cuda"]),
        }
    )
)
def test_a_plan_fits_and_is_never_more_than_asked_for(drawn):
    inputs = replace(ROOMY, **drawn)
    try:
        plan = plan_memory(inputs)
    except MemoryPlanError:
        return
    assert plan.used <= plan.budget
    assert inputs.num_blocks == "auto" or plan.num_blocks <= inputs.num_blocks
    assert plan.max_batch_tokens <= (2048 if inputs.max_batch_tokens == "auto" else inputs.max_batch_tokens)
    assert inputs.max_model_len in ("auto", plan.max_model_len)
    assert 1 + inputs.layout.blocks_for(plan.max_model_len, plan.max_batch_tokens) <= plan.num_blocks


def test_the_formula_counts_cache_masks_and_steps():
    # One group of 32 layers: pages of 2,048 bytes; without tokens to compute only the cache is left.
    cache = estimate_memory(LLAMA_8B, cache_tokens=1000, batch_tokens=0, hidden_size=4096, vocab_size=128256)
    assert cache == 2 * 1000 * (32 * 2048 + 2)
    step = estimate_memory(LLAMA_8B, cache_tokens=0, batch_tokens=10, hidden_size=4096, vocab_size=128256)
    assert step == 10 * ((4096 + 128256) * 2 + 28 + 4)
    both = estimate_memory(
        LLAMA_8B, cache_tokens=1000, batch_tokens=10, hidden_size=4096, vocab_size=128256, num_masks=1
    )
    assert both == cache + step + 10 * 1000 * 2


def test_the_table_is_aligned_and_names_every_part():
    lines = render_table(plan_memory(ROOMY), estimate=5 * GIB).splitlines()
    assert len({len(line) for line in lines if line}) == 1
    text = "\n".join(" ".join(line.split()) for line in lines)
    for row in (
        "weights 15.00 GiB 18.8 %",
        "activations of 2048 tokens 1.00 GiB 1.2 %",
        "static buffers 100.0 MiB 0.1 %",
        "cache: 1024 blocks of 32 tokens 4.00 GiB 5.0 %",
        "budget 72.00 GiB 90.0 %",
        "formula for activations and cache 5.00 GiB 6.2 %",
        "NUM_BLOCKS 1024 1024",
        "MAX_MODEL_LEN auto 32736",
    ):
        assert row in text


def test_the_table_and_the_json_say_what_is_held_in_smaller_numbers():
    plan = plan_memory(replace(ROOMY, weights_kind="linear layers in fp8", cache_kind="fp8"))
    names = [line.split("  ")[0] for line in render_table(plan).splitlines()]
    assert "weights, linear layers in fp8" in names
    assert "cache: 1024 blocks of 32 tokens, fp8" in names
    assert json.loads(to_json(plan))["kinds"] == {"weights": "linear layers in fp8", "cache": "fp8"}


def test_the_json_holds_the_same_numbers():
    document = json.loads(to_json(plan_memory(ROOMY), estimate=5))
    assert document["bytes"]["cache"] == 4 * GIB
    assert document["block"] == {"tokens": 32, "bytes": 4 * MIB}
    assert document["settings"]["max_model_len"] == {"requested": "auto", "actual": 32736}
    assert (document["longest_sequence"], document["formula_bytes"]) == (32736, 5)


def test_bytes_read_in_the_unit_that_fits():
    assert [format_bytes(count) for count in (MIB // 2, 1023 * MIB, GIB, -3 * GIB)] == [
        "0.5 MiB",
        "1023.0 MiB",
        "1.00 GiB",
        "-3.00 GiB",
    ]


def test_a_cpus_memory_can_be_read():
    memory = available_memory("cpu")
    assert 0 < memory.free <= memory.total


def test_memory_of_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="DEVICE is meta"):
        available_memory("meta")
