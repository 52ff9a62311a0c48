"""What ranks do that run no model: functions that another process finds by their names."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

import torch

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ModelLoadError
from pagedserve_engine.ranks import Rank


def add_up(config: EngineConfig, rank: Rank, leader: Connection) -> None:
    """Tell the process's id, then add one to each sum that rank 0 asks for."""
    rank.exchange(os.getpid())
    rank.connect(torch.device("cpu"))
    assert rank.collective is not None
    while leader.recv_bytes():
        rank.collective.all_reduce(torch.ones(3))


def fail_to_load(config: EngineConfig, rank: Rank, leader: Connection) -> None:
    """As a rank whose files are gone."""
    raise ModelLoadError("the weights are gone", param="model")


def break_down(config: EngineConfig, rank: Rank, leader: Connection) -> None:
    """As a rank with a bug."""
    rank.exchange(os.getpid())
    leader.recv_bytes()
    raise ValueError("a wire broke")
