import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_operator.errors import ModelDoesNotFit, TuningError
from pagedserve_operator.gpus.catalogue import CATALOGUE
from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.shapes import FROM_NAME, from_name
from pagedserve_operator.sizing import Breakdown, Sizing, batch_for
from pagedserve_operator.sizing.demand import WEIGHTS_OVERHEAD
from tuning_cases import GOLDEN, LLAMA, resolved, shape, sized

# --- known values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "blocks"),
    [
        ("A10G", 983),
        ("L4", 985),
        ("RTX-4090", 1674),
        ("A100-40GB", 9052),
        ("L40S", 11351),
        ("A100-80GB", 27484),
        ("H100", 27322),
        ("H100-NVL", 33744),
        ("H200", 55317),
        ("B200", 73132),
    ],
)
def test_a_llama_of_8_billion_gets_the_blocks_of_an_independent_calculation(card: str, blocks: int) -> None:
    assert sized(resolved(card)).num_blocks == pytest.approx(blocks, rel=0.01)


@pytest.mark.parametrize("card", ["T4", "V100-16GB"])
def test_a_llama_of_8_billion_does_not_fit_into_16_gib(card: str) -> None:
    with pytest.raises(ModelDoesNotFit):
        sized(resolved(card))


@pytest.mark.parametrize(
    ("card", "tokens"),
    [
        ("T4", 512),
        ("A10G", 512),
        ("L4", 1024),
        ("RTX-4090", 1024),
        ("A100", 2048),
        ("L40S", 2048),
        ("H100", 8192),
        ("H200", 8192),
        ("B200", 16384),
    ],
)
def test_a_step_has_the_tokens_that_the_card_computes_in_a_quarter_of_a_second(card: str, tokens: int) -> None:
    assert batch_for(resolved(card), shape()) == tokens


def test_a_step_stays_within_its_bounds() -> None:
    assert batch_for(resolved("B200", count=8), shape("SmolLM2-135M")) == 16384
    assert batch_for(resolved("T4"), shape("Mixtral-8x7B-v0.1")) == 512
    assert batch_for(resolved("A100", count=2), shape()) == 4096


@pytest.mark.parametrize("card", ["A10G", "L4", "RTX-4090"])
def test_a_length_that_does_not_fit_becomes_what_fits_and_says_so(card: str) -> None:
    found = sized(resolved(card))
    layout = CacheLayout.build(("full",) * 32, window=None, num_kv_heads=8, head_dim=128, block_size=16, dtype_bytes=2)
    assert found.max_model_len == layout.largest_length(found.num_blocks, found.max_batch_tokens) < 131072
    assert any(f"{found.max_model_len} of the model's 131072" in note for note in found.notes)


def test_a_length_that_fits_is_the_models() -> None:
    found = sized(resolved("A100-80GB"))
    assert found.max_model_len == 131072
    assert not any("maxModelLen" in note for note in found.notes)


# --- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "dtype", "noted"), [("L4", "bfloat16", False), ("T4", "float16", True), ("cpu", "float32", False)]
)
def test_the_dtype_follows_the_compute_capability(card: str, dtype: str, noted: bool) -> None:
    found = sized(resolved(card), shape("SmolLM2-135M"))
    assert (found.dtype, found.kv_cache_dtype) == (dtype, dtype)
    assert any("no bfloat16" in note for note in found.notes) == noted


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": {"dtype": "bfloat16"}}, "spec.model.dtype"),
        ({"tuning": {"kvCacheDtype": "bfloat16"}}, "spec.tuning.kvCacheDtype"),
    ],
)
def test_bfloat16_where_there_is_none_is_an_error_by_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(TuningError, match=rf"{re.escape(field)} is bfloat16, which Tesla-T4.*float16"):
        sized(resolved("T4"), shape("SmolLM2-135M"), **spec)


def test_an_unknown_dtype_is_an_error_by_field() -> None:
    with pytest.raises(TuningError, match=r"spec\.model\.dtype is int4"):
        sized(resolved("L4"), model={"dtype": "int4"})


def test_a_wider_cache_holds_fewer_blocks() -> None:
    narrow, wide = (sized(resolved("A100"), tuning={"kvCacheDtype": kind}) for kind in ("auto", "float32"))
    assert wide.block_bytes == 2 * narrow.block_bytes
    assert wide.num_blocks == narrow.num_blocks // 2


