"""From logits to tokens: tensor functions only, so that a step can be captured and nothing in it waits for the device.

Each row is a pure function of its logits, its parameters and one number between 0 and 1; what shares the batch never
matters. Which rows need which part is decided on the host (``sampling_state.py``): a part that no row needs is None
and costs nothing. S rows, V the vocabulary.

The order is vLLM's: grammar, bans, bias, penalties, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagedserve_engine.sampling_filters import Filters, floors

BANNED = -1e30
"""Score of a banned token: below every other, yet above what a grammar forbids: banning all that it allows is void."""

PROMPT_SEEN = 1 << 30
"""Bit of a count that says "part of the prompt"; the bits below count occurrences in the output."""

_BLOCK = 128
"""Tokens summed together when drawing."""

_TIE_MARGIN = 8
"""Tokens looked at beyond the top ones asked for, so that equal ones are listed from the lowest id."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the grammars of G rows allow."""

    rows: Tensor
    """[G] int64."""
    bits: Tensor
    """[G, ceil(V / 32)] int32, the lowest bit first."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Single scores that change: E triples, no pair of row and token twice."""

    rows: Tensor
    """[E] int64."""
    token_ids: Tensor
    """[E] int64."""
    values: Tensor
    """[E] float32: added (bias) or put in place (bans)."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """What P rows pay for repeating themselves."""

    rows: Tensor
    """[P] int64."""
    counts: Tensor
    """[any, V] int32: occurrences in the output, plus PROMPT_SEEN."""
    count_rows: Tensor
    """[P] int64: each row's place in ``counts``."""
    repetition: Tensor
    """[P, 1] float32, 1 is off."""
    frequency: Tensor
    """[P, 1] float32, 0 is off."""
    presence: Tensor
    """[P, 1] float32, 0 is off."""


@dataclass(frozen=True, slots=True)
class Randomness:
    """How N rows are drawn."""

    rows: Tensor | None
    """[N] int64; None: every row."""
    inverse_temperature: Tensor
    """[N, 1] float32."""
    uniform: Tensor
    """[N, 1] float64 in [0, 1)."""
    filters: Filters | None = None


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Rows whose log probabilities are reported."""

    rows: Tensor
    """[L] int64."""
    num_top: int
    """The likeliest tokens listed for each of them."""


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """The parameters of a step's rows; empty, every row takes its likeliest token."""

    allowed: Allowed | None = None
    bans: Entries | None = None
    bias: Entries | None = None
    penalties: Penalties | None = None
    random: Randomness | None = None
    logprobs: LogprobRows | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of L tokens under the raw logits, and of the k likeliest at each place, best first."""

    logprobs: Tensor
    """[L] float32."""
    ranks: Tensor
    """[L] int64: 1 + the number of likelier tokens."""
    top_ids: Tensor
    """[L, k] int64."""
    top_logprobs: Tensor
    """[L, k] float32."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step's rows got."""

    token_ids: Tensor
    """[S] int64."""
    logprobs: TokenLogprobs | None
    """Of the rows in ``SamplingTensors.logprobs``."""


def sample(logits: Tensor, tensors: SamplingTensors) -> Sampled:
    """The next token of each row of ``logits`` [S, V], which are left as they are; greedy ties go to the lowest id."""
    token_ids = _choose(_process(logits, tensors), tensors.random)
    wanted = tensors.logprobs
    if wanted is None:
        return Sampled(token_ids, None)
    raw = logits.index_select(0, wanted.rows)
    return Sampled(token_ids, token_logprobs(raw, token_ids.index_select(0, wanted.rows), wanted.num_top))


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenLogprobs:
    """Log probabilities of ``token_ids`` [L] under ``logits`` [L, V], and of the ``num_top`` likeliest tokens."""
    scores = logits.float()
    chosen = scores.gather(1, token_ids.unsqueeze(1))
    total = scores.logsumexp(-1, keepdim=True)
    ranks = (scores > chosen).sum(-1) + 1
    top_ids = scores.topk(min(num_top + _TIE_MARGIN, scores.shape[1])).indices.sort(-1).values
    top, order = scores.gather(1, top_ids).sort(dim=-1, descending=True, stable=True)
    return TokenLogprobs(
        logprobs=(chosen - total).squeeze(1),
        ranks=ranks,
        top_ids=top_ids.gather(1, order)[:, :num_top],
        top_logprobs=(top - total)[:, :num_top],
    )


