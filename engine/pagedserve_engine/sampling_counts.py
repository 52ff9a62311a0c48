"""How often each running request has used each token: one row of the vocabulary for each request with penalties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagedserve_engine.sampling import PROMPT_SEEN

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
        counts = np.bincount(np.asarray(output_ids, dtype=np.int64), minlength=self.tensor.shape[1]).astype(np.int32)
        counts[np.asarray(prompt_ids, dtype=np.int64)] |= PROMPT_SEEN
        self.tensor[row] = torch.from_numpy(counts).to(self.tensor.device)
        return row

    def give_back(self, row: int) -> None:
        """``row`` may be lent again."""
        self._free.append(row)

    def add(self, rows: npt.NDArray[np.integer], token_ids: npt.NDArray[np.integer]) -> None:
        """Each of ``rows``, no two the same, has used its token of ``token_ids``."""
        places = [torch.from_numpy(values.astype(np.int64)).to(self.tensor.device) for values in (rows, token_ids)]
        one = torch.ones((), dtype=torch.int32, device=self.tensor.device)
        self.tensor.index_put_(tuple(places), one, accumulate=True)

    def _grow(self) -> None:
        known = len(self.tensor)
        added = max(_FIRST_ROWS, known)
        self._free.extend(reversed(range(known, known + added)))
        self.tensor = torch.cat([self.tensor, self.tensor.new_zeros(added, self.tensor.shape[1])])
