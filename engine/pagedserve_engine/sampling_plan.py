"""From the table of slots to a step's tensors: the parts that stay the same while the same requests are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedserve_engine.sampling import Entries, LogprobRows, Penalties, Randomness, SamplingTensors
from pagedserve_engine.sampling_filters import Filters
from pagedserve_engine.staging import send

NONE = -1

SLOT = np.dtype(
    [
        ("inverse_temperature", np.float32),
        ("greedy", np.bool_),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("seed", np.uint64),
        ("min_tokens", np.int32),
        ("num_top", np.int32),  # NONE: no log probabilities
        ("count_row", np.int32),  # NONE: no penalties
    ]
)
"""A slot's parameters as numbers."""

Rows = npt.NDArray[np.intp]
Table = npt.NDArray[np.void]
Bias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Token ids and what is added to their scores."""


@dataclass(frozen=True, slots=True)
class Reported:
    """Rows [L] whose log probabilities are reported, and how many of the likeliest tokens each wants."""

    rows: Rows
    num_top: npt.NDArray[np.int32]

    @classmethod
    def of(cls, table: Table) -> Self:
        """Those of the S rows of ``table``."""
        rows = np.flatnonzero(table["num_top"] != NONE)
        return cls(rows, table["num_top"][rows])


@dataclass(frozen=True, slots=True)
class Draws:
    """What S rows ask of sampling where none has a grammar, a bias, a penalty, a minimum or log probabilities.

    One array, so that one copy takes it to the device: every number that is put in is one in float64 as well.
    """

    numbers: npt.NDArray[np.float64]
    """[6, S] inverse temperature, top_k, top_p, min_p, 1 where greedy, and the random number."""
    greedy: bool
    """Whether every row is."""

    NUM_PARTS: ClassVar[int] = 6

    @classmethod
    def of(cls, table: Table, uniform: npt.NDArray[np.float64]) -> Self:
        """Those of the S rows of ``table``, with the random numbers ``uniform`` [S]."""
        names = ("inverse_temperature", "top_k", "top_p", "min_p", "greedy")
        numbers = np.stack([*(table[name].astype(np.float64) for name in names), uniform])
        return cls(numbers, bool(table["greedy"].all()))


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's tensors as far as they last, and the rows of those that don't."""

    tensors: SamplingTensors
    random_rows: Rows
    grammar_rows: list[int]
    min_tokens: npt.NDArray[np.int32] | None
    """[S], where any row has a minimum."""
    reported: Reported

    @property
    def constant(self) -> bool:
        """Whether the tensors are the same in every step."""
        return not len(self.random_rows) and not self.grammar_rows and self.min_tokens is None


def build_plan(
    table: Table,
    *,
    vocab_size: int,
    counts: Tensor,
    biases: Mapping[int, Bias],
    grammar_rows: list[int],
) -> Plan:
    """The plan of the S rows of ``table``, with ``biases`` by row and ``counts`` as in Penalties, on their device."""
    device = counts.device
    random_rows = np.flatnonzero(~table["greedy"])
    penalised_rows = np.flatnonzero(table["count_row"] != NONE)
    min_tokens, reported = table["min_tokens"].copy(), Reported.of(table)
    tensors = SamplingTensors(
        bias=_bias(biases, device),
        penalties=_penalties(table, penalised_rows, counts) if len(penalised_rows) else None,
        random=_random(table, random_rows, vocab_size, device) if len(random_rows) else None,
        logprobs=LogprobRows(vector(reported.rows, device), int(reported.num_top.max()))
        if len(reported.rows)
        else None,
    )
    return Plan(
        tensors,
        random_rows,
        grammar_rows=grammar_rows,
        min_tokens=min_tokens if min_tokens.any() else None,
        reported=reported,
    )


def column(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """``values`` [N] as [N, 1] on ``device``."""
    return vector(values, device).unsqueeze(1)


def vector(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of ``values`` on ``device``."""
    return send(values, device)


def _bias(biases: Mapping[int, Bias], device: torch.device) -> Entries | None:
    if not biases:
        return None
    rows = np.repeat(np.array(list(biases), dtype=np.int64), [len(ids) for ids, _ in biases.values()])
    ids, values = (np.concatenate(parts) for parts in zip(*biases.values(), strict=True))
    return Entries(vector(rows, device), vector(ids, device), vector(values, device))


def _penalties(table: Table, rows: Rows, counts: Tensor) -> Penalties:
    picked = table[rows]
    return Penalties(
        rows=vector(rows, counts.device),
        counts=counts,
        count_rows=vector(picked["count_row"].astype(np.int64), counts.device),
        repetition=column(picked["repetition"], counts.device),
        frequency=column(picked["frequency"], counts.device),
        presence=column(picked["presence"], counts.device),
    )


def _random(table: Table, rows: Rows, vocab_size: int, device: torch.device) -> Randomness:
    picked = table[rows]
    return Randomness(
        rows=None if len(rows) == len(table) else vector(rows, device),
        inverse_temperature=column(picked["inverse_temperature"], device),
        uniform=torch.zeros(len(rows), 1, dtype=torch.float64, device=device),
        filters=_filters(picked, vocab_size, device),
    )


def _filters(table: Table, vocab_size: int, device: torch.device) -> Filters | None:
    by_k, by_p, by_min = table["top_k"] < vocab_size, table["top_p"] < 1.0, table["min_p"] > 0.0
    rows = np.flatnonzero(by_k | by_p | by_min)
    if not len(rows):
        return None
    picked = table[rows]
    return Filters(
        rows=None if len(rows) == len(table) else vector(rows, device),
        top_k=column(picked["top_k"], device) if by_k.any() else None,
        top_p=column(picked["top_p"], device) if by_p.any() else None,
        min_p=column(picked["min_p"], device) if by_min.any() else None,
    )
