"""How many blocks and batch tokens a GPU holds beside the model's weights, with the reasons as data."""

from __future__ import annotations

from pagedserve_operator.sizing.size import Breakdown, Sizing, batch_for, size, uses_graphs

__all__ = ["Breakdown", "Sizing", "batch_for", "size", "uses_graphs"]
