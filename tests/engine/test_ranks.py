"""Which rank runs where, what it holds of a model and of the memory, and that the operator reckons with the same."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from models import tiny_model
from pagedserve_engine.attention.interface import ATTENTION_NAME, register
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.building import prepare_threads
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.collectives import RankCollective
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ConfigError, UnsupportedModelError
from pagedserve_engine.footprint import plan_core, worst
from pagedserve_engine.limits import Memory
from pagedserve_engine.memory import MemoryInputs, plan_memory
from pagedserve_engine.model.loader import load_model
from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.shards import Share
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.ranks import Rank, device_of
from pagedserve_operator.shapes import from_config
from pagedserve_operator.sizing.blocks import Blocks

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())
CPU = torch.device("cpu")


def test_each_rank_has_a_visible_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(rank, 2, torch.device("cuda")).index for rank in range(2)] == [0, 1]
    assert device_of(0, 1, torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert device_of(3, 4, CPU) == CPU
    with pytest.raises(ConfigError, match=r"SIZE is 4 and 2 CUDA devices are visible: .* at most 2"):
        device_of(0, 4, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"DEVICE is cuda:1 and TENSOR_PARALLEL_SIZE is 2: .* CUDA_VISIBLE_DEVICES"):
        device_of(0, 2, torch.device("cuda", 1))


def test_ranks_on_devices_of_two_kinds_are_refused(tmp_path: Path) -> None:
    collective = RankCollective(0, 2, store=tmp_path / "store", seconds=1.0)
    rank = Rank(0, 2, collective, exchange=lambda own: [own, "another"])
    with pytest.raises(ConfigError, match=r"TENSOR_PARALLEL_SIZE is 2 and the devices are another, cpu: .* one kind"):
        rank.connect(CPU)


@pytest.mark.parametrize(("threads", "world", "share"), [(4, 2, 2), (3, 2, 1), (1, 4, 1), (4, 1, 4)])
def test_ranks_share_the_threads(threads: int, world: int, share: int) -> None:
    before = torch.get_num_threads()
    try:
        prepare_threads(EngineConfig(num_threads=threads), world)
        assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(before)


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_config(AutoConfig.for_model(**GOLDEN[name]["config"]))


def splits() -> list[tuple[str, int]]:
    """The golden models with the numbers of ranks, from 1 to 16, that can share them."""
    found = []
    for name, world in itertools.product(GOLDEN, range(1, 17)):
        with contextlib.suppress(ConfigError):
            Share.of(spec_of(name), 0, world)
            found.append((name, world))
    return found


@pytest.mark.parametrize(("name", "world"), splits())
def test_a_rank_s_blocks_cost_what_the_operator_counts_on(name: str, world: int) -> None:
    spec = spec_of(name)
    share = Share.of(spec, world - 1, world)
    layout = CacheLayout.build(
        spec.layer_types,
        window=spec.sliding_window,
        num_kv_heads=share.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=32,
        dtype_bytes=2,
    )
    counted = Blocks(shape=from_config(GOLDEN[name]["config"]), block_size=32, dtype_bytes=2, devices=world)
    assert layout.block_bytes == counted.block_bytes


def inputs(**changes: Any) -> MemoryInputs:
    layout = CacheLayout.build(["full"], window=None, num_kv_heads=1, head_dim=64, block_size=16, dtype_bytes=2)
    return MemoryInputs(
        **{
            "total": 1 << 24,
            "free": 1 << 23,
            "max_memory_percent": 0.9,
            "weights": 1 << 20,
            "activation_bytes_per_token": 16.0,
            "layout": layout,
            "num_blocks": "auto",
            "max_batch_tokens": 64,
            "max_model_len": "auto",
            "model_max_len": 1 << 20,
            "max_num_seqs": 4,
            "device_type": "cuda",
            **changes,
        }
    )


def test_ranks_plan_for_the_least_of_them() -> None:
    every = [
        inputs(),
        inputs(free=6 << 20),
        inputs(weights=3 << 20, activation_bytes_per_token=64.0),
        inputs(activation_fixed=1 << 20, graphs=1 << 18, static_buffers=1 << 16),
    ]
    together = plan_memory(worst(every))
    assert together.num_blocks <= min(plan_memory(each).num_blocks for each in every)
    for each in every:
        fixed = dataclasses.replace(each, num_blocks=together.num_blocks, max_model_len=together.max_model_len)
        assert not plan_memory(fixed).lowered
    # On a CPU what is free has been asked by all of one memory, at different times.
    assert worst([inputs(device_type="cpu"), inputs(device_type="cpu", free=5)]).free == inputs().free


def test_a_rank_s_plan_has_its_part_of_the_heads_and_the_number_of_blocks_of_all() -> None:
    register()
    config = EngineConfig(model=str(tiny_model("llama")[1]), dtype="float32", num_blocks=64, block_size=8)
    small = Memory(free=1 << 32, total=1 << 32)
    plans = []
    for rank in (Rank(), Rank(1, 2, exchange=lambda own: [dataclasses.replace(own, num_blocks=16), own])):
        loaded = load_model(config, CPU, attention_name=ATTENTION_NAME, progress=NoBar, rank=rank)
        plan, layout, _ = plan_core(config, loaded, CPU, ReferenceBackend(), before=small, rank=rank)
        plans.append((plan.num_blocks, layout.num_kv_heads, loaded.weights_bytes))
    (blocks, heads, weights), (fewer, half, part) = plans
    assert (blocks, heads, fewer, half) == (64, 2, 16, 1)
    assert part < 0.7 * weights


@pytest.mark.parametrize(("name", "settings"), [("mixtral", {}), ("llama", {"decoder": "transformers"})])
def test_a_model_of_transformers_modules_is_not_split(name: str, settings: dict[str, Any]) -> None:
    register()
    config = EngineConfig(model=str(tiny_model(name)[1]), **settings)
    with pytest.raises(UnsupportedModelError, match=r"TENSOR_PARALLEL_SIZE is 2 and .* set it to 1") as raised:
        load_model(config, CPU, attention_name=ATTENTION_NAME, progress=NoBar, rank=Rank(0, 2))
    assert raised.value.param == "tensor_parallel_size"
