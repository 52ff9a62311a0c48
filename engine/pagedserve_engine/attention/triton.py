"""Attention that reads the cache in place, on CUDA: the host's side of the Triton kernels.

A step's decoding rows are one launch, or two where their keys are split and put together again; its chunks are one
more. Nothing here waits for the device or looks at a length that only it knows, so that a step of decoding rows can be
captured once and replayed for any lengths: ``plan_decode`` plans one from tensors that stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedserve_engine.attention.interface import GroupInputs, LayerCall
from pagedserve_engine.attention.triton_kernels import decode_kernel, reduce_kernel
from pagedserve_engine.attention.triton_prefill import prefill_kernel
from pagedserve_engine.attention.triton_tiles import decode_tiles, num_splits, prefill_tiles
from pagedserve_engine.kernels.floats import loadable

_REDUCE_CHUNK = 16
"""Shares that the reduction loads at once."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the launches need to know of a device."""

    major: int
    """Compute capability's major number; 9 for the interpreter."""
    processors: int
    interpreted: bool
    """Triton's interpreter has no 16-bit products: they are done in float32."""


def describe_card(device: torch.device) -> Card:
    """The card of a CUDA device, or what stands for one in Triton's interpreter on the CPU."""
    if device.type != "cuda":
        return Card(major=9, processors=4, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.major, properties.multi_processor_count, interpreted=False)


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """The rows of one query: the first ``rows`` of the tokens."""

    rows: int
    table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The rows of several queries."""

    rows: int
    tokens: int
    """Their queries."""
    table: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class TritonGroupStep:
    """A layer group's part of a step for this backend; see ``GroupStep``."""

    write_indices: torch.Tensor
    decode: _DecodeRows | None
    chunks: _Chunks | None
    window: int | None
    card: Card
    splits: int | None
    """Programs that share a row's keys; None: as many as the batch and the card ask for."""

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Outputs [T, heads, head_dim] in the query's dtype; zeros for padded rows."""
        query = call.query if call.query.stride(-1) == 1 else call.query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.decode is not None:
            self._decode(self.decode, call, query, out)
        if self.chunks is not None:
            self._prefill(self.chunks, call, query, out)
        return out

    def _decode(self, part: _DecodeRows, call: LayerCall, query: torch.Tensor, out: torch.Tensor) -> None:
        shape = self._shape(call)
        heads, kv_heads, head_dim = query.shape[1], shape["KV_HEADS"], shape["HEAD_DIM"]
        tiles = decode_tiles(self.card.major, shape["D"], shape["GROUP"], query.element_size())
        splits = num_splits(part.rows, kv_heads, self.card.processors) if self.splits is None else self.splits
        shares = (part.rows, heads, splits) if splits > 1 else (0, 0, 0)
        partial = torch.empty((*shares, head_dim), dtype=torch.float32, device=query.device)
        log_totals = torch.empty(shares, dtype=torch.float32, device=query.device)
        window = self.window or 0
        decode_kernel[kv_heads, part.rows, splits](
            query,
            loadable(call.keys),
            loadable(call.values),
            part.table,
            part.seq_lens,
            out,
            partial,
            log_totals,
            call.scaling,
            call.softcap or 0.0,
            window,
            splits,
            query.stride(0),
            query.stride(1),
            part.table.stride(0),
            **shape,
            M=tiles.rows,
            N=tiles.keys,
            SPLIT=splits > 1,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )
        if splits > 1:
            reduce_kernel[part.rows, heads](
                partial,
                log_totals,
                part.seq_lens,
                out,
                window,
                splits,
                HEADS=heads,
                HEAD_DIM=head_dim,
                D=shape["D"],
                N=tiles.keys,
                CHUNK=_REDUCE_CHUNK,
                WINDOWED=self.window is not None,
                enable_fp_fusion=True,
            )

    def _prefill(self, part: _Chunks, call: LayerCall, query: torch.Tensor, out: torch.Tensor) -> None:
        shape = self._shape(call)
        tiles = prefill_tiles(self.card.major, shape["D"], shape["GROUP"], query.element_size())
        # As many as any row lengths with this sum may need; those left over leave at once.
        query_tiles = part.tokens // (tiles.rows // shape["GROUP"]) + part.rows
        prefill_kernel[query_tiles, shape["KV_HEADS"]](
            query,
            loadable(call.keys),
            loadable(call.values),
            part.table,
            part.query_starts,
            part.seq_lens,
            out,
            call.scaling,
            call.softcap or 0.0,
            self.window or 0,
            part.rows,
            query.stride(0),
            query.stride(1),
            part.table.stride(0),
            **shape,
            M=tiles.rows,
            N=tiles.keys,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            enable_fp_fusion=True,
        )

    def _shape(self, call: LayerCall) -> dict[str, int]:
        """What both kernels are compiled for."""
        head_dim, kv_heads = call.query.shape[2], call.keys.shape[2]
        return {
            "GROUP": call.query.shape[1] // kv_heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": call.keys.shape[1],
            "D": max(16, 1 << (head_dim - 1).bit_length()),
            "WINDOWED": self.window is not None,
            "CAPPED": call.softcap is not None,
            "FLOAT32_DOT": self.card.interpreted or call.query.dtype is torch.float32,
        }


class TritonBackend:
    """The Triton kernels on one device; ``splits`` pins how many programs share a row's keys (for tests)."""

    name = "triton"
    plans_on_device = True
    reads_whole_blocks = False

    def __init__(self, device: torch.device | str, *, splits: int | None = None) -> None:
        self._card = describe_card(torch.device(device))
        self._splits = splits

    def plan_group(self, inputs: GroupInputs) -> TritonGroupStep:
        """Divide the rows into those of one query and chunks; copies nothing."""
        decodes, rows = inputs.num_decodes, len(inputs.query_lens)
        decode, chunks = None, None
        if decodes:
            decode = _DecodeRows(decodes, inputs.device_table, inputs.seq_lens)
        if rows > decodes:
            chunks = _Chunks(
                rows=rows - decodes,
                tokens=int(inputs.query_lens[decodes:].sum()),
                table=inputs.device_table[decodes:],
                query_starts=inputs.query_starts[decodes:],
                seq_lens=inputs.seq_lens[decodes:],
            )
        return TritonGroupStep(inputs.write_indices, decode, chunks, inputs.window, self._card, self._splits)

    def plan_decode(
        self,
        device_table: torch.Tensor,
        seq_lens: torch.Tensor,
        write_indices: torch.Tensor,
        *,
        window: int | None,
        block_size: int,
    ) -> TritonGroupStep:
        """A step of B rows of one query, known by tensors alone: block table [B, columns], lengths [B] (int32; 0: a
        padded row, whose output is zeros), write indices [B] int64. May be captured; the tensors' contents may change.
        """
        del block_size  # the cache tensors have it
        decode = _DecodeRows(len(seq_lens), device_table, seq_lens)
        return TritonGroupStep(write_indices, decode, None, window, self._card, self._splits)
