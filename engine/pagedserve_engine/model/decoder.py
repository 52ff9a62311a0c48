"""One decoder for every family that has a recipe, in fused modules.

Queries, keys and values come from one product, gate and up from another; a sum and its norm are one operation, so are
rotation and the write to the cache. Logits, and all that follows attention in the last layer, are computed for the
wanted tokens only. Nothing here waits for the device or depends on data in its shapes: a whole forward pass can be
captured as a CUDA graph.

A decoder may be one rank's share of a model: it then holds its part of the heads, of the feed-forward layers and of
the vocabulary, and a ``Collective`` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from pagedserve_engine.attention.interface import LayerCall, PagedStep
from pagedserve_engine.model.ops import Ops, QuantizingOps
from pagedserve_engine.model.products import product
from pagedserve_engine.model.quantization import QuantizedLinear
from pagedserve_engine.model.recipes import Recipe
from pagedserve_engine.model.shards import Share


class Collective(Protocol):
    """How the ranks of one model put their parts together."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, which may be changed."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` side by side in its last dimension, in the order of ranks."""


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    """Logits [1, K, vocab], as a transformers model gives them."""

    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a forward pass share; T tokens."""

    positions: torch.Tensor
    paged: PagedStep
    wanted: torch.Tensor | None
    """[K] tokens whose logits are wanted; None: all."""


def _table(name: str) -> str:
    """The buffer of the rotary table ``name``."""
    return f"rotary_{name}"


class Linear(nn.Module):
    """A product with ``weight`` [out, in] that may hold its values in a wider dtype than activations have."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        return product(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A row of ``weight`` [tokens, hidden] for each token."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, hidden), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden], in the dtype of the weight."""
        return functional.embedding(token_ids, self.weight)


class Norm(nn.Module):
    """A root mean square norm over the last dimension."""

    def __init__(self, ops: Ops, recipe: Recipe, size: int) -> None:
        super().__init__()
        self._ops = ops
        self._quantizing = ops if isinstance(ops, QuantizingOps) else None
        self._eps, self._offset = recipe.norm_eps, recipe.norm_offset
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of ``x`` [T, size], or of ``residual`` after x was added to it in place."""
        return self._ops.add_rms_norm(x, residual, self.weight, self._eps, offset=self._offset)

    def into(self, linear: nn.Module, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """``linear`` of the norm."""
        if self._quantizing is None or not (isinstance(linear, QuantizedLinear) and linear.takes_rows):
            return linear(self(x, residual))  # type: ignore[no-any-return]
        return linear.of_rows(
            *self._quantizing.add_rms_norm_quantized(x, residual, self.weight, self._eps, offset=self._offset)
        )


class DecoderLayer(nn.Module):
    """One layer; works on a residual stream that it changes in place and on what is still to be added to it."""

    def __init__(self, recipe: Recipe, share: Share, ops: Ops, *, index: int, collective: Collective | None) -> None:
        super().__init__()
        self._recipe, self._ops, self._index, self._collective = recipe, ops, index, collective
        self._quantizing = ops if isinstance(ops, QuantizingOps) else None
        self._heads = share.num_heads
        hidden, head_dim = share.hidden_size, share.head_dim
        width = share.num_heads * head_dim
        self.qkv = Linear(hidden, width + 2 * share.num_kv_heads * head_dim, bias=recipe.qkv_bias)
        self.output = Linear(width, hidden, bias=recipe.output_bias)
        self.gate_up = Linear(hidden, 2 * share.intermediate_size, bias=recipe.mlp_bias)
        self.down = Linear(share.intermediate_size, hidden, bias=recipe.mlp_bias)
        self.attention_norm = Norm(ops, recipe, hidden)
        self.mlp_norm = Norm(ops, recipe, hidden)
        self.attention_output_norm = Norm(ops, recipe, hidden) if recipe.norms_outputs else None
        self.mlp_output_norm = Norm(ops, recipe, hidden) if recipe.norms_outputs else None
        self.query_norm = Norm(ops, recipe, head_dim) if recipe.norms_heads else None
        self.key_norm = Norm(ops, recipe, head_dim) if recipe.norms_heads else None

    def forward(
        self, x: torch.Tensor | None, residual: torch.Tensor, cos_sin: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """Attention's output [T, heads · d]; ``x``, if there is any yet, is added to ``residual`` [T, hidden]."""
        group_index, place = step.paged.places[self._index]
        group = step.paged.groups[group_index]
        keys, values = step.paged.keys[place], step.paged.values[place]
        query = self._ops.rope_and_write(
            self.attention_norm.into(self.qkv, *((residual, None) if x is None else (x, residual))),
            q_norm=None if self.query_norm is None else self.query_norm.weight,
            k_norm=None if self.key_norm is None else self.key_norm.weight,
            cos_sin=cos_sin,
            positions=step.positions,
            write_indices=group.write_indices,
            keys=keys,
            values=values,
            heads=self._heads,
            eps=self._recipe.norm_eps,
            offset=self._recipe.norm_offset,
        )
        call = LayerCall(query, keys, values, self._recipe.attention_scale, self._recipe.softcap)
        return group.attend(call).reshape(len(residual), -1)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What is still to be added to ``residual`` [K, hidden], after attention's part was."""
        x = self._contribution(self.output(attended), self.attention_output_norm)
        gate_up = self.mlp_norm.into(self.gate_up, x, residual)
        return self._contribution(self._down(gate_up), self.mlp_output_norm)

    def _down(self, gate_up: torch.Tensor) -> torch.Tensor:
        down: nn.Module = self.down
        if self._quantizing is None or not (isinstance(down, QuantizedLinear) and down.takes_rows):
            return down(self._ops.gated(gate_up, self._recipe.activation))  # type: ignore[no-any-return]
        return down.of_rows(*self._quantizing.gated_quantized(gate_up, self._recipe.activation))

    def _contribution(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        if self._collective is not None:
            x = self._collective.all_reduce(x)
        if norm is not None:
            x = norm(x)
        return x if self._recipe.residual_scale == 1.0 else x.mul_(self._recipe.residual_scale)


class FusedDecoder(nn.Module):
    """A causal language model that is called as transformers' own are; see the module's docstring.

    Parameters stand on the device under which it was built (``meta`` until weights are read).
    """

    def __init__(
        self,
        recipe: Recipe,
        share: Share,
        ops: Ops,
        *,
        dtype: torch.dtype,
        rotary: Mapping[str, torch.Tensor],
        collective: Collective | None = None,
    ) -> None:
        """``rotary``: by name, tables [positions, rotary_dim] as ``Ops.rope_and_write`` takes them."""
        super().__init__()
        self.config: Any = None
        """transformers' configuration, for those who ask; the loader sets it."""
        self.generation_config: Any = None
        """transformers' generation settings where the model has some; the loader sets them."""
        self.recipe, self.share, self.dtype = recipe, share, dtype
        self._collective = collective
        self._ops = ops
        scale = torch.tensor(recipe.embedding_scale, device="cpu")
        self._embedding_scale = float(scale.to(dtype)) if recipe.rounds_embedding_scale else recipe.embedding_scale
        self.embedding: nn.Module = Embedding(share.vocab_rows, share.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(recipe, share, ops, index=index, collective=collective) for index in range(share.num_layers)
        )
        self.norm = Norm(ops, recipe, share.hidden_size)
        self.head: nn.Module | None = None
        """The output layer; None where it is the embedding's table."""
        if not share.tied:
            self.head = Linear(share.hidden_size, share.vocab_rows, bias=False)
        for name, table in rotary.items():
            self.register_buffer(_table(name), table, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.norm.weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *,
        paged: PagedStep,
        logits_to_keep: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> DecoderOutput:
        """Logits of the tokens ``input_ids`` [1, T] or [T]; keys and values are written to the paged cache.

        ``logits_to_keep`` [K]: the tokens whose logits are wanted, all where None.
        """
        del use_cache
        step = Step(position_ids.reshape(-1), paged, logits_to_keep)
        residual = self._embed(input_ids.reshape(-1))
        x: torch.Tensor | None = None
        last = len(self.layers) - 1
        layers = cast("Iterable[DecoderLayer]", self.layers)
        for index, (layer, rotary) in enumerate(zip(layers, self.recipe.rotary_names, strict=True)):
            attended = layer(x, residual, self.get_buffer(_table(rotary)), step)
            if index == last and step.wanted is not None:
                attended, residual = attended.index_select(0, step.wanted), residual.index_select(0, step.wanted)
                if not len(residual):  # a prompt's chunk that is not its last
                    return DecoderOutput(residual.new_empty(1, 0, self.share.vocab_size))
            x = layer.finish(attended, residual)
        assert x is not None
        return DecoderOutput(self._logits(self.norm(x, residual)).unsqueeze(0))

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, hidden]; a rank finds the rows that it holds, and the ranks' sum is every token's."""
        if self._collective is None:
            rows: torch.Tensor = self.embedding(token_ids).to(self.dtype)
        else:
            local = token_ids - self.share.first_vocab_row
            elsewhere = (local < 0) | (local >= self.share.vocab_rows)
            rows = self.embedding(local.masked_fill(elsewhere, 0)).to(self.dtype)
            rows = self._collective.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0))
        return rows if self._embedding_scale == 1.0 else rows.mul_(self._embedding_scale)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[K, vocab]"""
        logits: torch.Tensor
        logits = product(x, self.embedding.weight, None) if self.head is None else self.head(x)  # type: ignore[arg-type]
        if self._collective is not None:
            logits = self._collective.all_gather(logits)[:, : self.share.vocab_size]
        if self.recipe.logits_divisor != 1.0:
            logits = logits / self.recipe.logits_divisor
        cap = self.recipe.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
