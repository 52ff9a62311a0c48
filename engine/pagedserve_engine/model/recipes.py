"""What tells one family of decoders from another, as data, so that one decoder computes them all.

A family is covered when every setting that its configuration class declares is either understood here or left at its
default, and when transformers' own modules have exactly the parameters that the recipe expects. Everything else is left
to those modules: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from pagedserve_engine.model.ops import Activation
from pagedserve_engine.model.spec import ModelSpec

ROTARY_ALL = "all"
ROTARY_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model's decoder computes, beside its shape."""

    norm_offset: float
    """1 where norms multiply by 1 + weight (Gemma), else 0."""
    norm_eps: float
    norms_outputs: bool
    """Whether attention and feed-forward outputs are normed before they join the residual stream (Gemma 2 and 3)."""
    norms_heads: bool
    """Whether each query and key head is normed before its rotation."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: Activation
    embedding_scale: float
    rounds_embedding_scale: bool
    """Whether that scale is rounded to the model's dtype first."""
    attention_scale: float
    softcap: float | None
    """Bound of attention scores."""
    logits_softcap: float | None
    logits_divisor: float
    residual_scale: float
    """Multiplies what joins the residual stream (Granite)."""
    rotary_names: tuple[str, ...]
    """By layer: the rotary table's name: ``ROTARY_ALL``, a type of layer, or ``ROTARY_NONE``, which turns nothing."""
    rows_fused: bool
    """Whether checkpoints hold queries, keys and values as one tensor, gate and up as another (Phi-3)."""


@dataclass(frozen=True, slots=True)
class NotCovered:
    """Why a model is left to transformers' modules."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a family's modules do that its configuration doesn't say, and which of its settings they read."""

    norm_offset: float = 0.0
    norms_outputs: bool = False
    norms_heads: bool = False
    qkv_bias: bool = False
    activation_setting: str = "hidden_act"
    scales_embedding: bool = False
    rows_fused: bool = False
    settings: frozenset[str] = frozenset()


_GEMMA = {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
_GRANITE = {"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}
_FAMILIES = {
    "llama": _Family(settings=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(norms_heads=True, settings=frozenset({"attention_bias"})),
    "gemma": _Family(norm_offset=1.0, scales_embedding=True, settings=frozenset({"attention_bias"})),
    "gemma2": _Family(
        norm_offset=1.0,
        norms_outputs=True,
        activation_setting="hidden_activation",
        scales_embedding=True,
        settings=frozenset({"attention_bias", *_GEMMA}),
    ),
    "gemma3_text": _Family(
        norm_offset=1.0,
        norms_outputs=True,
        norms_heads=True,
        activation_setting="hidden_activation",
        scales_embedding=True,
        # It declares a bound of attention scores that its layers do not apply: with one set it isn't covered.
        settings=frozenset({"attention_bias", *_GEMMA} - {"attn_logit_softcapping"}),
    ),
    "phi3": _Family(rows_fused=True),
    "granite": _Family(settings=frozenset({"attention_bias", "mlp_bias", *_GRANITE})),
    "smollm3": _Family(settings=frozenset({"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"})),
}
COVERED = frozenset(_FAMILIES)
"""Model types that have a recipe."""

_SHAPE = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
}
"""Settings that the recipe, the model's shape or its rotary module read in every family."""
_HARMLESS = {
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop"),
}
"""Settings that change nothing in a forward pass without training."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_recipe(text: Any, spec: ModelSpec) -> Recipe | NotCovered:
    """The recipe of transformers' configuration ``text`` (a multimodal one's text part) with the shape ``spec``."""
    family = _FAMILIES.get(text.model_type)
    if family is None:
        return NotCovered(f"the family {text.model_type} has no fused decoder")
    if getattr(text, "quantization_config", None) is not None:
        return NotCovered("its weights are quantised already")
    strange = _unknown_settings(text, family)
    if strange:
        return NotCovered(f"the fused decoder does not know the setting {strange[0]}={getattr(text, strange[0])!r}")
    named = getattr(text, family.activation_setting)
    if named not in _ACTIVATIONS:
        return NotCovered(f"the fused decoder has no activation {named}")
    return Recipe(
        norm_offset=family.norm_offset,
        norm_eps=text.rms_norm_eps,
        norms_outputs=family.norms_outputs,
        norms_heads=family.norms_heads,
        qkv_bias=family.qkv_bias or _setting(text, family, "attention_bias", False),
        output_bias=_setting(text, family, "attention_bias", False),
        mlp_bias=_setting(text, family, "mlp_bias", False),
        activation=_ACTIVATIONS[named],
        embedding_scale=_embedding_scale(text, family),
        rounds_embedding_scale=family.scales_embedding,
        attention_scale=_attention_scale(text, family, spec),
        softcap=_setting(text, family, "attn_logit_softcapping", None),
        logits_softcap=_setting(text, family, "final_logit_softcapping", None),
        logits_divisor=float(_setting(text, family, "logits_scaling", 1.0)),
        residual_scale=float(_setting(text, family, "residual_multiplier", 1.0)),
        rotary_names=_rotary_names(text, family),
        rows_fused=family.rows_fused,
    )


def _setting(text: Any, family: _Family, name: str, otherwise: Any) -> Any:
    """A setting that only some families' modules read."""
    return getattr(text, name) if name in family.settings else otherwise


def _unknown_settings(text: Any, family: _Family) -> list[str]:
    """Settings that the class declares, that are set, and that nothing here understands."""
    known = {field.name for field in dataclasses.fields(PreTrainedConfig)} | _SHAPE | _HARMLESS | family.settings
    known |= {family.activation_setting}
    return [
        field.name
        for field in dataclasses.fields(type(text))
        if field.name not in known and getattr(text, field.name) != field.default
    ]


def _embedding_scale(text: Any, family: _Family) -> float:
    if family.scales_embedding:
        return float(text.hidden_size**0.5)
    return float(_setting(text, family, "embedding_multiplier", 1.0))


def _attention_scale(text: Any, family: _Family, spec: ModelSpec) -> float:
    if "attention_multiplier" in family.settings:
        return float(text.attention_multiplier)
    return 1.0 / math.sqrt(_setting(text, family, "query_pre_attn_scalar", spec.head_dim))


def _rotary_names(text: Any, family: _Family) -> tuple[str, ...]:
    layers = range(text.num_hidden_layers)
    if "no_rope_layers" in family.settings:
        return tuple(ROTARY_ALL if text.no_rope_layers[layer] else ROTARY_NONE for layer in layers)
    by_type = any(isinstance(value, dict) for value in (text.rope_parameters or {}).values())
    return tuple(text.layer_types[layer] if by_type else ROTARY_ALL for layer in layers)
