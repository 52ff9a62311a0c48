"""The shape in a model's config.json, read as the engine reads it; a golden table of shapes holds the two together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pagedserve_operator.errors import ModelShapeUnknown
from pagedserve_operator.shapes.model import FROM_CONFIG, ModelShape
from pagedserve_operator.spec import Json

_MOST_LAYERS: Final = 4096
"""Beyond any model; the list of a shape's layers must not take the operator's memory."""
_TIED_BY_DEFAULT: Final = re.compile(r"gemma|cohere|starcoder2|gpt2|opt|falcon$")
"""Model types whose configuration leaves ``tie_word_embeddings`` out and means true."""
_SLIDING_PATTERNS: Final = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
"""By model type: every so many-th layer is full where the configuration lists no layer types."""
_DEFAULTS: Final[Mapping[str, Json]] = {
    "gemma2": {"sliding_window": 4096, "head_dim": 256},
    "gemma3_text": {
        "sliding_window": 4096,
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    "cohere2": {"sliding_window": 4096},
}
"""What configurations of these types often leave to their class."""


def from_config(config: Json) -> ModelShape:
    """The shape of a model's config.json (its text part); raises ModelShapeUnknown naming what is missing."""
    text = _text_part(config)
    try:
        return _read_config(text)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ModelShapeUnknown(
            f"spec.model.uri: its config.json doesn't tell the model's shape ({_complaint(error)}); "
            "state it in spec.model.architecture"
        ) from error


def _complaint(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _text_part(config: Json) -> Json:
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else config
    return {**_DEFAULTS.get(str(text.get("model_type")), {}), **text}


def _read_config(text: Json) -> ModelShape:
    hidden, layers, heads = (_count(text, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if layers > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}")
    vocab, length = _count(text, "vocab_size"), _context_length(text)
    kv_heads = _kv_heads(text, heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    intermediate = int(text.get("intermediate_size") or 4 * hidden)
    window = _window(text, length)
    layer_types = _layer_types(text, layers, window)
    tied = text.get("tie_word_embeddings")
    if tied is None:
        tied = _TIED_BY_DEFAULT.match(str(text.get("model_type"))) is not None
    embeddings = vocab * hidden * (1 if tied else 2)
    shared = embeddings + layers * hidden * head_dim * 2 * (heads + kv_heads)
    total, active, experts = _mlp_parameters(text, hidden, layers, intermediate)
    return ModelShape(
        layer_types=layer_types,
        sliding_window=window if "sliding" in layer_types else None,
        kv_heads=kv_heads,
        head_dim=_positive(head_dim, "head_dim"),
        hidden_size=hidden,
        intermediate_size=_positive(intermediate, "intermediate_size"),
        vocab_size=vocab,
        parameters=shared + total,
        active_parameters=shared + active,
        wide_parameters=embeddings + experts,
        max_position_embeddings=length,
        source=FROM_CONFIG,
    )


def _count(text: Json, key: str) -> int:
    return _positive(text[key], key)


def _positive(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
        raise ValueError(f"{key} is {value!r}")
    return value


def _context_length(text: Json) -> int:
    """Rope that switches its frequencies by length is served up to its first length only."""
    length = _count(text, "max_position_embeddings")
    settings = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested = [value for value in settings.values() if isinstance(value, Mapping)] or [settings]
    kinds = [str(rope.get("rope_type") or rope.get("type")) for rope in nested]
    if not any("dynamic" in kind or kind in ("longrope", "su") for kind in kinds):
        return length
    lengths = [rope.get("original_max_position_embeddings") for rope in nested]
    lengths.append(text.get("original_max_position_embeddings"))
    return min([length, *(_positive(first, "original_max_position_embeddings") for first in lengths if first)])


def _kv_heads(text: Json, heads: int) -> int:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    given = next((text[key] for key in ("num_key_value_heads", "num_kv_heads") if text.get(key) is not None), heads)
    return _positive(given, "num_key_value_heads")


def _window(text: Json, length: int) -> int | None:
    model_type = str(text.get("model_type"))
    # These apply a window only where they say so.
    if text.get("use_sliding_window", not model_type.startswith("qwen")) is False:
        return None
    window = text.get("sliding_window")
    return _positive(window, "sliding_window") if window and window < length else None


def _layer_types(text: Json, layers: int, window: int | None) -> tuple[str, ...]:
    listed: Sequence[str] | None = text.get("layer_types")
    if window is None:
        return ("full",) * layers
    if listed is not None:
        types = tuple("sliding" if kind == "sliding_attention" else "full" for kind in listed[:layers])
        return types if len(types) == layers else _mismatch(layers, len(types))
    pattern = text.get("sliding_window_pattern") or _SLIDING_PATTERNS.get(str(text.get("model_type")))
    if pattern:
        return tuple("full" if (layer + 1) % pattern == 0 else "sliding" for layer in range(layers))
    first = int(text.get("max_window_layers") or 0) if "use_sliding_window" in text else 0
    return tuple("sliding" if layer >= first else "full" for layer in range(layers))


def _mismatch(layers: int, listed: int) -> tuple[str, ...]:
    raise ValueError(f"num_hidden_layers is {layers} and layer_types lists {listed}")


def _mlp_parameters(text: Json, hidden: int, layers: int, intermediate: int) -> tuple[int, int, int]:
    """(All, those one token uses, those of routed experts) of the feed-forward layers: gate, up and down each."""
    dense = 3 * hidden * intermediate
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    if not experts:
        return layers * dense, layers * dense, 0
    expert = 3 * hidden * (_first(text, "moe_intermediate_size") or intermediate)
    shared_size = _first(text, "shared_expert_intermediate_size")
    shared = 3 * hidden * shared_size if shared_size else expert * _first(text, "n_shared_experts")
    router = hidden * experts
    num_dense = len(text.get("mlp_only_layers") or ()) or _first(text, "first_k_dense_replace")
    used = _first(text, "num_experts_per_tok", "num_experts_per_token") or 1
    num_sparse = max(0, layers - num_dense)
    total = num_dense * dense + num_sparse * (experts * expert + shared + router)
    used_at_once = num_dense * dense + num_sparse * (used * expert + shared + router)
    return total, used_at_once, num_sparse * (experts * expert + router)


def _first(text: Json, *keys: str) -> int:
    """The first of these settings that is given, else 0."""
    return next((_positive(text[key], key) for key in keys if text.get(key)), 0)
