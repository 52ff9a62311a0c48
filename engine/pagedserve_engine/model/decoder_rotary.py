"""Rotary tables, from transformers' own rotary modules, so that every way of scaling frequencies is theirs.

Frequencies that switch with the longest sequence of a batch do so beyond the length that is served (``ModelSpec``), so
that a table has one row for each position.
"""

from __future__ import annotations

from typing import Any

import torch

from pagedserve_engine.model.recipes import ROTARY_ALL, ROTARY_NONE, Recipe
from pagedserve_engine.model.spec import ModelSpec

_SLICE = 16384
"""Positions computed at a time: bounds what a long table takes while it is made."""


def rotary_tables(
    skeleton: torch.nn.Module, recipe: Recipe, spec: ModelSpec, *, positions: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """By the names of the recipe: tables [positions, rotary_dim], float32, as ``Ops.rope_and_write`` takes them.

    ``skeleton`` is transformers' model on any device. Positions that the model doesn't know repeat the last one's row:
    warm-up goes there, requests do not.
    """
    known = min(positions, spec.max_position_embeddings)
    rotary = _rotary_module(skeleton)
    tables = {
        name: _table(rotary, () if name == ROTARY_ALL else (name,), known)
        for name in dict.fromkeys(recipe.rotary_names)
        if name != ROTARY_NONE
    }
    if ROTARY_NONE in recipe.rotary_names:
        tables[ROTARY_NONE] = torch.cat(
            (torch.ones(known, spec.head_dim // 2), torch.zeros(known, spec.head_dim // 2)), 1
        )
    return {name: _extended(table, positions).to(device) for name, table in tables.items()}


def _rotary_module(skeleton: torch.nn.Module) -> Any:
    """A new one on the CPU, whatever device the skeleton is on."""
    found = next(module for name, module in skeleton.named_modules() if name.endswith("rotary_emb"))
    make: Any = type(found)
    return make(config=found.config)


def _table(rotary: Any, layer_type: tuple[str, ...], positions: int) -> torch.Tensor:
    like = torch.empty(0)
    rows = []
    for start in range(0, positions, _SLICE):
        ids = torch.arange(start, min(start + _SLICE, positions)).unsqueeze(0)
        cos, sin = rotary(like, ids, *layer_type)
        half = cos.shape[-1] // 2
        rows.append(torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1))
    return torch.cat(rows)


def _extended(table: torch.Tensor, positions: int) -> torch.Tensor:
    missing = positions - len(table)
    return torch.cat((table, table[-1:].expand(missing, -1))) if missing > 0 else table
