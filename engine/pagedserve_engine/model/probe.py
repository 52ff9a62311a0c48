"""One pass of two tokens through the loaded model shows what its layers ask of attention.

A configuration tells what a model should do, the probe what it does: each layer calls attention once, with the heads,
the window and the softcap that the cache was laid out for, takes positions as given and hands our metadata through. So
a family that nobody tested is served or refused, not served wrongly.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from pagedserve_engine.model.spec import ModelSpec, refusal

_PROBE = "pagedserve_probe"


class _Recorder:
    """Stands in for attention and remembers how each layer called it."""

    def __init__(self) -> None:
        self.calls: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Zeros in the place of outputs [batch, tokens, heads, head_dim]."""
        layer = getattr(module, "layer_idx", None)
        call = {
            "heads": (query.shape[1], key.shape[1], value.shape[1]),
            "sizes": (query.shape[3], key.shape[3], value.shape[3]),
            "tokens": key.shape[2],
            "window": kwargs.get("sliding_window"),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux") is not None,
            "mask": attention_mask is not None,
            # Equal tokens at equal positions must look the same, or the model counts positions by itself.
            "placed": _both_equal(query) and _both_equal(key),
            "causal": kwargs.get("is_causal") is not False and getattr(module, "is_causal", True) is not False,
            "handed": kwargs.get("paged") is self,
        }
        self.calls[-1 if layer is None else layer].append(call)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _both_equal(heads: torch.Tensor) -> bool:
    """Whether the two tokens of [1, heads, 2, head_dim] are the same but for rounding."""
    first, second = heads.float().unbind(2)
    return bool((first - second).abs().max() <= 1e-2 * heads.abs().max())


def probe(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Raise UnsupportedModelError unless every layer calls attention as ``spec`` says; ends in the former attention."""
    recorder = _Recorder()
    attention = model.config._attn_implementation
    AttentionInterface.register(_PROBE, recorder)
    model.set_attn_implementation(_PROBE)
    # The first tokens are often padding, whose embedding is zero and shows nothing.
    ids = torch.full((1, 2), spec.vocab_size // 2, dtype=torch.long, device=model.device)
    positions = torch.full_like(ids, 3)
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=positions, use_cache=False, paged=recorder)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise refusal(spec.architecture, f"its forward pass fails behind our attention ({error})") from error
    finally:
        model.set_attn_implementation(attention)
    complaint = _complaint(recorder.calls, spec)
    if complaint:
        raise refusal(spec.architecture, complaint)


def _complaint(calls: dict[int, list[dict[str, Any]]], spec: ModelSpec) -> str | None:
    if not calls:
        return "its attention does not go through transformers' attention interface"
    if sorted(calls) != list(range(spec.num_layers)):
        return f"layers {sorted(calls)} call attention, where its configuration has {spec.num_layers} layers"
    for layer, kind in enumerate(spec.layer_types):
        reason = _layer_complaint(calls[layer], spec, spec.sliding_window if kind == "sliding" else None)
        if reason:
            return f"layer {layer} {reason}"
    return None


def _layer_complaint(calls: list[dict[str, Any]], spec: ModelSpec, window: int | None) -> str | None:
    call = calls[0]
    asked = call["window"] if call["window"] and call["window"] < spec.max_position_embeddings else None
    checks = (
        (len(calls) == 1, f"calls attention {len(calls)} times"),
        (call["heads"] == (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), f"has heads {call['heads']}"),
        (call["sizes"] == (spec.head_dim,) * 3, f"has heads of sizes {call['sizes']}"),
        (call["tokens"] == 2, f"attends to {call['tokens']} tokens where 2 were given"),
        (asked == window, f"asks for a window of {asked} tokens, its configuration for {window}"),
        (call["softcap"] == spec.softcap, f"caps scores at {call['softcap']}, its configuration at {spec.softcap}"),
        (not call["sinks"], "has attention sinks"),
        (not call["mask"], "brings a mask of its own"),
        (call["placed"], "does not take the positions that it is given"),
        (call["causal"], "is not causal"),
        (call["handed"], "does not pass keyword arguments on to attention"),
    )
    return next((reason for holds, reason in checks if not holds), None)
