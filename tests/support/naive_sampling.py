"""Sampling as its definition reads, a row at a time in float64: what the vectorised sampler is held to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagedserve_engine.request import SamplingParams

Row = npt.NDArray[np.float64]


def penalise(scores: Row, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Row:
    """Bias, then repetition over prompt and output, then frequency and presence over the output."""
    scores = scores.copy()
    for token, value in params.logit_bias.items():
        scores[token] += value
    for token in {*prompt_ids, *output_ids}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output_ids):
        scores[token] -= params.frequency_penalty * list(output_ids).count(token) + params.presence_penalty
    return scores


def kept(weights: Row, *, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Which tokens min_p, then top_k, then top_p of what is left keep, equally likely ones together."""
    keep = weights >= min_p * weights.max()
    if 0 < top_k < len(weights):
        keep &= weights >= np.sort(weights)[-top_k]
    if top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        order = order[keep[order]]
        sums = np.cumsum(weights[order])
        last = min(int((sums < top_p * sums[-1]).sum()), len(order) - 1)
        keep &= weights >= weights[order[last]]
    return keep


def drawn(weights: Row, uniform: float) -> int:
    """The token at which the running sum passes ``uniform`` of the whole."""
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, uniform * sums[-1], side="right"))
