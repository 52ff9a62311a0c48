"""What the running requests ask of the sampler, slot by slot, kept so that a step's share of it is cheap.

Parameters live in a numpy table; a step picks its rows from it. Only what a request really uses exists: counts for
penalties, a matcher for a grammar. All of it can be built again from the request, so preemption loses nothing.

With a step in flight the host chooses the next step's parameters before it knows this step's tokens. What depends on
them is kept on the device (``record``: counts) or depends on their number alone (random numbers, min_tokens); only a
grammar must be told on the host (``advance``), so such steps are read before the next one is launched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedserve_engine.batch import Int32Array
from pagedserve_engine.errors import InvalidParameterError, PagedServeError
from pagedserve_engine.grammar import GrammarCompiler, GrammarMatcher
from pagedserve_engine.request import RequestState, SamplingParams, TokenLogprob
from pagedserve_engine.sampling import BANNED, Allowed, Entries, SamplingTensors, TokenLogprobs
from pagedserve_engine.sampling_counts import TokenCounts
from pagedserve_engine.sampling_plan import NONE, SLOT, Bias, Draws, Plan, Reported, build_plan
from pagedserve_engine.staging import Staging

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: float32 could hardly tell the difference."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_Part = TypeVar("_Part")


class SamplingState:
    """Parameters, counts and grammars of the requests in ``max_num_seqs`` slots, for logits over ``vocab_size``."""

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device | str = "cpu",
        *,
        eos_token_ids: Sequence[int],
        grammars: GrammarCompiler | None = None,
        staging: Staging | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._staging = staging or Staging(0, self._device)
        self._grammars = grammars
        self._slots = np.zeros(max_num_seqs, dtype=SLOT)
        self._slots["count_row"] = NONE
        self._counts = TokenCounts(vocab_size, self._device)
        self._biases: dict[int, Bias] = {}
        self._ends: dict[int, npt.NDArray[np.int64]] = {}
        self._matchers: dict[int, GrammarMatcher] = {}
        self._failed: dict[int, Exception] = {}
        self._version = 0
        self._plan: tuple[int, bytes, Plan] | None = None
        """With the version and the slots that it is for."""

    def bind(self, slot: int, request: RequestState) -> None:
        """``request`` enters ``slot``, for the first time or again after preemption.

        Raises InvalidParameterError, or StepFailedError for an output that its grammar does not allow; the slot can
        then be sampled as if the request had asked for neither grammar nor bias.
        """
        self.unbind(slot)
        params = request.params
        greedy = params.temperature < GREEDY_BELOW
        self._slots[slot] = (
            1.0 if greedy else 1.0 / params.temperature,
            greedy,
            params.top_k if 0 < params.top_k < self._vocab_size else self._vocab_size,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            request.seed & (2**64 - 1),
            params.min_tokens,
            NONE if params.logprobs is None else params.logprobs,
            self._counts.take(request.prompt_ids, request.output_ids) if params.penalised else NONE,
        )
        if params.min_tokens:
            self._ends[slot] = self._read_ends(params)
        self._bind_bias(slot, params)
        self._bind_grammar(slot, request)

    def unbind(self, slot: int) -> None:
        """Whatever is bound to ``slot`` leaves it; nothing need be."""
        self._version += 1
        if self._slots[slot]["count_row"] != NONE:
            self._counts.give_back(int(self._slots[slot]["count_row"]))
            self._slots[slot]["count_row"] = NONE
        for parts in (self._biases, self._ends, self._matchers, self._failed):
            parts.pop(slot, None)

    def prepare(self, slots: Int32Array, positions: Int32Array, num_generated: Int32Array) -> SamplingTensors:
        """The parameters of a step that samples ``slots`` [S], all bound.

        ``positions`` [S] are those of the tokens to come, ``num_generated`` [S] how many each request has generated,
        those in flight included. What is returned holds until the next step is prepared.
        """
        plan = self._plan_for(slots)
        if plan.constant:
            return plan.tensors
        changes: dict[str, object] = {}
        if plan.tensors.random is not None:
            rows = plan.random_rows
            uniform = uniform_numbers(self._slots["seed"][slots[rows]], positions[rows])
            changes["random"] = dataclasses.replace(plan.tensors.random, uniform=self._staging.put(uniform[:, None]))
        if plan.grammar_rows:
            changes["allowed"] = self._fill_allowed(slots, plan.grammar_rows)
        if plan.min_tokens is not None:
            changes["bans"] = self._ban_ends(slots, num_generated < plan.min_tokens)
        self._staging.flush()
        return dataclasses.replace(plan.tensors, **changes)  # type: ignore[arg-type]

    def draws(self, slots: Int32Array, positions: Int32Array) -> Draws | None:
        """All that a step that samples ``slots`` [S] at ``positions`` [S] asks for, if no row asks for more."""
        plan = self._plan_for(slots)
        tensors = plan.tensors
        more = (tensors.bias, tensors.penalties, tensors.logprobs, plan.min_tokens)
        if plan.grammar_rows or any(part is not None for part in more):
            return None
        return Draws.of(self._slots[slots], uniform_numbers(self._slots["seed"][slots], positions))

    def record(self, slots: Int32Array, token_ids: Tensor) -> None:
        """Count the tokens [S] that ``slots`` [S] get, where they are: on the device."""
        penalties = self._plan_for(slots).tensors.penalties
        if penalties is not None:
            self._counts.add(penalties.count_rows, token_ids.index_select(0, penalties.rows))

    def reported(self, slots: Int32Array) -> Reported:
        """Which of ``slots`` [S] asked for log probabilities, as rows."""
        return self._plan_for(slots).reported

    def advance(self, slots: Int32Array, token_ids: Int32Array) -> dict[int, Exception]:
        """Tell the grammars the tokens [S] that ``slots`` [S] got; returns, by row, why a request can't go on.

        It comes between two steps that sample a slot with a grammar.
        """
        for row in self._plan_for(slots).grammar_rows:
            self._advance(int(slots[row]), int(token_ids[row]))
        return _by_row(self._failed, slots.tolist()) if self._failed else {}

    # --- binding -----------------------------------------------------------------------------------------------------

    def _bind_bias(self, slot: int, params: SamplingParams) -> None:
        if not params.logit_bias:
            return
        ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise InvalidParameterError(
                f"logit_bias names a token outside the vocabulary: use ids from 0 to {self._vocab_size - 1}",
                param="logit_bias",
            )
        self._biases[slot] = ids, np.fromiter(params.logit_bias.values(), dtype=np.float32)

    def _bind_grammar(self, slot: int, request: RequestState) -> None:
        spec = request.params.grammar
        if spec is None:
            return
        if self._grammars is None:
            raise InvalidParameterError("this model has no structured output: leave it out", param="response_format")
        matcher = self._grammars.compile(spec).matcher()
        for token_id in request.output_ids:
            matcher.advance(token_id)
        self._matchers[slot] = matcher

    def _read_ends(self, params: SamplingParams) -> npt.NDArray[np.int64]:
        """Tokens that would end the request; one that the logits don't have can't."""
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)}
        return np.array(sorted(end for end in ends if 0 <= end < self._vocab_size), dtype=np.int64)

    # --- a step ------------------------------------------------------------------------------------------------------

    def _plan_for(self, slots: Int32Array) -> Plan:
        key = slots.tobytes()
        if self._plan is not None and self._plan[:2] == (self._version, key):
            return self._plan[2]
        places = slots.tolist()
        plan = build_plan(
            self._slots[slots],
            vocab_size=self._vocab_size,
            counts=self._counts.tensor,
            biases=_by_row(self._biases, places),
            grammar_rows=list(_by_row(self._matchers, places)),
        )
        self._plan = (self._version, key, plan)
        return plan

    def _fill_allowed(self, slots: Int32Array, rows: list[int]) -> Allowed:
        bits = np.full((len(rows), (self._vocab_size + 31) // 32), -1, dtype=np.int32)
        for place, row in enumerate(rows):
            slot = int(slots[row])
            try:
                self._matchers[slot].fill(bits[place])
            except PagedServeError as error:
                # The step goes on for the others; commit() reports it.
                self._failed[slot] = error
                bits[place] = -1
        return Allowed(self._staging.put(np.array(rows, dtype=np.int64)), self._staging.put(bits))

    def _ban_ends(self, slots: Int32Array, short: npt.NDArray[np.bool_]) -> Entries | None:
        ends = {
            row: self._ends[slot] for row in np.flatnonzero(short).tolist() if len(self._ends[slot := int(slots[row])])
        }
        if not ends:
            return None
        rows = np.repeat(np.array(list(ends), dtype=np.int64), [len(ids) for ids in ends.values()])
        ids = np.concatenate(list(ends.values()))
        values = torch.full((len(ids),), BANNED, device=self._device)
        return Entries(self._staging.put(rows), self._staging.put(ids), values)

    def _advance(self, slot: int, token_id: int) -> None:
        if slot in self._failed:
            return
        try:
            self._matchers[slot].advance(token_id)
        except PagedServeError as error:
            self._failed[slot] = error


def uniform_numbers(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each pair of a seed and a position, the same wherever it is asked for."""
    mixed = _mix(_mix(seeds) + positions.astype(np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64: neighbours in, bits that have nothing in common out. Arithmetic is modulo 2**64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def read_logprobs(token_ids: npt.ArrayLike, logprobs: TokenLogprobs, num_top: npt.ArrayLike) -> list[TokenLogprob]:
    """What ``token_logprobs`` says of ``token_ids`` [L], each with its own ``num_top`` [L] of top tokens."""
    columns = (logprobs.logprobs, logprobs.ranks, logprobs.top_ids, logprobs.top_logprobs)
    rows = zip(
        np.asarray(token_ids).tolist(),
        np.asarray(num_top).tolist(),
        *(values.tolist() for values in columns),
        strict=True,
    )
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(top_ids[:top], top_logprobs[:top], strict=True)))
        for token_id, top, logprob, rank, top_ids, top_logprobs in rows
    ]


def _by_row(parts: Mapping[int, _Part], slots: list[int]) -> dict[int, _Part]:
    return {row: parts[slot] for row, slot in enumerate(slots) if slot in parts} if parts else {}
