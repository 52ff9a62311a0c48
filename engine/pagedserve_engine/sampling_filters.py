"""top_k, top_p and min_p without a sort of the vocabulary: each row's filters come down to the least weight they keep.

What they keep includes every token that is as likely as the last one, so that no answer hangs on the order of a sort.
Two ways to find that weight, held to the same answer: a CPU sorts the likeliest few (docs/decisions.md has figures);
elsewhere its bits are searched for, in a fixed number of passes that never wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CANDIDATES = 1024
"""How many of the likeliest tokens a CPU looks at before it looks at all."""


@dataclass(frozen=True, slots=True)
class Filters:
    """How F of the random rows are cut; a filter that no row uses is None."""

    rows: Tensor | None
    """[F] int64 places among the random rows; None: all of them."""
    top_k: Tensor | None
    """[F, 1] int64 from 1 to V; V is off."""
    top_p: Tensor | None
    """[F, 1] float64, 1 is off."""
    min_p: Tensor | None
    """[F, 1] float32, 0 is off."""


def floors(weights: Tensor, filters: Filters) -> Tensor:
    """The least weight [F, 1] that min_p, then top_k, then top_p of the rest keep of ``weights`` [F, V], peaks 1."""
    find = floors_by_candidates if weights.device.type == "cpu" else floors_by_bisection
    floor = weights.new_zeros(len(weights), 1) if filters.min_p is None else filters.min_p
    if filters.top_k is None and filters.top_p is None:
        return floor
    return find(weights, floor, filters)


def floors_by_candidates(weights: Tensor, floor: Tensor, filters: Filters) -> Tensor:
    """On a CPU: sort the likeliest few, which nearly always settle a row, and look at more for the rows they don't.

    Looking at a value costs a CPU nothing; elsewhere it would wait for the device.
    """
    vocab = weights.shape[1]
    top_k = torch.full_like(floor, vocab, dtype=torch.int64) if filters.top_k is None else filters.top_k
    top_p = torch.ones_like(floor, dtype=torch.float64) if filters.top_p is None else filters.top_p
    result = floor.clone()
    pending = torch.arange(len(weights))
    for size in (min(_CANDIDATES, vocab), vocab):
        found, settled = _settle(weights[pending], floor[pending], top_k[pending], top_p[pending], size)
        result[pending] = found
        pending = pending[~settled]
        if len(pending) == 0:
            break
    return result


def _settle(weights: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Floors [F, 1] as far as the ``size`` likeliest tokens tell, and which [F] of them are settled."""
    vocab = weights.shape[1]
    top = _largest(weights, size)
    kth = top.gather(1, top_k.clamp(max=size) - 1)
    floor = torch.where(top_k < vocab, torch.maximum(floor, kth), floor)
    known = (top_k <= size) | (top_k == vocab)
    if bool((top_p >= 1.0).all()):
        return floor, known.squeeze(1)
    place = top_p * _mass_from(weights, floor)
    sums = top.double().cumsum(-1)
    index = (sums < place).sum(-1, keepdim=True)
    reached = torch.maximum(floor, top.gather(1, index.clamp(max=size - 1)))
    settled = known & ((top_p >= 1.0) | (index < size) | (size == vocab))
    return torch.where(top_p >= 1.0, floor, reached), settled.squeeze(1)


def _largest(weights: Tensor, size: int) -> Tensor:
    """The ``size`` largest [F, size], largest first; numpy's sort is ten times as fast as torch's on a CPU."""
    values = weights.numpy()
    if size < values.shape[1]:
        values = np.partition(values, -size, axis=-1)[:, -size:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def floors_by_bisection(weights: Tensor, floor: Tensor, filters: Filters) -> Tensor:
    """On any device, without a sort or a wait: find the floors' bits, highest first, in 30 passes for each filter."""
    if filters.top_k is not None:
        top_k = filters.top_k
        kth = _bisect(weights, lambda border: (weights >= border).sum(-1, keepdim=True) >= top_k)
        floor = torch.where(top_k < weights.shape[1], torch.maximum(floor, kth), floor)
    if filters.top_p is not None:
        # Above zero, so that top_p = 0 still keeps the likeliest token.
        place = (filters.top_p * _mass_from(weights, floor)).clamp_(min=1e-30)
        reached = _bisect(weights, lambda border: _mass_from(weights, border) >= place)
        floor = torch.where(filters.top_p < 1.0, torch.maximum(floor, reached), floor)
    return floor


def _bisect(weights: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest border [F, 1] in [0, 2) for which ``holds``, which is true of 0 and, once false, false above.

    Floats of one sign are ordered as their bits are.
    """
    bits = torch.zeros(len(weights), 1, dtype=torch.int32, device=weights.device)
    for place in reversed(range(30)):
        tried = bits | (1 << place)
        bits = torch.where(holds(tried.view(torch.float32)), tried, bits)
    return bits.view(torch.float32)


def _mass_from(weights: Tensor, floor: Tensor) -> Tensor:
    """Sum [F, 1], float64, of the weights from ``floor`` [F, 1] on."""
    return torch.where(weights >= floor, weights, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