# --- smaller numbers -------------------------------------------------------------------------------------------------


def weights_mib(kind: str, name: str = LLAMA, **more: Any) -> int:
    return sized(resolved("H200"), shape(name), model={"quantization": kind}, **more).breakdown.weights


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "int8"])
def test_weights_take_what_they_take_in_the_engine(name: str, kind: str) -> None:
    found = weights_mib("none" if kind == "bfloat16" else kind, name) * 2**20
    assert found / WEIGHTS_OVERHEAD == pytest.approx(GOLDEN[name]["weight_bytes"][kind], rel=0.01, abs=2**20)


def test_quantised_weights_leave_embeddings_and_output_layer_wide() -> None:
    # 8,030 million parameters, 2 x 128,256 x 4,096 of them in the two tables, and 4 bytes of scale for each output.
    tables = 2 * 128256 * 4096
    small = (8_030_261_248 - tables) * (1 + 4 / 4096)
    assert weights_mib("fp8") == weights_mib("int8")
    assert weights_mib("fp8") == pytest.approx((small + 2 * tables) * WEIGHTS_OVERHEAD / 2**20, abs=2)


def test_experts_stay_wide_and_a_note_says_how_much_that_leaves() -> None:
    card, mixture = resolved("H200"), shape("Mixtral-8x7B-v0.1")
    wide, small = (sized(card, mixture, model={"quantization": kind}) for kind in ("none", "int8"))
    assert wide.breakdown.weights * 0.95 < small.breakdown.weights < wide.breakdown.weights
    assert any("leaves 97% of the model" in note for note in small.notes)
    assert not any("leaves" in note for note in wide.notes)


def test_an_8_bit_cache_holds_twice_the_blocks() -> None:
    wide, small = (sized(resolved("A100"), tuning={"kvCacheDtype": kind}) for kind in ("auto", "fp8"))
    assert small.kv_cache_dtype == "fp8"
    assert small.block_bytes * 2 == wide.block_bytes
    assert small.num_blocks in (2 * wide.num_blocks, 2 * wide.num_blocks + 1)


@pytest.mark.parametrize(
    ("card", "kind", "noted", "scratch"),
    [
        ("H100", "fp8", False, 0),
        ("L4", "fp8", False, 0),
        ("A100-80GB", "fp8", True, 2 * 14336 * 4096 * 2),
        ("A100-80GB", "int8", False, 2 * 14336 * 4096 * 2),
        ("cpu", "int8", False, 2 * 14336 * 4096 * 4),
        ("cpu", "fp8", True, 2 * 14336 * 4096 * 8),
    ],
)
def test_products_that_a_device_lacks_cost_memory_and_are_noted(
    card: str, kind: str, noted: bool, scratch: int
) -> None:
    gpu = resolved(card, memoryMiB=80_000)
    tuning = {"maxBatchTokens": 512}
    wide, small = (sized(gpu, model={"quantization": q}, tuning=tuning) for q in ("none", kind))
    more = (small.breakdown.activations - wide.breakdown.activations) * 2**20
    assert more == pytest.approx(scratch, abs=2**20)
    assert any("int8 is faster" in note for note in small.notes) == noted


def test_fp8_on_a_card_too_old_for_it_names_the_cure() -> None:
    with pytest.raises(TuningError, match=r"spec\.model\.quantization is fp8.*Tesla-T4.*int8.*spec\.gpu\.type.*8\.9"):
        sized(resolved("T4"), shape("SmolLM2-135M"), model={"quantization": "fp8"})
    assert sized(resolved("T4"), shape("SmolLM2-135M"), model={"quantization": "int8"}).num_blocks > 0


def test_an_unknown_quantization_is_an_error_by_field() -> None:
    with pytest.raises(TuningError, match=r"spec\.model\.quantization is int4: set it to none, fp8, int8"):
        sized(resolved("L4"), model={"quantization": "int4"})
    with pytest.raises(TuningError, match=r"spec\.tuning\.kvCacheDtype is int8: set it to auto, .*fp8"):
        sized(resolved("L4"), tuning={"kvCacheDtype": "int8"})


