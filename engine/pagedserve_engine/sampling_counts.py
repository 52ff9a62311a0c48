"""How often each running request has used each token: one row of the vocabulary for each request with penalties.

The counts are kept on the device, from the tokens as they are sampled there, so that the next step needs no host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pagedserve_engine.sampling import PROMPT_SEEN
from pagedserve_engine.staging import send

_FIRST_ROWS = 8


class TokenCounts:
    """Rows of counts on the device, lent and taken back; they double when all are lent."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.tensor = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        """[rows, V] int32: occurrences in the output, plus PROMPT_SEEN; a new tensor whenever it grows."""
        self._free: list[int] = []

    def take(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """A row that counts these tokens."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        counts = self.tensor[row].zero_()
        counts.index_fill_(0, self._send(prompt_ids), PROMPT_SEEN)
        used = self._send(output_ids)
        counts.scatter_add_(0, used, torch.ones_like(used, dtype=torch.int32))
        return row

    def give_back(self, row: int) -> None:
        """``row`` may be lent again."""
        self._free.append(row)

    def add(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Each of ``rows`` [P], no two the same, has used its token of ``token_ids`` [P]; all int64 on the device."""
        places = rows * self.tensor.shape[1] + token_ids
        self.tensor.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _send(self, token_ids: Sequence[int]) -> torch.Tensor:
        return send(np.asarray(token_ids, dtype=np.int64), self.tensor.device)

    def _grow(self) -> None:
        known = len(self.tensor)
        added = max(_FIRST_ROWS, known)
        self._free.extend(reversed(range(known, known + added)))
        self.tensor = torch.cat([self.tensor, self.tensor.new_zeros(added, self.tensor.shape[1])])
