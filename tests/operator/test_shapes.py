import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_operator.errors import ModelShapeUnknown
from pagedserve_operator.shapes import FROM_NAME, ModelShape, choose_shape, from_config, from_name
from pagedserve_operator.sizing.blocks import Blocks
from tuning_cases import GOLDEN, service, shape

ARCHITECTURE = {
    "layers": 4,
    "layerTypes": ["sliding", "sliding", "full", "sliding"],
    "slidingWindow": 128,
    "kvHeads": 2,
    "headDim": 64,
    "hiddenSize": 256,
    "intermediateSize": 1024,
    "vocabSize": 1000,
    "parameters": 5_000_000,
}


def blocks_of(found: ModelShape, **more: int) -> Blocks:
    return Blocks(shape=found, **{"block_size": 16, "dtype_bytes": 2, "devices": 1, **more})


# --- the contract with the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_a_configuration_has_its_published_shape(name: str) -> None:
    known, found = GOLDEN[name], shape(name)
    assert found.layers == known["layers"]
    assert found.layer_types.count("sliding") == known["sliding_layers"]
    assert found.sliding_window == known["sliding_window"]
    keys = ("kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
    assert [getattr(found, key) for key in keys] == [known[key] for key in keys]
    assert found.parameters == pytest.approx(known["parameters"], rel=1e-3)
    assert found.active_parameters == pytest.approx(known["active_parameters"], rel=1e-3)
    assert found.layers_per_group == known["layers_per_group"]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_block_costs_what_it_costs_the_engine(name: str, block_size: int) -> None:
    assert (
        blocks_of(shape(name), block_size=block_size).block_bytes == GOLDEN[name]["block_bytes_bf16"][str(block_size)]
    )


SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 999,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: known["config"] for name, known in GOLDEN.items()},
    "heads by default": {"model_type": "llama", **SMALL, "max_position_embeddings": 512},
    "tied by default": {"model_type": "gemma2", **SMALL, "num_key_value_heads": 4, "max_position_embeddings": 8192},
    "not tied": {
        "model_type": "gemma2",
        **SMALL,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
    },
    "a window without a list": {
        "model_type": "mistral",
        **SMALL,
        "max_position_embeddings": 8192,
        "sliding_window": 64,
    },
    "a window as long as the context": {
        "model_type": "mistral",
        **SMALL,
        "max_position_embeddings": 64,
        "sliding_window": 64,
    },
    "a window for the later layers": {
        "model_type": "qwen2",
        **SMALL,
        "max_position_embeddings": 8192,
        "sliding_window": 64,
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "max_window_layers": 3,
    },
    "a window that is off": {
        "model_type": "qwen2",
        **SMALL,
        "max_position_embeddings": 8192,
        "sliding_window": 64,
        "num_key_value_heads": 4,
    },
    "every sixth layer full": {
        "model_type": "gemma3_text",
        **SMALL,
        "num_hidden_layers": 12,
        "sliding_window": 64,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    },
    "experts": {
        "model_type": "qwen3_moe",
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "long rope": {
        "model_type": "phi3",
        **SMALL,
        "pad_token_id": 0,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 1024,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    },
    "scaled rope": {
        "model_type": "llama",
        **SMALL,
        "max_position_embeddings": 8192,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_read_as_the_engine_reads_it(name: str) -> None:
    settings = dict(CONFIGS[name])
    found = from_config(json.loads(json.dumps(settings)))
    engine = ModelSpec.from_config(AutoConfig.for_model(**settings))
    assert found.layer_types == engine.layer_types
    assert found.sliding_window == engine.sliding_window
    assert (found.kv_heads, found.head_dim) == (engine.num_kv_heads, engine.head_dim)
    assert (found.parameters, found.active_parameters) == (engine.num_parameters, engine.num_active_parameters)
    assert found.max_position_embeddings == engine.max_position_embeddings


@given(
    full=st.integers(0, 12),
    sliding=st.integers(0, 12),
    window=st.integers(1, 5000),
    block_size=st.sampled_from([8, 16, 32, 256]),
    length=st.integers(1, 200_000),
    chunk=st.integers(1, 16384),
    pool=st.integers(1, 50_000),
)
def test_blocks_and_lengths_are_the_engines(
    *, full: int, sliding: int, window: int, block_size: int, length: int, chunk: int, pool: int
) -> None:
    types = ("full",) * full + ("sliding",) * sliding or ("full",)
    heads = {"kvHeads": 3, "headDim": 64, "slidingWindow": window}
    spec = service(
        model={"architecture": {**ARCHITECTURE, **heads, "layers": len(types), "layerTypes": list(types)}}
    ).spec
    ours = blocks_of(choose_shape(spec.model, None), block_size=block_size)
    theirs = CacheLayout.build(types, window=window, num_kv_heads=3, head_dim=64, block_size=block_size, dtype_bytes=2)
    assert ours.block_bytes == theirs.block_bytes
    assert ours.needed(length, chunk) == 1 + theirs.blocks_for(length, chunk)
    assert ours.longest(pool, chunk) == theirs.largest_length(pool, chunk)


def test_devices_share_the_heads_and_none_has_less_than_one() -> None:
    assert (
        blocks_of(shape("SmolLM2-135M"), devices=2).block_bytes * 3 == blocks_of(shape("SmolLM2-135M")).block_bytes * 2
    )
    assert blocks_of(shape("gemma-3-270m"), devices=8).block_bytes == blocks_of(shape("gemma-3-270m")).block_bytes


# --- configurations as they are found --------------------------------------------------------------------------------


def test_the_text_part_of_a_multimodal_model_counts() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    found = from_config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    assert (found.hidden_size, found.kv_heads, found.head_dim) == (2560, 4, 256)
    assert found.layer_types.count("full") == 5
    assert found.parameters == pytest.approx(3.88e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2**26}, "num_hidden_layers is 67108864"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True"),
        ({"rope_scaling": "yes"}, "str"),
        ({"num_local_experts": "many"}, "num_local_experts is 'many'"),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, "layer_types lists 1"),
    ],
)
def test_a_configuration_that_says_too_little_is_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelShapeUnknown, match=rf"config\.json.*{complaint}.*spec\.model\.architecture"):
        from_config({**GOLDEN["Llama-3.1-8B"]["config"], **change})