def test_a_model_without_layers_is_an_error_by_field() -> None:
    with pytest.raises(TuningError, match=r"spec\.model\.architecture\.layers"):
        sized(resolved("L4"), replace(shape(), layer_types=()))


@pytest.mark.parametrize(("card", "kind"), [("T4", "int8"), ("V100-16GB", "int8")])
def test_smaller_weights_are_a_cure_where_they_fit(card: str, kind: str) -> None:
    assert refusal(resolved(card)).endswith(f"or spec.model.quantization to {kind}")
    assert sized(resolved(card), model={"quantization": kind}).num_blocks > 0
    gpu = resolved("L4", memoryMiB=15360)
    assert refusal(gpu).endswith("or spec.model.quantization to fp8")
    assert sized(gpu, model={"quantization": "fp8"}).num_blocks > 0


def test_a_refusal_names_the_quantization_that_did_not_help() -> None:
    text = refusal(resolved("T4"), replace(shape(), parameters=20 * 10**9), model={"quantization": "int8"})
    assert "of weights in int8 and float16" in text
    assert "spec.model.quantization" not in text


# --- what the user gives ---------------------------------------------------------------------------------------------


def test_given_numbers_win() -> None:
    found = sized(resolved("A100"), tuning={"numBlocks": 500, "maxBatchTokens": 3000})
    assert (found.num_blocks, found.max_batch_tokens, found.notes[1:]) == (500, 3000, found.notes[1:])
    assert found.max_model_len == 499 * 16
    assert found.breakdown.cache == 500 * found.block_bytes >> 20


def test_a_given_number_that_is_too_large_stays_and_is_noted() -> None:
    most = sized(resolved("A100")).num_blocks
    found = sized(resolved("A100"), tuning={"numBlocks": 10**6})
    assert found.num_blocks == 10**6
    assert any(f"lower it to about {most}" in note for note in found.notes)
    assert found.breakdown == sized(resolved("A100")).breakdown
    tokens = sized(resolved("A10G"), tuning={"maxBatchTokens": 65536})
    assert tokens.max_batch_tokens == 65536
    assert any("spec.tuning.maxBatchTokens" in note and "lower it to about" in note for note in tokens.notes)


def test_too_few_blocks_for_any_sequence_are_an_error() -> None:
    with pytest.raises(TuningError, match=r"spec\.tuning\.numBlocks is 3: .* takes 7"):
        sized(resolved("L4"), shape("gemma-3-270m"), tuning={"numBlocks": 3})


def test_a_given_length_within_the_memory_is_kept() -> None:
    assert sized(resolved("L4"), model={"maxModelLen": 4096}).max_model_len == 4096


def test_a_given_length_beyond_the_memory_names_what_fits_and_the_cure() -> None:
    with pytest.raises(
        ModelDoesNotFit, match=r"spec\.model\.maxModelLen is 131072.*GiB.*at most (\d+), or set spec\.gpu"
    ) as error:
        sized(resolved("L4"), model={"maxModelLen": 131072})
    match = re.search(r"at most (\d+)", str(error.value))
    assert match is not None
    longest = int(match[1])
    assert sized(resolved("L4"), model={"maxModelLen": longest}).max_model_len == longest
    with pytest.raises(ModelDoesNotFit):
        sized(resolved("L4"), model={"maxModelLen": longest + 1})


def test_a_given_length_beyond_the_given_blocks_asks_for_more_of_them() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"spec\.tuning\.numBlocks is 100: raise it to 257"):
        sized(resolved("A100"), model={"maxModelLen": 4096}, tuning={"numBlocks": 100})


def test_a_given_length_beyond_the_models_is_an_error() -> None:
    with pytest.raises(TuningError, match=r"spec\.model\.maxModelLen is 200000 and the model holds 131072"):
        sized(resolved("H200"), model={"maxModelLen": 200_000})


def test_a_guessed_shape_refuses_no_length() -> None:
    found = sized(resolved("H200"), from_name("hf://org/x-8b"), model={"maxModelLen": 100_000})
    assert found.max_model_len == 100_000
    assert any("guessed from its name" in note for note in found.notes)


