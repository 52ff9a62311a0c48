"""The ranks that share a model: which one this process is, where it computes, and how all agree before they serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pagedserve_engine.collectives import RankCollective
from pagedserve_engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``world`` processes with a part of the model each; the only one where ``world`` is 1."""

    index: int = 0
    world: int = 1
    collective: RankCollective | None = None
    exchange: Callable[[Any], list[Any]] = lambda own: [own]
    """Gives what all ranks gave, in their order, the same to all; called by all, and waits for all."""

    def connect(self, device: torch.device) -> None:
        """Let tensors be put together from here on; raises ConfigError where the ranks' devices differ in kind."""
        if self.collective is None:
            return
        # A rank that fails to load never comes, and who waits in a collective can't be told why.
        kinds = self.exchange(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        if len(set(kinds)) > 1:
            # Each chooses tokens for itself, and kernels of two kinds of device may round differently.
            raise ConfigError(
                f"TENSOR_PARALLEL_SIZE is {self.world} and the devices are {', '.join(sorted(set(kinds)))}: let "
                "CUDA_VISIBLE_DEVICES show devices of one kind",
                param="tensor_parallel_size",
            )
        self.collective.connect(device)


ALONE = Rank()
"""The one rank of a model that is not split."""


def device_of(rank: int, world: int, device: torch.device) -> torch.device:
    """Where ``rank`` runs; raises ConfigError where the visible devices are fewer than the ranks."""
    if world == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(
            f"DEVICE is {device} and TENSOR_PARALLEL_SIZE is {world}: set DEVICE to cuda, and choose the devices with "
            "CUDA_VISIBLE_DEVICES",
            param="device",
        )
    visible = torch.cuda.device_count()
    if visible < world:
        raise ConfigError(
            f"TENSOR_PARALLEL_SIZE is {world} and {visible} CUDA devices are visible: set it to at most {visible}, or "
            "let CUDA_VISIBLE_DEVICES show more",
            param="tensor_parallel_size",
        )
    return torch.device("cuda", rank)
