"""Fused decoders without an engine around them: built from folders, run over a paged cache of one sequence."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from attention_oracle import group_inputs
from pagedserve_engine.attention.interface import PagedStep
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.model.decoder import FusedDecoder
from pagedserve_engine.model.decoder_loading import Blueprint, Build, draw_blueprint, read_decoder
from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.spec import ModelSpec

POSITIONS = 256
_BLOCK_SIZE, _BLOCKS = 8, 16


def blueprint(folder: Path) -> Blueprint:
    """What the fused decoder makes of the folder's configuration, which it must cover."""
    config = AutoConfig.from_pretrained(folder)
    found = draw_blueprint(config, ModelSpec.from_config(config))
    assert isinstance(found, Blueprint), found
    return found


def build(**changes: Any) -> Build:
    """A float32 decoder on the CPU, but for ``changes``."""
    return Build(**{"device": torch.device("cpu"), "dtype": torch.float32, "positions": POSITIONS, **changes})


def fused(folder: Path, **changes: Any) -> FusedDecoder:
    """The folder's model."""
    files = sorted(folder.glob("*.safetensors"))
    return read_decoder(blueprint(folder), build(**changes), files, progress=NoBar, what="loading")


class OneSequence:
    """A paged cache that one sequence fills, chunk by chunk."""

    def __init__(self, model: FusedDecoder) -> None:
        self._model = model
        spec = ModelSpec.from_config(model.config)
        layout = CacheLayout.build(
            spec.layer_types,
            window=spec.sliding_window,
            num_kv_heads=model.share.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=_BLOCK_SIZE,
            dtype_bytes=model.dtype.itemsize,
        )
        self._groups = layout.groups
        self._places = tuple(layout.place(layer) for layer in range(spec.num_layers))
        shape = (1 + _BLOCKS * len(layout.groups), _BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
        pages = range(layout.layers_per_group)
        self._keys = [torch.zeros(shape, dtype=model.dtype) for _ in pages]
        self._values = [torch.zeros(shape, dtype=model.dtype) for _ in pages]
        self._length = 0

    def run(self, ids: Sequence[int], wanted: Sequence[int] | None = None) -> torch.Tensor:
        """Logits [K, vocab] of the ``wanted`` ones of the next tokens ``ids``, all where None."""
        positions = torch.arange(self._length, self._length + len(ids))
        step = self.step(len(ids))
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=None if wanted is None else torch.tensor(list(wanted), dtype=torch.long),
                paged=step,
            )
        self._length += len(ids)
        return output.logits[0]

    def step(self, num_tokens: int) -> PagedStep:
        """The metadata of the next ``num_tokens`` tokens."""
        groups = []
        for group in self._groups:
            first = 1 + _BLOCKS * group.index
            table = np.arange(first, first + _BLOCKS, dtype=np.int32)[None]
            row = (self._length, num_tokens)
            inputs = group_inputs(table, [row], num_decodes=0, block_size=_BLOCK_SIZE, window=group.window)
            groups.append(ReferenceBackend().plan_group(inputs))
        return PagedStep(tuple(groups), self._places, keys=self._keys, values=self._values)


class Ranks:
    """Ranks that are threads: what each gives is put together once all have given theirs."""

    def __init__(self, world: int) -> None:
        self._given: list[torch.Tensor] = [torch.empty(0)] * world
        self._barrier = threading.Barrier(world, timeout=60)

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """What every rank gave, in the order of ranks."""
        self._given[rank] = x
        self._barrier.wait()
        given = [part.clone() for part in self._given]
        self._barrier.wait()
        return given


class ThreadCollective:
    """One rank's side of ``Ranks``."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return torch.stack(self._ranks.exchange(self._rank, x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Side by side."""
        return torch.cat(self._ranks.exchange(self._rank, x), dim=-1)
