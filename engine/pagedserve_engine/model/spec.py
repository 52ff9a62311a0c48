"""A model's shape, read from its configuration alone: what the cache, the memory plan and the operator size by.

Whether the paged cache can hold the model is decided here as well, before any weight is read; the loader's probe then
checks the shape against what the layers really do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pagedserve_engine.errors import UnsupportedModelError

LayerType = Literal["full", "sliding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A causal language model's shape; counts are of the whole model, lengths in tokens."""

    architecture: str
    """The configuration's model type, ``llama`` say."""
    num_layers: int
    layer_types: tuple[LayerType, ...]
    """By layer."""
    sliding_window: int | None
    """Tokens that a sliding layer sees, the current one counted; None where no layer is sliding."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    softcap: float | None
    """Bound of the attention scores (Gemma 2)."""
    tie_word_embeddings: bool
    num_parameters: int
    """Estimate from the shape, within a few percent for the gated decoders of today."""
    num_active_parameters: int
    """Those that one token uses: less than all in a mixture of experts."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The shape of a transformers configuration; a multimodal one's text part.

        Raises UnsupportedModelError with the reason where the paged cache can't hold the model.
        """
        text = config.get_text_config(decoder=True)
        try:
            check_pageable(config, text)
            return cls._read(config, text)
        except UnsupportedModelError:
            raise
        # A configuration of settings by layer raises an error of its own kind when asked for one of them all.
        except Exception as error:
            raise refusal(config.model_type, f"its shape can't be read ({error})") from error

    @classmethod
    def _read(cls, config: Any, text: Any) -> Self:
        num_heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
        window = _window(text)
        layer_types = _layer_types(text, window)
        num_kv_heads = _num_kv_heads(text)
        intermediate_size = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        tie = bool(getattr(text, "tie_word_embeddings", False))
        attention = text.hidden_size * head_dim * 2 * (num_heads + num_kv_heads)
        embeddings = text.vocab_size * text.hidden_size * (1 if tie else 2)
        total, active = _mlp_parameters(text, intermediate_size)
        return cls(
            architecture=text.model_type,
            num_layers=text.num_hidden_layers,
            layer_types=layer_types,
            sliding_window=window if "sliding" in layer_types else None,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=text.hidden_size,
            intermediate_size=intermediate_size,
            vocab_size=text.vocab_size,
            max_position_embeddings=_context_length(text),
            softcap=getattr(text, "attn_logit_softcapping", None),
            tie_word_embeddings=tie,
            num_parameters=embeddings + text.num_hidden_layers * attention + total,
            num_active_parameters=embeddings + text.num_hidden_layers * attention + active,
            eos_token_ids=token_ids(getattr(text, "eos_token_id", None) or getattr(config, "eos_token_id", None)),
        )


def token_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """A configuration's token id, list of ids or nothing, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _context_length(text: Any) -> int:
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise UnsupportedModelError(
            f"the model {text.model_type} states no context length: add max_position_embeddings to its config.json",
            param="model",
        )
    return min(length, _fixed_rope_length(text) or length)


def _fixed_rope_length(text: Any) -> int | None:
    """Tokens up to which the rotary frequencies are the same for every batch; None where they always are.

    Dynamic and long rope switch frequencies by the longest sequence *in the batch*, which would let one request change
    another's answer, and keys that are cached already can't be turned again.
    """
    settings = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    switching = [rope for rope in nested if "dynamic" in (kind := str(rope.get("rope_type"))) or kind == "longrope"]
    if not switching:
        return None
    lengths = [rope.get("original_max_position_embeddings") for rope in switching]
    lengths.append(getattr(text, "original_max_position_embeddings", None))
    return min((length for length in lengths if length), default=None)


def _num_kv_heads(text: Any) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(text, name, None) is not None:
            return int(getattr(text, name))
    return int(text.num_attention_heads)


def _window(text: Any) -> int | None:
    if getattr(text, "use_sliding_window", None) is False:
        return None
    window = getattr(text, "sliding_window", None)
    # A window as long as the context hides nothing.
    return window if window and window < _context_length(text) else None


def _layer_types(text: Any, window: int | None) -> tuple[LayerType, ...]:
    """Without a list of types in the configuration (Mistral, Phi-3), a window applies to all layers."""
    listed: Sequence[str] | None = getattr(text, "layer_types", None)
    if listed is None:
        only: LayerType = "full" if window is None else "sliding"
        return tuple(only for _ in range(text.num_hidden_layers))
    kinds = listed[: text.num_hidden_layers]
    return tuple("sliding" if kind == "sliding_attention" and window is not None else "full" for kind in kinds)


