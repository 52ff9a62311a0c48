import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from models import load_reference, tiny_model
from pagedserve_engine.model import products
from pagedserve_engine.model.loader import weights_bytes
from pagedserve_engine.model.products import WideEmbedding, WideLinear, widen, widen_products

IDS = torch.tensor([[5, 6, 7, 8, 9, 200]])


def half_model(name: str, **overrides: object) -> nn.Module:
    _, folder = tiny_model(name, **overrides)
    return load_reference(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_product_is_the_float32_product_rounded_once(dtype: torch.dtype) -> None:
    x, linear = torch.randn(5, 64).to(dtype), nn.Linear(64, 32).to(dtype)
    expected = functional.linear(x.float(), linear.weight.float(), linear.bias.float()).to(dtype)
    model = nn.Sequential(linear)
    widen(model)
    assert isinstance(model[0], WideLinear)
    assert torch.equal(model(x), expected)


def test_every_linear_layer_is_replaced_and_answers_stay_close() -> None:
    plain = half_model("qwen2")
    wide = copy.deepcopy(plain)
    widen(wide)
    assert not [module for module in wide.modules() if type(module) is nn.Linear]
    with torch.inference_mode():
        before, after = plain(input_ids=IDS).logits, wide(input_ids=IDS).logits
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before.float(), atol=0.06, rtol=0.02)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tied_embeddings_share_one_float32_table_and_give_the_same_rows(name: str) -> None:
    plain = half_model(name, tie_word_embeddings=True)
    wide = copy.deepcopy(plain)
    widen(wide)
    embedding = wide.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, WideEmbedding)
    assert embedding.weight is wide.lm_head.weight  # type: ignore[union-attr]
    assert torch.equal(embedding(IDS), plain.get_input_embeddings()(IDS))  # type: ignore[operator]
    assert embedding(IDS).dtype == torch.bfloat16
    kept = sum(p.numel() for p in plain.parameters() if p.ndim > 1) * 4
    assert kept <= weights_bytes(wide) <= kept * 1.1


def test_float32_models_are_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model("llama")[1]))
    assert not widen_products(model)
    assert not [module for module in model.modules() if isinstance(module, WideLinear)]


@pytest.mark.parametrize(("slowdown", "widened"), [(1.0, False), (3.0, True)])
def test_what_was_measured_decides(monkeypatch: pytest.MonkeyPatch, slowdown: float, widened: bool) -> None:
    monkeypatch.setattr(products, "measure_slowdown", lambda dtype: slowdown)
    model = half_model("llama")
    assert widen_products(model) is widened
    assert any(isinstance(module, WideLinear) for module in model.modules()) is widened