@given(
    st.dictionaries(
        st.sampled_from(
            [*GOLDEN["Mixtral-8x7B-v0.1"]["config"], "rope_scaling", "layer_types", "text_config", "head_dim"]
        ),
        st.none()
        | st.booleans()
        | st.integers(-2, 10**6)
        | st.text(max_size=4)
        | st.floats()
        | st.lists(st.integers(), max_size=2),
    )
)
def test_no_configuration_crashes_it(change: dict[str, Any]) -> None:
    try:
        found = from_config({**GOLDEN["Mixtral-8x7B-v0.1"]["config"], **change})
    except ModelShapeUnknown:
        return
    assert found.parameters > 0
    assert found.kv_heads > 0
    assert found.head_dim > 0


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parameters", "active"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", 8e9, 8e9),
        ("hf://Qwen/Qwen3-0.6B", 0.6e9, 0.6e9),
        ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", 135e6, 135e6),
        ("hf://google/gemma-3-270m-it", 270e6, 270e6),
        ("hf://mistralai/Mixtral-8x7B-v0.1", 46.5e9, 11.6e9),
        ("hf://Qwen/Qwen3-30B-A3B", 30e9, 3e9),
        ("hf://tiiuae/falcon7b", 7e9, 7e9),
        ("pvc://models/llama-70b/final", 70e9, 70e9),
        ("/models/Qwen2.5-7B-Instruct-1M", 7e9, 7e9),
        ("hf://big-70b-lab/small-1.5b", 1.5e9, 1.5e9),
        ("SmolLM2-135M-Instruct", 135e6, 135e6),
    ],
)
def test_a_name_tells_the_number_of_parameters(uri: str, parameters: float, active: float) -> None:
    found = from_name(uri)
    assert (found.parameters, found.active_parameters) == (
        pytest.approx(parameters, rel=0.01),
        pytest.approx(active, rel=0.01),
    )
    assert found.source == FROM_NAME


@pytest.mark.parametrize(
    "uri",
    ["hf://openai/gpt2", "hf://a/phi-4k", "/models/final", "hf://x/Q4_K_M", "hf://x/v0.1b", "hf://x/0b", ""]
    + [f"hf://x/{name}" for name in ("9" * 400 + "b", "llama" + "9" * 400 + "b")],
)
def test_a_name_without_a_number_of_parameters_tells_nothing(uri: str) -> None:
    with pytest.raises(ModelShapeUnknown, match=r"spec\.model\.architecture"):
        from_name(uri)


def test_a_number_of_active_parameters_that_cannot_be_counts_for_nothing() -> None:
    assert from_name("hf://x/8b-a" + "9" * 400 + "b").active_parameters == 8_000_000_000


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "SmolLM2-135M", "Qwen3-0.6B"])
def test_a_guess_is_near_the_truth_for_well_known_models(name: str) -> None:
    guess, truth = from_name(f"hf://org/{name}"), shape(name)
    assert blocks_of(guess).block_bytes == blocks_of(truth).block_bytes
    assert guess.parameters == pytest.approx(truth.parameters, rel=0.02)


# --- which of them ---------------------------------------------------------------------------------------------------


def test_what_the_user_states_wins_over_configuration_and_name() -> None:
    model = service(model={"architecture": ARCHITECTURE}).spec.model
    found = choose_shape(model, GOLDEN["Llama-3.1-8B"]["config"])
    assert (found.parameters, found.sliding_window, found.layers_per_group) == (5_000_000, 128, 1)
    assert found.active_parameters == 5_000_000
    assert found.source == "spec.model.architecture"


def test_a_configuration_wins_over_the_name_and_a_bad_one_falls_back_on_it() -> None:
    model = service(uri="hf://org/other-70b").spec.model
    assert choose_shape(model, GOLDEN["Llama-3.1-8B"]["config"]).source == "config.json"
    assert choose_shape(model, {"model_type": "odd"}).parameters == 70_000_000_000
    assert choose_shape(model, None).source == FROM_NAME


def test_where_nothing_tells_the_configurations_complaint_is_kept() -> None:
    model = service(uri="hf://org/odd").spec.model
    with pytest.raises(ModelShapeUnknown, match="hidden_size is missing"):
        choose_shape(model, {"model_type": "odd"})
