"""A Batch as the model takes it: tensors on the device, without waiting for the device.

Everything is computed in numpy on the host and copied once; nothing here grows with the context but block ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagedserve_engine.attention.interface import AttentionBackend, GroupInputs, PagedStep
from pagedserve_engine.batch import Batch, Int32Array
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.tensors import CacheTensors


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Prompt positions of one row whose next token is known and to be scored."""

    row: int
    first_logit: int
    """Where the row's logits begin among the step's."""
    next_ids: list[int]
    """The prompt token after each position."""
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model is called with; K logit rows."""

    token_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    logit_tokens: torch.Tensor
    """[K] query tokens whose logits are wanted: the S sampled rows first, then scored prompt positions."""
    num_sampled: int
    prompt_rows: tuple[PromptRow, ...]
    paged: PagedStep


class InputBuilder:
    """Builds a step's inputs for one cache on one device."""

    def __init__(
        self,
        layout: CacheLayout,
        cache: CacheTensors,
        attention: AttentionBackend,
        *,
        device: torch.device,
        num_layers: int,
    ) -> None:
        self._layout = layout
        self._cache = cache
        self._attention = attention
        self._device = device
        self._places = tuple(layout.place(layer) for layer in range(num_layers))

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._layout.block_size

    @property
    def num_groups(self) -> int:
        """Layer groups, each with a block table."""
        return len(self._layout.groups)

    def build(self, batch: Batch) -> StepInputs:
        """Inputs of ``batch``; the blocks that it begins are cleared."""
        if self._attention.reads_whole_blocks:
            begun = begun_blocks(batch, block_size=self._layout.block_size)
            if len(begun):
                self._cache.clear(self._copy(begun))
        starts = np.zeros(len(batch.query_lens) + 1, np.int64)
        np.cumsum(batch.query_lens, out=starts[1:])
        rows = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
        positions = np.arange(batch.num_tokens) - (starts[:-1] - batch.context_lens)[rows]
        sampled = (starts[1:] - 1)[batch.sampled]
        prompt_rows, scored = _score_prompts(batch, starts, first_logit=len(sampled))
        query_starts = self._copy(starts, np.int32)
        seq_lens = self._copy(batch.context_lens + batch.query_lens, np.int32)
        groups = tuple(
            self._attention.plan_group(
                GroupInputs(
                    block_table=table,
                    query_lens=batch.query_lens,
                    context_lens=batch.context_lens,
                    num_decodes=batch.num_decodes,
                    block_size=self._layout.block_size,
                    window=group.window,
                    device_table=self._copy(table, np.int32),
                    query_starts=query_starts,
                    seq_lens=seq_lens,
                    write_indices=self._copy(page_indices(table, rows, positions, block_size=self._layout.block_size)),
                )
            )
            for group, table in zip(self._layout.groups, batch.block_tables, strict=True)
        )
        return StepInputs(
            token_ids=self._copy(batch.token_ids).unsqueeze(0),
            positions=self._copy(positions).unsqueeze(0),
            logit_tokens=self._copy(np.concatenate([sampled, *scored])),
            num_sampled=len(sampled),
            prompt_rows=prompt_rows,
            paged=PagedStep(groups, self._places, keys=self._cache.keys, values=self._cache.values),
        )

    def _copy(self, array: npt.NDArray[np.integer], dtype: npt.DTypeLike = np.int64) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype))
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)


def page_indices(
    block_table: Int32Array, rows: npt.NDArray[np.integer], positions: npt.NDArray[np.integer], *, block_size: int
) -> npt.NDArray[np.int64]:
    """[T] flat page index (block · block_size + offset) of the tokens at ``positions`` [T] of ``rows`` [T]."""
    blocks: npt.NDArray[np.int64] = block_table[rows, positions // block_size].astype(np.int64)
    return blocks * block_size + positions % block_size


def begun_blocks(batch: Batch, *, block_size: int) -> Int32Array:
    """Ids of the blocks of which the step writes the first pages and not the last.

    They are the only ones in which a row meets what another sequence left: a row reads whole blocks.
    """
    ends = batch.context_lens + batch.query_lens
    last = (ends - 1) // block_size
    rows = np.flatnonzero((last * block_size >= batch.context_lens) & (ends % block_size > 0))
    return np.concatenate([table[rows, last[rows]] for table in batch.block_tables])


def _score_prompts(
    batch: Batch,
    starts: npt.NDArray[np.integer],
    *,
    first_logit: int,
) -> tuple[tuple[PromptRow, ...], list[npt.NDArray[np.integer]]]:
    """Which prompt positions are scored in this step. A decoding row has none: its next token is unknown."""
    rows: list[PromptRow] = []
    tokens: list[npt.NDArray[np.integer]] = []
    for row in range(batch.num_decodes, len(batch.requests)):
        request = batch.requests[row]
        if request.params.prompt_logprobs is None or request.output_ids:
            continue
        context = int(batch.context_lens[row])
        stop = min(context + int(batch.query_lens[row]), len(request.prompt_ids) - 1)
        if stop <= context:
            continue
        next_ids = list(request.prompt_ids[context + 1 : stop + 1])
        rows.append(PromptRow(row, first_logit, next_ids, request.params.prompt_logprobs))
        tokens.append(np.arange(starts[row], starts[row] + len(next_ids)))
        first_logit += len(next_ids)
    return tuple(rows), tokens
