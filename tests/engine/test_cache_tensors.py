import dataclasses

import pytest
import torch

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.tensors import CacheTensors, choose_cache_dtype
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.float8 import FLOAT8

HYBRID = CacheLayout.build(
    ["sliding", "sliding", "full"] * 2, window=6, num_kv_heads=3, head_dim=8, block_size=4, dtype_bytes=2
)


def test_every_layer_of_a_group_has_a_pair_of_tensors():
    tensors = CacheTensors(HYBRID, 10, torch.bfloat16, "cpu")
    assert len(tensors.keys) == len(tensors.values) == HYBRID.layers_per_group == 2
    assert {tuple(tensor.shape) for tensor in (*tensors.keys, *tensors.values)} == {(10, 4, 3, 8)}
    assert all(tensor.dtype == torch.bfloat16 and not tensor.any() for tensor in (*tensors.keys, *tensors.values))


def test_the_tensors_take_what_the_layout_counts():
    assert CacheTensors(HYBRID, 10, torch.float16, "cpu").bytes == 10 * HYBRID.block_bytes


def test_a_dtype_that_was_not_planned_is_refused():
    with pytest.raises(ConfigError, match="KV_CACHE_DTYPE"):
        CacheTensors(HYBRID, 10, torch.float32, "cpu")


def test_blocks_of_8_bit_floats_are_cleared() -> None:
    layout = dataclasses.replace(HYBRID, dtype_bytes=1)
    tensors = CacheTensors(layout, 4, FLOAT8, "cpu")
    assert tensors.bytes == 4 * layout.block_bytes == 2 * HYBRID.block_bytes
    for tensor in (*tensors.keys, *tensors.values):
        tensor.copy_(torch.full(tensor.shape, float("nan")))
    tensors.clear(torch.tensor([1, 3]))
    for tensor in (*tensors.keys, *tensors.values):
        assert not tensor[[1, 3]].float().any()
        assert tensor[[0, 2]].float().isnan().all()


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32), ("fp8", FLOAT8)],
)
def test_the_setting_names_the_dtype_of_the_cache(setting: str, dtype: torch.dtype) -> None:
    assert choose_cache_dtype(setting, torch.bfloat16) is dtype
