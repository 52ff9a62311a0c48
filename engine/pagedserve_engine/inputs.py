"""A Batch as the model takes it: tensors on the device, without waiting for the device.

Everything is computed in numpy on the host and copied at once; nothing here grows with the context but block ids. The
inputs of a step of decoding rows depend on the number of rows alone in where they lie, block tables included, so that
a graph that was captured over them can be filled and replayed: pad the rows to a captured number, build, replay.

They belong to the step from ``build`` until the next one is built; the device, which runs its steps in order, is done
with them before they change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pagedserve_engine.attention.interface import AttentionBackend, GroupInputs, PagedStep
from pagedserve_engine.batch import Batch, Int32Array
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.tensors import CacheTensors
from pagedserve_engine.staging import Staging

_Number = TypeVar("_Number", bound=np.generic)

CARRIED = -1
"""Stands on the device for a token id that a step in flight samples, until it is carried over."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a batch's T query tokens stand."""

    starts: npt.NDArray[np.int64]
    """[R + 1] each row's first token among the T, and T."""
    rows: npt.NDArray[np.int64]
    """[T]"""
    positions: npt.NDArray[np.int64]
    """[T]"""
    sampled: npt.NDArray[np.int64]
    """[S] the last tokens of the sampled rows."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        starts = np.zeros(len(batch.query_lens) + 1, np.int64)
        np.cumsum(batch.query_lens, out=starts[1:])
        rows = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
        positions = np.arange(batch.num_tokens) - (starts[:-1] - batch.context_lens)[rows]
        return cls(starts, rows, positions, sampled=(starts[1:] - 1)[batch.sampled])


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Prompt positions of one row whose next token is known and to be scored."""

    row: int
    first_logit: int
    """Where the row's logits begin among the step's."""
    next_ids: list[int]
    """The prompt token after each position."""
    targets: torch.Tensor
    """The same on the device: [positions] int64."""
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model is called with; T query tokens, K logit rows of which the first S are sampled, D decoding rows."""

    token_ids: torch.Tensor
    """[1, T] int64; CARRIED where ``carry_over`` puts the token in."""
    positions: torch.Tensor
    """[1, T] int64."""
    logit_tokens: torch.Tensor
    """[K] int64: query tokens whose logits are wanted: the S sampled rows first, then scored prompt positions."""
    sampled_slots: torch.Tensor
    """[S] int64: the sampled rows' slots, the D decoding rows first."""
    num_sampled: int
    num_decodes: int
    carries: bool
    """Whether any token is carried over."""
    prompt_rows: tuple[PromptRow, ...]
    paged: PagedStep

    def carry_over(self, last_tokens: torch.Tensor) -> None:
        """Put the latest tokens, ``last_tokens`` [slots] int64, where a token is CARRIED."""
        tokens = self.token_ids[0, : self.num_decodes]
        latest = last_tokens.index_select(0, self.sampled_slots[: self.num_decodes])
        torch.where(tokens == CARRIED, latest, tokens, out=tokens)