def _mlp_parameters(text: Any, intermediate_size: int) -> tuple[int, int]:
    """(All, those one token uses) of the feed-forward layers: three matrices each, gate, up and down."""
    dense = 3 * text.hidden_size * intermediate_size
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    if not experts:
        return text.num_hidden_layers * dense, text.num_hidden_layers * dense
    expert = 3 * text.hidden_size * (_first(text, "moe_intermediate_size") or intermediate_size)
    shared_size = _first(text, "shared_expert_intermediate_size")
    shared = 3 * text.hidden_size * shared_size if shared_size else expert * _first(text, "n_shared_experts")
    router = text.hidden_size * experts
    num_dense = len(getattr(text, "mlp_only_layers", None) or ()) or _first(text, "first_k_dense_replace")
    num_sparse = text.num_hidden_layers - num_dense
    used = _first(text, "num_experts_per_tok", "num_experts_per_token") or 1
    total = num_dense * dense + num_sparse * (experts * expert + shared + router)
    return total, num_dense * dense + num_sparse * (used * expert + shared + router)


def _first(text: Any, *names: str) -> int:
    """The first of these settings that is given, else 0."""
    return next((int(getattr(text, name)) for name in names if getattr(text, name, None)), 0)


# --- what can't be paged ---------------------------------------------------------------------------------------------

_PAGEABLE_TYPES = frozenset({"full_attention", "sliding_attention"})
_RECURRENT = ("mamba_d_state", "ssm_state_size", "state_size", "lru_width", "linear_conv_kernel_dim", "conv_L_cache")
_OTHER_HEADS = (
    "global_head_dim",
    "swa_head_dim",
    "v_head_dim",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
    "swa_num_attention_heads",
    "num_attention_heads_per_layer",
)


def _listed_types(text: Any) -> set[str]:
    listed = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return {str(kind) for kind in listed}


def _is_recurrent(text: Any) -> bool:
    # Some configurations of plain decoders carry such settings of a relative; the list of layer types outranks them.
    types = _listed_types(text)
    if types:
        return bool(types - _PAGEABLE_TYPES - {"chunked_attention", "indexed_attention"})
    return any(getattr(text, name, None) for name in _RECURRENT) or text.model_type in {"rwkv", "xlstm", "jamba"}


def _other_heads(text: Any) -> str | None:
    """A setting that gives some layers, or values, heads unlike the rest."""
    own = [getattr(text, name, None) for name in ("head_dim", "num_key_value_heads", "num_attention_heads")]
    for name in _OTHER_HEADS:
        value = getattr(text, name, None)
        if value is not None and value not in own and (not _is_list(value) or len(set(value)) > 1):
            return name
    lists = (
        name for name in ("head_dim", "num_key_value_heads", "num_kv_heads") if _is_list(getattr(text, name, None))
    )
    return next(lists, None)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


_REFUSALS: tuple[tuple[Callable[[Any, Any], Any], str], ...] = (
    (lambda config, text: config.is_encoder_decoder, "it is an encoder-decoder, and only decoders are served"),
    (
        lambda config, text: getattr(text, "kv_lora_rank", None),
        "its latent attention keeps compressed keys and values (kv_lora_rank), not heads",
    ),
    (
        lambda config, text: "chunked_attention" in _listed_types(text),
        "its chunked attention is neither full nor sliding",
    ),
    (
        lambda config, text: _is_recurrent(text),
        "it has recurrent layers (state space, convolution or linear attention)",
    ),
    (
        lambda config, text: _listed_types(text) - _PAGEABLE_TYPES,
        "it has layers of an attention type that is neither full nor sliding",
    ),
    (lambda config, text: _other_heads(text), "its layers differ in number or size of heads"),
    (lambda config, text: getattr(text, "num_kv_shared_layers", None), "its layers share keys and values"),
    (
        lambda config, text: text.model_type == "gpt_oss" or getattr(text, "learnable_sink_init", None) is not None,
        "its attention sinks change every score",
    ),
    (
        lambda config, text: getattr(text, "alibi", False) or text.model_type in {"bloom", "mpt"},
        "its ALiBi positions change every score",
    ),
    (lambda config, text: getattr(text, "cross_attention_layers", None), "it has cross attention layers"),
    (
        lambda config, text: getattr(text, "use_bidirectional_attention", None) in (True, "all"),
        "its attention looks ahead (use_bidirectional_attention)",
    ),
    (
        lambda config, text: not isinstance(getattr(text, "num_attention_heads", None), int),
        "its configuration states no number of attention heads",
    ),
)
"""Ordered: the first that holds is the reason."""


def check_pageable(config: Any, text: Any) -> None:
    """Raise UnsupportedModelError with the reason unless the paged cache can hold the model; see docs/models.md."""
    for holds, reason in _REFUSALS:
        if holds(config, text):
            raise refusal(config.model_type, reason)


def refusal(model_type: str, reason: str) -> UnsupportedModelError:
    """The error for a model that can't be served for that ``reason``."""
    return UnsupportedModelError(
        f"the model type {model_type} can't be served from the paged cache: {reason}; "
        "docs/models.md lists the supported ones",
        param="model",
    )
