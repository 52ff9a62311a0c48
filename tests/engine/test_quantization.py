"""Layers in 8 bits: their numbers, what is replaced, what is refused, and what the memory plan is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from models import load_reference, tiny_model
from pagedserve_engine.errors import ConfigError, UnsupportedModelError
from pagedserve_engine.float8 import FLOAT8, LARGEST
from pagedserve_engine.model.quantization import (
    Quantize,
    QuantizedLinear,
    choose_quantization,
    quantize_fp8,
    quantize_int8,
    quantize_model,
    refuse_quantized,
    scratch_bytes,
)
from pagedserve_engine.model.quantization_products import emulated_product, int8_product, widened_product

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = ("fp8", "int8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers each time."""
    torch.manual_seed(20)


def chosen(kind: str) -> Quantize:
    quantize = choose_quantization(kind, CPU)
    assert quantize is not None
    return quantize


def weight(rows: int = 96, columns: int = 64, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Outputs of very different sizes, as real layers have them, one of them zero."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)
    made[5] = 0
    return made.to(dtype)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_a_rounding_of_its_output(dtype: torch.dtype) -> None:
    wide = weight(dtype=dtype)
    small, scale = quantize_int8(wide)
    # Half a step, and what the rounding of the scale to bfloat16 moves the largest by.
    assert ((small.float() * scale[:, None] - wide.float()).abs() <= 0.51 * scale[:, None] + 2**-9 * wide.abs()).all()
    small, scale = quantize_fp8(wide)
    error = (small.float() * scale[:, None] - wide.float()).abs()
    assert (error <= torch.maximum(2**-4 * wide.float().abs(), 2**-10 * scale[:, None])).all()


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_int8])
def test_the_largest_weight_of_each_output_uses_the_whole_range(quantize) -> None:
    small, scale = quantize(weight())
    largest = LARGEST if small.dtype is FLOAT8 else 127
    peaks = small.float().abs().amax(1)
    assert (peaks[scale > 1e-11] == largest).all()
    assert not small[5].float().any()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_fused_or_split_keep_their_numbers(kind: str) -> None:
    x, wide = torch.randn(5, 64), weight()
    whole = chosen(kind)(wide, None)(x)
    parts = [chosen(kind)(part, None)(x) for part in wide.split([40, 56])]
    assert torch.equal(whole, torch.cat(parts, -1))


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_an_int8_product_is_that_of_the_rounded_weight(dtype: torch.dtype, rows: int, biased: bool) -> None:
    x, bias = torch.randn(rows, 64).to(dtype), torch.randn(96).to(dtype) if biased else None
    small, scale = quantize_int8(weight())
    expected = functional.linear(x.float(), small.float() * scale[:, None], None if bias is None else bias.float())
    found = int8_product(x, small, scale, bias)
    assert found.dtype is dtype
    # Of the sum of the products' sizes: what cancels keeps its rounding errors.
    sizes = functional.linear(x.float().abs(), small.float().abs() * scale[:, None])
    rounding = 0.0 if dtype is torch.float32 else 2**-8
    # A bias is added to what was rounded.
    rounded = expected.abs() + (0 if bias is None else (expected - bias.float()).abs())
    assert ((found.float() - expected).abs() <= 1e-6 * (sizes + 1) + rounding * rounded).all()


def test_an_fp8_product_rounds_each_token_by_its_own_scale() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 30, 1e4])[:, None]
    small, scale = quantize_fp8(weight())
    row_scale = x.abs().amax(1, keepdim=True) / LARGEST
    rounded = (x / row_scale).to(FLOAT8).float() * row_scale
    expected = rounded.double() @ (small.float() * scale[:, None]).double().t()
    found = emulated_product(x, small, scale, None)
    for token in range(4):
        largest = float(expected[token].abs().max())
        assert torch.allclose(found[token].double(), expected[token], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_widened_product_takes_activations_as_they_are(quantize, dtype: torch.dtype) -> None:
    x, (small, scale) = torch.randn(3, 64).to(dtype), quantize(weight())
    expected = functional.linear(x, (small.float() * scale[:, None]).to(dtype), torch.ones(96, dtype=dtype))
    found = widened_product(x, small, scale, torch.ones(96, dtype=dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible_and_in_its_row(kind: str, bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 7] = bad
    found = chosen(kind)(weight(), None)(x)
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.sampled_from(KINDS), st.booleans())
def test_any_shape_comes_out_near_the_wide_product(tokens: int, rows: int, columns: int, kind: str, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    generator = torch.Generator().manual_seed(tokens * 10_000 + rows * 100 + columns)
    x, wide = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, tokens, columns), (rows, columns)))
    found = chosen(kind)(wide, torch.zeros(rows, dtype=dtype))(x)
    assert found.shape == (1, tokens, rows)
    assert found.dtype is dtype
    bound = functional.linear(x.float().abs(), wide.float().abs())
    assert ((found.float() - functional.linear(x.float(), wide.float())).abs() <= 0.2 * bound + 1e-3).all()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_nothing_is_quantised_unless_asked_for() -> None:
    assert choose_quantization("none", CPU) is None