def test_graphs_take_their_memory_only_where_they_are_on() -> None:
    on, off = sized(resolved("A100")), sized(resolved("A100"), tuning={"useCudaGraph": False})
    assert (on.breakdown.graphs, off.breakdown.graphs) == (512, 0)
    assert off.num_blocks - on.num_blocks == 256


# --- several devices, and room that is short -------------------------------------------------------------------------


def test_two_devices_share_weights_and_heads() -> None:
    one, two = sized(resolved("A100-80GB")), sized(resolved("A100-80GB", count=2))
    assert two.block_bytes == one.block_bytes // 2
    assert two.breakdown.weights == one.breakdown.weights // 2
    assert two.num_blocks > 2 * one.num_blocks
    # Fragmentation shrinks with the weights; what the devices exchange comes on top.
    assert two.breakdown.runtime == pytest.approx(1539 + 256 + 0.05 * two.breakdown.weights, abs=2)


def test_where_room_is_short_the_batch_gives_way_before_the_blocks() -> None:
    roomy, short = sized(resolved("H100")), sized(resolved("H100", memoryMiB=21_100))
    assert short.max_batch_tokens < roomy.max_batch_tokens == 8192
    assert any(f"maxBatchTokens is {short.max_batch_tokens} rather than 8192" in note for note in short.notes)


# --- what does not fit -----------------------------------------------------------------------------------------------


def refusal(*args: Any, **spec: Any) -> str:
    with pytest.raises(ModelDoesNotFit) as error:
        sized(*args, **spec)
    return str(error.value)


def test_the_shortfall_is_what_is_missing() -> None:
    text = refusal(resolved("T4"))
    match = re.search(r"([\d.]+) GiB short", text)
    assert match is not None
    missing = float(match[1])
    memory = 15360 + missing * 1024 / 0.9
    assert sized(resolved("T4", memoryMiB=int(memory + 20))).num_blocks >= 2
    refusal(resolved("T4", memoryMiB=int(memory - 40)))


@pytest.mark.parametrize("card", ["T4", "V100-16GB"])
def test_the_cures_of_a_message_work(card: str) -> None:
    text = refusal(resolved(card))
    match = re.search(r"spec\.gpu\.count to (\d) or spec\.gpu\.type to (\S+) \(", text)
    assert match is not None
    assert sized(resolved(card, count=int(match[1]))).num_blocks > 0
    assert sized(resolved(match[2])).num_blocks > 0
    smaller = [model for model in CATALOGUE.values() if model.memory_mib < CATALOGUE[match[2]].memory_mib]
    for model in smaller:
        refusal(resolved(model.product))


def test_a_smaller_dtype_is_the_cheapest_cure() -> None:
    text = refusal(resolved("L4"), model={"dtype": "float32"})
    assert text.endswith("set spec.model.dtype to bfloat16")
    assert sized(resolved("L4"), model={"dtype": "bfloat16"}).num_blocks > 0


def test_a_model_that_no_card_holds_alone_gets_a_number_of_them() -> None:
    large = replace(shape(), parameters=200_000_000_000)
    text = refusal(resolved("H100"), large)
    assert "spec.gpu.count to 8" in text
    assert "spec.gpu.type" not in text


@pytest.mark.parametrize("part", [resolved("H100-MIG-1g.10gb"), resolved("t4-shared", memoryMiB=8000)])
def test_parts_of_a_device_are_never_to_serve_one_model_together(part: ResolvedGpu) -> None:
    text = refusal(part, replace(shape(), parameters=12_000_000_000))
    assert "spec.gpu.type to" in text
    assert "spec.gpu.count" not in text


def test_a_model_that_nothing_holds_is_said_to_be_too_large() -> None:
    assert "choose a smaller model" in refusal(resolved("H100"), replace(shape(), parameters=10**13))


# --- cpu -------------------------------------------------------------------------------------------------------------


def test_a_cpu_engine_leaves_most_memory_to_others() -> None:
    found = sized(resolved("cpu"), shape("SmolLM2-135M"))
    assert found.num_blocks * found.block_bytes <= 8192 * (1 << 20) // 4
    assert found.breakdown.graphs == 0
    assert found.max_batch_tokens == 512