def _process(logits: Tensor, tensors: SamplingTensors) -> Tensor:
    """Scores [S, V] after grammar, bans, bias and penalties; the logits themselves where no row has any."""
    parts = (tensors.allowed, tensors.bans, tensors.bias, tensors.penalties)
    if all(part is None for part in parts):
        return logits
    scores = logits.to(torch.float32, copy=True)
    if tensors.allowed is not None:
        _apply_allowed(scores, tensors.allowed)
    if tensors.bans is not None:
        _apply_bans(scores, tensors.bans)
    if tensors.bias is not None:
        bias = tensors.bias
        scores.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)
    if tensors.penalties is not None:
        _apply_penalties(scores, tensors.penalties)
    return scores


def _apply_allowed(scores: Tensor, allowed: Allowed) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=scores.device)
    bits = (allowed.bits.unsqueeze(-1) >> shifts) & 1
    forbidden = bits.flatten(1)[:, : scores.shape[1]] == 0
    scores.index_copy_(0, allowed.rows, scores.index_select(0, allowed.rows).masked_fill_(forbidden, -torch.inf))


def _apply_bans(scores: Tensor, bans: Entries) -> None:
    # The minimum leaves alone what a grammar forbids.
    places = (bans.rows, bans.token_ids)
    scores.index_put_(places, torch.minimum(scores[places], bans.values))


def _apply_penalties(scores: Tensor, penalties: Penalties) -> None:
    rows = scores.index_select(0, penalties.rows)
    counts = penalties.counts.index_select(0, penalties.count_rows)
    repeated = torch.where(rows > 0, rows / penalties.repetition, rows * penalties.repetition)
    rows = torch.where(counts != 0, repeated, rows)
    output_counts = counts & (PROMPT_SEEN - 1)
    rows -= penalties.frequency * output_counts + penalties.presence * (output_counts > 0)
    scores.index_copy_(0, penalties.rows, rows)


def _choose(scores: Tensor, random: Randomness | None) -> Tensor:
    if random is None:
        return scores.argmax(-1)
    if random.rows is None:
        return _draw(_weights(scores, random), random.uniform)
    drawn = _draw(_weights(scores.index_select(0, random.rows), random), random.uniform)
    return scores.argmax(-1).index_copy_(0, random.rows, drawn)


def _weights(scores: Tensor, random: Randomness) -> Tensor:
    """Probabilities [N, V] but for a factor: the likeliest token weighs 1, what is cut 0."""
    scores = scores.float()
    # The bound keeps a row in which nothing is allowed from becoming NaN; it weighs nothing and draws token 0.
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    weights = (scores - peak).mul_(random.inverse_temperature).exp_()
    filters = random.filters
    if filters is None:
        return weights
    if filters.rows is None:
        return weights.masked_fill_(weights < floors(weights, filters), 0.0)
    cut = weights.index_select(0, filters.rows)
    cut.masked_fill_(cut < floors(cut, filters), 0.0)
    return weights.index_copy_(0, filters.rows, cut)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token [N] at which the running sum of ``weights`` [N, V], in order of ids, passes ``uniform`` of the whole.

    Blocks are summed first, then the one block that holds the place is looked into: one pass over the vocabulary.
    """
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK))
    blocks = weights.view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    place = uniform * ends[:, -1:]
    block = _first_above(ends, place)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    return (block * _BLOCK + _first_above(inside, place - before)).squeeze(1)


def _first_above(ends: Tensor, place: Tensor) -> Tensor:
    """Index [N, 1] of the first of ``ends`` [N, any] above ``place`` [N, 1]; if rounding leaves none, the last rise."""
    first = (ends <= place).sum(-1, keepdim=True)
    last = (ends < ends[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(first, last)
