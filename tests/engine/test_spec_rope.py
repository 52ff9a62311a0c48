"""Rotary frequencies that depend on the batch would let one request change another's answer."""

from __future__ import annotations

from transformers import LlamaConfig, Phi3Config

from pagedserve_engine.model.spec import ModelSpec


def test_long_rope_serves_the_length_up_to_which_its_frequencies_never_switch() -> None:
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 512,
        },
    )
    assert ModelSpec.from_config(config).max_position_embeddings == 512


def test_dynamic_rope_serves_its_original_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=rope)
    assert ModelSpec.from_config(config).max_position_embeddings == 256


def test_fixed_scaling_keeps_the_model_s_length() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=rope)
    assert ModelSpec.from_config(config).max_position_embeddings == 1024
