"""What has a recipe, what hasn't, and that nothing unknown passes unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from models import tiny_model
from pagedserve_engine.model import recipes
from pagedserve_engine.model.decoder_loading import Blueprint, draw_blueprint
from pagedserve_engine.model.recipes import COVERED, NotCovered, read_recipe
from pagedserve_engine.model.spec import ModelSpec

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())


def draw(name: str, **overrides: Any) -> Blueprint | NotCovered:
    config = tiny_config(name, **overrides)
    return draw_blueprint(config, ModelSpec.from_config(config))


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    plain = json.loads((tiny_model(name)[1] / "config.json").read_text())
    return AutoConfig.for_model(**{**plain, **overrides})


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("mixtral", {}, "mixtral has no fused decoder"),
        ("qwen3_moe", {}, "qwen3_moe has no fused decoder"),
        ("llama", {"model_type": "olmo2"}, "olmo2 has no fused decoder"),
        ("llama", {"model_type": "starcoder2"}, "starcoder2 has no fused decoder"),
        ("llama", {"hidden_act": "relu"}, "no activation relu"),
        ("llama", {"hidden_act": "gelu"}, "no activation gelu"),
        ("llama", {"pretraining_tp": 2}, "setting pretraining_tp=2"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "setting attn_logit_softcapping=30.0"),
    ],
)
def test_what_is_not_understood_is_left_to_transformers(name: str, overrides: dict[str, Any], reason: str) -> None:
    found = draw(name, **overrides)
    assert isinstance(found, NotCovered)
    assert reason in found.reason


def test_weights_that_are_quantised_already_are_left_to_transformers() -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq"}
    found = read_recipe(config, ModelSpec.from_config(config))
    assert found == NotCovered("its weights are quantised already")


def test_modules_with_other_parameters_than_the_recipes_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if a later transformers gave this family's modules norms that the recipe doesn't know.
    monkeypatch.setitem(recipes._FAMILIES, "qwen3", recipes._FAMILIES["qwen2"])
    found = draw("qwen3")
    assert isinstance(found, NotCovered)
    assert "differ in the parameter layers.0.self_attn" in found.reason


def test_settings_that_change_no_answer_keep_the_fused_decoder() -> None:
    harmless = {"attention_dropout": 0.1, "initializer_range": 0.5, "use_cache": False, "pad_token_id": 3}
    assert isinstance(draw("llama", **harmless, unheard_of=7), Blueprint)


def test_the_text_part_of_a_multimodal_gemma_is_covered() -> None:
    text = tiny_config("gemma3").to_dict()
    config = AutoConfig.for_model("gemma3", text_config=text)
    found = draw_blueprint(config, ModelSpec.from_config(config))
    assert isinstance(found, Blueprint)
    assert found.config is config
    assert found.text.model_type == "gemma3_text"


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_known_shape_of_a_covered_family_has_a_recipe(name: str) -> None:
    config = AutoConfig.for_model(**SHAPES[name]["config"])
    if config.model_type in COVERED:
        assert isinstance(draw_blueprint(config, ModelSpec.from_config(config)), Blueprint)
    else:
        assert isinstance(draw_blueprint(config, ModelSpec.from_config(config)), NotCovered)
