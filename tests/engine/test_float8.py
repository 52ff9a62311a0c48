import pytest
import torch

from pagedserve_engine.float8 import FLOAT8, LARGEST, as_bytes, narrow, widen

ALL = torch.arange(256, dtype=torch.uint8).view(FLOAT8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_8_bit_float_widens_to_its_own_value(dtype: torch.dtype) -> None:
    found, expected = widen(ALL, dtype), ALL.to(dtype)
    assert found.dtype is dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_widening_takes_any_strides() -> None:
    values = torch.randn(6, 4).to(FLOAT8)
    assert torch.equal(widen(values.t()[1:], torch.float32), values.t()[1:].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_too_large_saturates_and_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    given = torch.tensor([0.0, -449.0, 480.0, 1e4, float("inf"), -float("inf")], dtype=dtype)
    assert narrow(given).float().tolist() == [0, -LARGEST, LARGEST, LARGEST, LARGEST, -LARGEST]
    assert narrow(torch.tensor([float("nan")], dtype=dtype)).float().isnan().all()


def test_narrowing_rounds_to_the_nearest() -> None:
    wide = widen(ALL, torch.float32)
    numbers = wide[wide.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    assert torch.equal(narrow(middles * 0.999 + numbers[1:] * 0.001).float(), numbers[1:])


def test_bytes_share_memory() -> None:
    values = torch.ones(3).to(FLOAT8)
    as_bytes(values)[1] = 0
    assert values.float().tolist() == [1, 0, 1]
    wide = torch.ones(3)
    assert as_bytes(wide) is wide