@pytest.mark.parametrize(
    ("kind", "capability", "product"),
    [
        ("fp8", (8, 0), "widened_product"),
        ("fp8", (8, 9), "scaled_product"),
        ("fp8", (9, 0), "scaled_product"),
        ("int8", (7, 5), "widened_product"),
        ("int8", (8, 0), "int8_product"),
        ("int8", (9, 0), "int8_product"),
    ],
)
def test_a_card_gets_the_products_that_it_has(kind: str, capability: tuple[int, int], product: str) -> None:
    quantize = choose_quantization(kind, CUDA, capability=capability)
    assert quantize is not None
    assert product in repr(quantize(weight(), None))


def test_a_weight_of_odd_sizes_is_widened_where_the_card_asks_for_even_ones() -> None:
    quantize = choose_quantization("fp8", CUDA, capability=(9, 0))
    assert quantize is not None
    assert "widened_product" in repr(quantize(weight(96, 60), None))


def test_fp8_on_an_old_card_names_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"QUANTIZATION is fp8.*7\.5.*int8 or none.*8\.9"):
        choose_quantization("fp8", CUDA, capability=(7, 5))


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_replaced_and_embeddings_stay(name: str, kind: str) -> None:
    model = load_reference(tiny_model(name)[1])
    before = model.get_output_embeddings()
    quantize_model(model, chosen(kind))
    assert model.get_output_embeddings() is before
    assert type(before) is nn.Linear
    left = [child for child in model.modules() if type(child) is nn.Linear]
    assert left == [before]
    assert any(isinstance(child, QuantizedLinear) for child in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_answers_nearly_as_before(kind: str) -> None:
    folder = tiny_model("llama")[1]
    model, small = load_reference(folder), load_reference(folder)
    quantize_model(small, chosen(kind))
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected, found = (one(input_ids=ids, use_cache=False).logits[0] for one in (model, small))
    assert not torch.equal(found, expected)
    assert functional.cosine_similarity(found, expected).mean() > (0.95 if kind == "fp8" else 0.99)


def test_routers_stay_wide() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(32, 4), "gate_proj": nn.Linear(32, 32)})
    quantize_model(model, chosen("int8"))
    assert type(model["gate"]) is nn.Linear
    assert isinstance(model["gate_proj"], QuantizedLinear)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"QUANTIZATION.*none"):
        quantize_model(nn.Sequential(nn.Embedding(4, 4)), chosen("int8"))


def test_weights_go_to_the_device_before_they_are_made_small() -> None:
    seen: list[torch.device] = []
    quantize = chosen("int8")

    def spy(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        seen.append(weight.device)
        return quantize(weight, bias)

    quantize_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), spy, device=torch.device("meta"))
    assert [device.type for device in seen] == ["meta", "meta"]


def test_a_layer_tells_what_it_takes_while_it_runs() -> None:
    assert scratch_bytes(nn.Linear(4, 4)) == 0
    layers = nn.Sequential(chosen("int8")(weight(96, 64), None), chosen("int8")(weight(16, 64), None))
    assert scratch_bytes(layers) == 96 * 64 * 4


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_a_checkpoint_that_is_quantised_already_is_refused_with_the_cure(method: str) -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"{method}.*MODEL.*QUANTIZATION"):
        refuse_quantized(config)


def test_a_plain_checkpoint_passes() -> None:
    refuse_quantized(AutoConfig.for_model("llama"))
    refuse_quantized(SimpleNamespace(quantization_config=None))


# --- the contract with the operator ----------------------------------------------------------------------------------

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_known_models_take_what_the_operator_counts_on(name: str, kind: str) -> None:
    config = AutoConfig.for_model(**GOLDEN[name]["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert held(model) == GOLDEN[name]["weight_bytes"]["bfloat16"]
    quantize_model(model, chosen(kind))
    assert held(model) == GOLDEN[name]["weight_bytes"][kind]


def held(model: nn.Module) -> int:
    """Bytes of what ``model`` would load, tied weights once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _loaded(model)}.values())


def _loaded(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield from module.buffers()
