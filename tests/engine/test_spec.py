import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from models import TINY_NAMES, load_reference, tiny_model
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.errors import UnsupportedModelError
from pagedserve_engine.model.spec import ModelSpec

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())


def spec_of(**settings: Any) -> ModelSpec:
    return ModelSpec.from_config(AutoConfig.for_model(**settings))


@pytest.mark.parametrize("name", GOLDEN)
def test_known_models_have_their_published_shape(name: str) -> None:
    known = GOLDEN[name]
    spec = spec_of(**known["config"])
    assert spec.num_layers == known["layers"]
    assert spec.layer_types.count("sliding") == known["sliding_layers"]
    assert spec.sliding_window == known["sliding_window"]
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (known["heads"], known["kv_heads"], known["head_dim"])
    assert spec.num_parameters == pytest.approx(known["parameters"], rel=1e-3)
    assert spec.num_active_parameters == pytest.approx(known["active_parameters"], rel=1e-3)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_of_known_models_cost_what_the_operator_counts_on(name: str, block_size: int) -> None:
    known = GOLDEN[name]
    layout = CacheLayout.build(
        ["sliding"] * known["sliding_layers"] + ["full"] * (known["layers"] - known["sliding_layers"]),
        window=known["sliding_window"],
        num_kv_heads=known["kv_heads"],
        head_dim=known["head_dim"],
        block_size=block_size,
        dtype_bytes=2,
    )
    by_hand = 2 * known["layers_per_group"] * known["kv_heads"] * known["head_dim"] * block_size * 2
    assert layout.block_bytes == by_hand == known["block_bytes_bf16"][str(block_size)]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_estimated_parameters_are_near_the_real_number(name: str) -> None:
    config, folder = tiny_model(name)
    real = sum(parameter.numel() for parameter in load_reference(folder).parameters())
    assert ModelSpec.from_config(config).num_parameters == pytest.approx(real, rel=0.05)


SHAPE = {"num_hidden_layers": 4, "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("settings", "types", "window"),
    [
        pytest.param({"model_type": "llama"}, "ffff", None, id="no window"),
        pytest.param({"model_type": "mistral", "sliding_window": 64}, "ssss", 64, id="one window for all layers"),
        pytest.param({"model_type": "mistral", "sliding_window": None}, "ffff", None, id="window switched off"),
        pytest.param(
            {"model_type": "mistral", "sliding_window": 4096}, "ffff", None, id="window as long as the context"
        ),
        pytest.param(
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, "ffff", None, id="window unused"
        ),
        pytest.param(
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            "fffs",
            64,
            id="window from some layer on",
        ),
        pytest.param(
            {"model_type": "qwen3_moe", "sliding_window": 64, "use_sliding_window": False},
            "ffff",
            None,
            id="unused, moe",
        ),
        pytest.param({"model_type": "phi3", "sliding_window": 64}, "ssss", 64, id="phi-3"),
        pytest.param({"model_type": "gemma2", "sliding_window": 64}, "sfsf", 64, id="every second layer"),
        pytest.param({"model_type": "cohere2", "sliding_window": 64}, "sssf", 64, id="three of four"),
        pytest.param(
            {
                "model_type": "gemma3_text",
                "sliding_window": 64,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            },
            "sssf",
            64,
            id="listed",
        ),
    ],
)
def test_layer_types_come_from_whatever_the_family_writes(
    settings: dict[str, Any], types: str, window: int | None
) -> None:
    spec = spec_of(**SHAPE, **settings)
    assert "".join(kind[0] for kind in spec.layer_types) == types
    assert spec.sliding_window == window


def test_a_multimodal_configuration_gives_its_text_part() -> None:
    spec = spec_of(model_type="gemma3", text_config={"num_hidden_layers": 6, "sliding_window": 32, "head_dim": 8})
    assert (spec.architecture, spec.num_layers, spec.head_dim, spec.sliding_window) == ("gemma3_text", 6, 8, 32)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))], ids=["none", "one", "several"])
def test_ends_of_sequence_are_a_tuple(value: Any, ids: tuple[int, ...]) -> None:
    assert spec_of(model_type="llama", eos_token_id=value).eos_token_ids == ids


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "recurrent"),
        ({"model_type": "jamba"}, "recurrent"),
        ({"model_type": "rwkv"}, "recurrent"),
        ({"model_type": "recurrent_gemma"}, "recurrent"),
        ({"model_type": "falcon_h1"}, "recurrent"),
        ({"model_type": "qwen3_next"}, "recurrent"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "llama4_text"}, "chunked attention"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gemma3n_text"}, "share keys and values"),
        ({"model_type": "gemma4_text"}, "head_dim"),
        ({"model_type": "mimo_v2_flash"}, "heads"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "looks ahead"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_paged_is_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        spec_of(**settings)
    assert settings["model_type"] in caught.value.message