def test_a_cpu_engine_takes_no_more_than_can_ever_be_in_use() -> None:
    found = sized(resolved("cpu", memoryMiB=10**6), shape("SmolLM2-135M"))
    assert found.num_blocks == 1 + 256 * (8192 // 16)


def test_a_cpu_engine_holds_a_given_length() -> None:
    gpu, long = resolved("cpu", memoryMiB=6000), replace(shape("SmolLM2-135M"), max_position_embeddings=131072)
    assert sized(gpu, long).max_model_len < 40_000
    assert sized(gpu, long, model={"maxModelLen": 40_000}).max_model_len == 40_000


def test_a_model_too_large_for_the_container_asks_for_the_memory_that_it_takes() -> None:
    match = re.search(r"spec\.resources\.limits\.memory to (\d+)Gi", refusal(resolved("cpu")))
    assert match is not None
    assert sized(resolved("cpu", memoryMiB=int(match[1]) * 1024)).num_blocks > 0
    refusal(resolved("cpu", memoryMiB=(int(match[1]) - 2) * 1024))


# --- properties ------------------------------------------------------------------------------------------------------

CARDS = st.sampled_from([*CATALOGUE, "cpu"])
SHAPES = st.sampled_from(
    [*(shape(name) for name in GOLDEN), from_name("hf://org/x-70b"), replace(shape(), max_position_embeddings=None)]
)
NUMBERS = st.none() | st.integers(1, 200_000)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    tuning = {
        "blockSize": draw(st.sampled_from([8, 16, 32, 256])),
        "maxMemoryPercent": draw(st.floats(0.05, 1.0)),
        "numBlocks": draw(NUMBERS),
        "maxBatchTokens": draw(NUMBERS),
        "kvCacheDtype": draw(st.sampled_from(["auto", "bfloat16", "float16", "float32", "fp8"])),
        "useCudaGraph": draw(st.none() | st.booleans()),
    }
    model = {
        "dtype": draw(st.sampled_from(["auto", "float16", "float32"])),
        "maxModelLen": draw(NUMBERS),
        "quantization": draw(st.sampled_from(["none", "fp8", "int8"])),
    }
    return {"tuning": tuning, "model": model}


def outcome(card: str, memory: int, count: int, model_shape: Any, spec: dict[str, Any]) -> Sizing | None:
    devices = {} if card == "cpu" else {"count": count}
    try:
        return sized(resolved(card, memoryMiB=memory, **devices), model_shape, **spec)
    except TuningError:
        return None


@given(CARDS, st.integers(1, 300_000), st.sampled_from([1, 2, 3, 8]), SHAPES, specs())
def test_any_sizing_adds_up_or_is_a_tuning_error(
    card: str, memory: int, count: int, model_shape: Any, spec: Any
) -> None:
    found = outcome(card, memory, count, model_shape, spec)
    if found is None:
        return
    parts: Breakdown = found.breakdown
    assert parts.weights + parts.runtime + parts.activations + parts.graphs + parts.cache + parts.left_over == memory
    assert parts.left_over >= 0
    assert found.num_blocks >= 2
    assert found.max_model_len >= 1
    assert found.max_batch_tokens >= 1


@given(CARDS, st.integers(1, 100_000), st.integers(0, 5_000), SHAPES, specs())
def test_more_memory_never_means_fewer_blocks_or_a_shorter_length(
    card: str, memory: int, more: int, model_shape: Any, spec: Any
) -> None:
    less, rest = (outcome(card, size, 1, model_shape, spec) for size in (memory, memory + more))
    if less is not None:
        assert rest is not None
        assert rest.num_blocks >= less.num_blocks
        assert rest.max_batch_tokens >= less.max_batch_tokens


def test_more_memory_never_means_fewer_blocks_where_the_batch_gives_way() -> None:
    found = [outcome("H100", memory, 1, shape(), {"tuning": {}, "model": {}}) for memory in range(20_600, 23_600, 20)]
    blocks = [one.num_blocks if one else 0 for one in found]
    assert blocks == sorted(blocks)
    assert {one.max_batch_tokens for one in found if one} == {512, 1024, 2048, 4096, 8192}


def test_the_guess_by_name_is_marked() -> None:
    assert from_name(f"hf://x/{LLAMA}").source == FROM_NAME
