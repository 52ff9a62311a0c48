"""Attention on a CPU by compiled kernels that read the cache in place, through the block table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagedserve_engine.attention.interface import GroupInputs, LayerCall
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.native.library import CACHE_DTYPES, DTYPES, VARIANTS, AttentionCall, Library


@dataclass(frozen=True, slots=True)
class NativeGroupStep:
    """A layer group's part of a step for this backend; see ``GroupStep``."""

    write_indices: torch.Tensor
    library: Library
    call: AttentionCall
    """What all layers share."""
    held: tuple[torch.Tensor, ...]
    """The tensors that ``call`` points into."""
    variant: str | None

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Outputs [T, heads, head_dim] in the query's dtype. Raises ConfigError for dtypes and shapes unknown here."""
        query, shared = call.query, self.call
        if query.dtype not in DTYPES or call.keys.dtype not in CACHE_DTYPES or query.shape[2] % 8:
            raise ConfigError(
                f"ATTENTION native knows no heads of {query.shape[2]} {query.dtype} over a cache of {call.keys.dtype}: "
                "set it to reference",
                param="attention",
            )
        query = query if query.stride(2) == 1 else query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        shared.query, shared.out = query.data_ptr(), out.data_ptr()
        shared.keys, shared.values = call.keys.data_ptr(), call.values.data_ptr()
        shared.query_stride, shared.head_stride = query.stride(0), query.stride(1)
        shared.heads, shared.kv_heads, shared.head_dim = query.shape[1], call.keys.shape[2], query.shape[2]
        shared.dtype, shared.cache_dtype = DTYPES[query.dtype], CACHE_DTYPES[call.keys.dtype]
        shared.scaling, shared.softcap = call.scaling, call.softcap or 0.0
        shared.threads = torch.get_num_threads()
        shared.variant = VARIANTS[self.variant or self.library.choose(query.shape[2])]
        self.library.attend(shared)
        return out


class NativeBackend:
    """Attention by compiled kernels; ``variant`` names an instruction set, None chooses the widest."""

    name = "native"
    reads_whole_blocks = False
    plans_on_device = True

    def __init__(self, library: Library, variant: str | None = None) -> None:
        self._library = library
        self._variant = variant

    def plan_group(self, inputs: GroupInputs) -> NativeGroupStep:
        """Point at the step's tables: the kernels cut it into tasks themselves."""
        table = inputs.device_table
        call = AttentionCall(
            table=table.data_ptr(),
            query_starts=inputs.query_starts.data_ptr(),
            seq_lens=inputs.seq_lens.data_ptr(),
            table_stride=table.stride(0),
            rows=table.shape[0],
            block_size=inputs.block_size,
            window=inputs.window or 0,
        )
        held = (table, inputs.query_starts, inputs.seq_lens)
        return NativeGroupStep(inputs.write_indices, self._library, call, held, self._variant)
