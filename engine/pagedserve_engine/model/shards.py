"""What one rank of a tensor-parallel model holds, and which part of each checkpoint tensor that is.

Attention is split by heads (key and value heads are repeated where there are fewer of them than ranks), feed-forward
layers by their inner width, embedding and output layer by vocabulary rows. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pagedserve_engine.errors import ConfigError
from pagedserve_engine.model.recipes import Recipe
from pagedserve_engine.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's shape; counts of heads, inner width and vocabulary rows are its own."""

    rank: int
    world: int
    num_layers: int
    hidden_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    first_kv_head: int
    intermediate_size: int
    vocab_size: int
    """Of the whole model."""
    vocab_rows: int
    tied: bool
    """Whether the output layer is the embedding."""

    @classmethod
    def of(cls, spec: ModelSpec, rank: int = 0, world: int = 1) -> Self:
        """The part of ``rank``; raises ConfigError where ``world`` ranks can't share the model evenly."""
        unsplit = _unsplit(spec, world)
        if unsplit is not None:
            sizes = [size for size in range(1, spec.num_heads + 1) if _unsplit(spec, size) is None]
            raise ConfigError(
                f"TENSOR_PARALLEL_SIZE is {world}: the model's {unsplit} can't be split evenly; sizes that work are "
                f"{', '.join(map(str, sizes))}",
                param="tensor_parallel_size",
            )
        return cls(
            rank=rank,
            world=world,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            head_dim=spec.head_dim,
            num_heads=spec.num_heads // world,
            num_kv_heads=max(1, spec.num_kv_heads // world),
            first_kv_head=rank * spec.num_kv_heads // world,
            intermediate_size=spec.intermediate_size // world,
            vocab_size=spec.vocab_size,
            vocab_rows=-(-spec.vocab_size // world),
            tied=spec.tie_word_embeddings,
        )

    @property
    def first_vocab_row(self) -> int:
        """The first token whose rows this rank holds."""
        return self.rank * self.vocab_rows


def _unsplit(spec: ModelSpec, world: int) -> str | None:
    """What ``world`` ranks can't share evenly; None where they can share all."""
    if spec.num_heads % world:
        return f"{spec.num_heads} attention heads"
    if spec.num_kv_heads % world and world % spec.num_kv_heads:
        return f"{spec.num_kv_heads} key and value heads"
    if spec.intermediate_size % world:
        return f"feed-forward width of {spec.intermediate_size}"
    return None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a checkpoint tensor and where it goes: rows from ``row`` on of the parameter ``target``."""

    target: str
    row: int
    rows: tuple[int, int]
    """The part's first row in the checkpoint's tensor, and the one after its last."""
    columns: tuple[int, int] | None
    """Likewise for columns; None takes all."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor of a checkpoint: its shape there, and the pieces of it that this rank takes."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def plan_tensors(recipe: Recipe, share: Share, spec: ModelSpec) -> dict[str, TensorPlan]:
    """By its name in a checkpoint, less the prefix of the decoder: every tensor that the model has."""
    return dict(_tensors(recipe, share, spec))


_Named = Iterator[tuple[str, TensorPlan]]


def _tensors(recipe: Recipe, share: Share, spec: ModelSpec) -> _Named:
    first = share.first_vocab_row
    rows = (min(first, spec.vocab_size), min(first + share.vocab_rows, spec.vocab_size))
    vocabulary = (spec.vocab_size, spec.hidden_size)
    yield "embed_tokens.weight", TensorPlan(vocabulary, (Piece("embedding.weight", 0, rows, None),))
    if not share.tied:
        yield "lm_head.weight", TensorPlan(vocabulary, (Piece("head.weight", 0, rows, None),))
    yield "norm.weight", _whole("norm.weight", spec.hidden_size)
    for index in range(spec.num_layers):
        here = f"layers.{index}"
        for name, plan in (*_attention(here, recipe, share, spec), *_mlp(here, recipe, share, spec)):
            yield f"{here}.{name}", plan
        for name, target in _norms(recipe):
            size = spec.head_dim if target in ("query_norm", "key_norm") else spec.hidden_size
            yield f"{here}.{name}.weight", _whole(f"{here}.{target}.weight", size)


def _whole(target: str, size: int) -> TensorPlan:
    return TensorPlan((size,), (Piece(target, 0, (0, size), None),))


def _norms(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "input_layernorm", "attention_norm"
    if recipe.norms_outputs:
        yield "post_attention_layernorm", "attention_output_norm"
        yield "pre_feedforward_layernorm", "mlp_norm"
        yield "post_feedforward_layernorm", "mlp_output_norm"
    else:
        yield "post_attention_layernorm", "mlp_norm"
    if recipe.norms_heads:
        yield "self_attn.q_norm", "query_norm"
        yield "self_attn.k_norm", "key_norm"


def _attention(here: str, recipe: Recipe, share: Share, spec: ModelSpec) -> _Named:
    size = spec.head_dim
    first_head, first_kv = share.rank * share.num_heads, share.first_kv_head
    parts = (
        ("q_proj", spec.num_heads, first_head, share.num_heads),
        ("k_proj", spec.num_kv_heads, first_kv, share.num_kv_heads),
        ("v_proj", spec.num_kv_heads, first_kv, share.num_kv_heads),
    )
    stacked = [(name, heads * size, first * size, own * size) for name, heads, first, own in parts]
    yield from _stacked(f"{here}.qkv", stacked, spec.hidden_size, bias=recipe.qkv_bias, fused=_fused(recipe, "qkv"))
    width = share.num_heads * size
    columns = (share.rank * width, (share.rank + 1) * width)
    yield from _split_by_columns(f"{here}.output", "self_attn.o_proj", share, spec.num_heads * size, columns)
    if recipe.output_bias:
        yield "self_attn.o_proj.bias", _summed_bias(f"{here}.output.bias", share)


def _mlp(here: str, recipe: Recipe, share: Share, spec: ModelSpec) -> _Named:
    whole, own = spec.intermediate_size, share.intermediate_size
    stacked = [(name, whole, share.rank * own, own) for name in ("gate_proj", "up_proj")]
    yield from _stacked(
        f"{here}.gate_up", stacked, spec.hidden_size, bias=recipe.mlp_bias, fused=_fused(recipe, "gate_up")
    )
    columns = (share.rank * own, (share.rank + 1) * own)
    yield from _split_by_columns(f"{here}.down", "mlp.down_proj", share, whole, columns)
    if recipe.mlp_bias:
        yield "mlp.down_proj.bias", _summed_bias(f"{here}.down.bias", share)


def _fused(recipe: Recipe, target: str) -> str | None:
    return f"{target}_proj" if recipe.rows_fused else None


def _stacked(
    target: str, parts: list[tuple[str, int, int, int]], width: int, *, bias: bool, fused: str | None
) -> _Named:
    """Tensors (name, rows, first own row, own rows) that stand one below the other in ``target``.

    In a checkpoint they are tensors of their own, or stand together as ``fused``.
    """
    block = "self_attn" if target.endswith("qkv") else "mlp"
    kinds = ("weight", "bias") if bias else ("weight",)
    for kind in kinds:
        together: list[Piece] = []
        row = start = 0
        for name, rows, first, own in parts:
            begin = (start if fused else 0) + first
            piece = Piece(f"{target}.{kind}", row, (begin, begin + own), None)
            together.append(piece)
            if not fused:
                yield f"{block}.{name}.{kind}", TensorPlan((rows, width) if kind == "weight" else (rows,), (piece,))
            row, start = row + own, start + rows
        if fused:
            yield f"{block}.{fused}.{kind}", TensorPlan((start, width) if kind == "weight" else (start,), (*together,))


def _split_by_columns(target: str, name: str, share: Share, width: int, columns: tuple[int, int]) -> _Named:
    piece = Piece(f"{target}.weight", 0, (0, share.hidden_size), None if share.world == 1 else columns)
    yield f"{name}.weight", TensorPlan((share.hidden_size, width), (piece,))


def _summed_bias(target: str, share: Share) -> TensorPlan:
    """The ranks' outputs are summed, so that one rank alone has the bias and the others zeros."""
    pieces = (Piece(target, 0, (0, share.hidden_size), None),) if share.rank == 0 else ()
    return TensorPlan((share.hidden_size,), pieces)
