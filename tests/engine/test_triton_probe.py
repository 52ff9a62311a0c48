"""Which attention a CUDA device gets, and what the log says of the others."""

from __future__ import annotations

import pytest

from pagedserve_engine.attention import probe as probing
from pagedserve_engine.attention.backends import choose_backend
from pagedserve_engine.attention.probe import Faster, preferred, probe, report
from pagedserve_engine.errors import ConfigError

EVERYTHING = {"triton", "flash_attn_interface", "flashinfer", "flashinfer_jit_cache"}


def test_triton_serves_every_card_that_it_can_and_torch_the_others() -> None:
    for capability, expected in (((8, 0), "triton"), ((9, 0), "triton"), ((12, 0), "triton"), ((7, 5), "reference")):
        assert preferred(capability, probe(capability, EVERYTHING.__contains__)) == expected
    assert preferred((9, 0), probe((9, 0), lambda package: False)) == "reference"


def test_a_measured_backend_is_preferred_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "MEASURED", {(9, 0): Faster("flashinfer", "gpu-h100.json decode 32 x 1k")})
    candidates = probe((9, 0), EVERYTHING.__contains__)
    assert preferred((9, 0), candidates) == "flashinfer"
    assert "gpu-h100.json decode 32 x 1k" in report((9, 0), candidates, "flashinfer")
    without = probe((9, 0), {"triton"}.__contains__)
    assert preferred((9, 0), without) == "triton"


def test_the_log_names_what_stands_in_the_way_of_each() -> None:
    candidates = probe((8, 6), {"triton"}.__contains__)
    line = report((8, 6), candidates, "triton")
    assert line.startswith("attention runs in triton")
    assert "varlen_attn (" in line
    assert "flashinfer (not installed)" in line
    assert "\n" not in line


def test_triton_on_a_cpu_is_refused_with_the_cure() -> None:
    with pytest.raises(ConfigError, match="need CUDA: give auto or reference"):
        choose_backend("triton", "cpu")