class InputBuilder:
    """Builds a step's inputs for one cache on one device."""

    def __init__(
        self,
        layout: CacheLayout,
        cache: CacheTensors,
        attention: AttentionBackend,
        staging: Staging,
        *,
        num_layers: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._layout = layout
        self._cache = cache
        self.attention = attention
        self._staging = staging
        self._places = tuple(layout.place(layer) for layer in range(num_layers))
        columns = layout.max_blocks_per_sequence(max_model_len)
        self._tables = torch.zeros(len(layout.groups), max_num_seqs, columns, dtype=torch.int32, device=staging.device)
        """[G, max_num_seqs, columns] the step's block tables; what lies beyond its rows and columns is stale."""
        self.padding_slot = max_num_seqs
        """Where the tokens of padding rows go."""

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self._staging.device

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._layout.block_size

    @property
    def num_groups(self) -> int:
        """Layer groups, each with a block table."""
        return len(self._layout.groups)

    def build(self, batch: Batch, *, num_rows: int | None = None) -> StepInputs:
        """Inputs of ``batch``; the blocks that it begins are cleared.

        A step of decoding rows alone may be padded to ``num_rows``, with rows that see nothing and write to the null
        block.
        """
        seq_lens = batch.context_lens + batch.query_lens
        if num_rows is not None:
            seq_lens = _extend(seq_lens, num_rows, 0)
            batch = pad(batch, num_rows, slot=self.padding_slot)
        staging, places = self._staging, _Places.of(batch)
        prompts, scored = _find_prompts(batch, places.starts)
        staging.begin()
        # In the order of addresses: what has the same shape in every step of so many decoding rows comes first.
        token_ids, positions = staging.put(_token_ids(batch)), staging.put(places.positions)
        sampled_slots = staging.put(batch.slots[batch.sampled].astype(np.int64))
        logit_tokens = staging.put(np.concatenate([places.sampled, *scored]))
        counts = staging.put(places.starts.astype(np.int32)), staging.put(seq_lens)
        writes = [
            staging.put(page_indices(table, places.rows, places.positions, block_size=self.block_size))
            for table in batch.block_tables
        ]
        tables = staging.put(np.stack(batch.block_tables))
        prompt_rows = self._put_prompts(batch, prompts, first_logit=len(places.sampled))
        begun = begun_blocks(batch, block_size=self.block_size) if self.attention.reads_whole_blocks else ()
        begun_ids = staging.put(np.asarray(begun, np.int64))
        staging.flush()
        if len(begun):
            self._cache.clear(begun_ids)
        paged = self._plan(batch, self._place_tables(tables), counts=counts, writes=writes)
        return StepInputs(
            token_ids=token_ids.unsqueeze(0),
            positions=positions.unsqueeze(0),
            logit_tokens=logit_tokens,
            sampled_slots=sampled_slots,
            num_sampled=len(places.sampled),
            num_decodes=batch.num_decodes,
            carries=bool(batch.carried.any()),
            prompt_rows=prompt_rows,
            paged=paged,
        )

    def put(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """``array`` on the device, beside the inputs built last."""
        tensor = self._staging.put(array)
        self._staging.flush()
        return tensor

    def _place_tables(self, tables: torch.Tensor) -> torch.Tensor:
        """[G, R, columns] the step's block tables where every step has them."""
        num_rows, columns = tables.shape[1:]
        if num_rows > self._tables.shape[1] or columns > self._tables.shape[2]:
            # Only warming up asks for more than a sequence may have.
            return tables
        placed = self._tables[:, :num_rows, :columns]
        placed.copy_(tables)
        return placed

    def _plan(
        self,
        batch: Batch,
        tables: torch.Tensor,
        *,
        counts: tuple[torch.Tensor, torch.Tensor],
        writes: list[torch.Tensor],
    ) -> PagedStep:
        query_starts, seq_lens = counts
        groups = tuple(
            self.attention.plan_group(
                GroupInputs(
                    block_table=batch.block_tables[group.index],
                    query_lens=batch.query_lens,
                    context_lens=batch.context_lens,
                    num_decodes=batch.num_decodes,
                    block_size=self.block_size,
                    window=group.window,
                    device_table=tables[group.index],
                    query_starts=query_starts,
                    seq_lens=seq_lens,
                    write_indices=writes[group.index],
                )
            )
            for group in self._layout.groups
        )
        return PagedStep(groups, self._places, keys=self._cache.keys, values=self._cache.values)

    def _put_prompts(self, batch: Batch, prompts: dict[int, list[int]], *, first_logit: int) -> tuple[PromptRow, ...]:
        rows: list[PromptRow] = []
        for row, next_ids in prompts.items():
            num_top = batch.requests[row].params.prompt_logprobs or 0
            targets = self._staging.put(np.array(next_ids, np.int64))
            rows.append(PromptRow(row, first_logit, next_ids, targets, num_top))
            first_logit += len(next_ids)
        return tuple(rows)


def staging_bytes(layout: CacheLayout, *, max_num_seqs: int, max_batch_tokens: int, max_model_len: int) -> int:
    """Bytes of the largest step's inputs, with as much again as sampling mostly puts beside them."""
    groups, columns = len(layout.groups), layout.max_blocks_per_sequence(max_model_len)
    by_token = 8 * (3 + groups)
    by_row = 8 * 8 + 4 * groups * columns
    return by_token * max_batch_tokens + by_row * max_num_seqs + (64 << 10)


def pad(batch: Batch, num_rows: int, *, slot: int) -> Batch:
    """``batch``, of decoding rows alone, with rows of one token on the null block up to ``num_rows``."""
    assert batch.num_decodes == len(batch.query_lens) <= num_rows, "only steps of decoding rows are padded"
    return dataclasses.replace(
        batch,
        slots=_extend(batch.slots, num_rows, slot),
        stays=_extend(batch.stays, num_rows, 0),
        query_lens=_extend(batch.query_lens, num_rows, 1),
        context_lens=_extend(batch.context_lens, num_rows, 0),
        token_ids=_extend(batch.token_ids, num_rows, 0),
        carried=_extend(batch.carried, num_rows, False),
        sampled=_extend(batch.sampled, num_rows, True),
        block_tables=tuple(
            np.concatenate([table, np.zeros((num_rows - len(table), table.shape[1]), np.int32)])
            for table in batch.block_tables
        ),
        num_decodes=num_rows,
    )


def _extend(values: npt.NDArray[_Number], size: int, filling: int) -> npt.NDArray[_Number]:
    return np.concatenate([values, np.full(size - len(values), filling, values.dtype)])


def _token_ids(batch: Batch) -> npt.NDArray[np.int64]:
    """[T] the query tokens, CARRIED for those that only the device has."""
    token_ids = batch.token_ids.astype(np.int64)
    token_ids[: batch.num_decodes][batch.carried[: batch.num_decodes]] = CARRIED
    return token_ids


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


def _find_prompts(
    batch: Batch, starts: npt.NDArray[np.integer]
) -> tuple[dict[int, list[int]], list[npt.NDArray[np.integer]]]:
    """By row, the known next tokens of the prompt positions scored in this step, and where these stand.

    A decoding row has none: its next token is unknown.
    """
    next_ids: dict[int, list[int]] = {}
    tokens: list[npt.NDArray[np.integer]] = []
    for row in range(batch.num_decodes, len(batch.requests)):
        request = batch.requests[row]
        if request.params.prompt_logprobs is None or request.output_ids:
            continue
        context = int(batch.context_lens[row])
        stop = min(context + int(batch.query_lens[row]), len(request.prompt_ids) - 1)
        if stop > context:
            next_ids[row] = list(request.prompt_ids[context + 1 : stop + 1])
            tokens.append(np.arange(starts[row], starts[row] + stop - context))
    return next_ids, tokens
