"""A Batch as the model takes it: tensors on the device, without waiting for the device.

Everything is computed in numpy on the host and copied once; nothing here grows with the context but block ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pagedserve_engine.attention.interface import PagedStep
from pagedserve_engine.attention.reference import plan_group
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

    def __init__(self, layout: CacheLayout, cache: CacheTensors, *, device: torch.device, num_layers: int) -> None:
        self._layout = layout
        self._cache = cache
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
        begun = begun_blocks(batch, block_size=self._layout.block_size)
        if len(begun):
            self._cache.clear(self._copy(begun))
        stops = np.cumsum(batch.query_lens)
        starts = stops - batch.query_lens
        positions = np.arange(batch.num_tokens) - np.repeat(starts - batch.context_lens, batch.query_lens)
        sampled = (stops - 1)[batch.sampled]
        prompt_rows, scored = _score_prompts(batch, starts, first_logit=len(sampled))
        groups = tuple(
            plan_group(
                table,
                query_lens=batch.query_lens,
                context_lens=batch.context_lens,
                num_decodes=batch.num_decodes,
                block_size=self._layout.block_size,
                window=group.window,
                device=self._device,
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

    def _copy(self, array: npt.NDArray[np.integer]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int64))
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)


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
