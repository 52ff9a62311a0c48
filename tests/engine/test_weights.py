"""Weights on their way into a fused decoder: the right pieces, checked, one at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decoders import OneSequence, blueprint, build, fused
from models import load_reference, tiny_model
from pagedserve_engine.errors import ConfigError, ModelLoadError
from pagedserve_engine.model import products
from pagedserve_engine.model.decoder import FusedDecoder, Linear
from pagedserve_engine.model.decoder_loading import random_decoder, read_decoder
from pagedserve_engine.model.loader import weights_bytes
from pagedserve_engine.model.products import PackedLinear
from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.shards import Share

IDS = list(range(5, 45))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products stay as they are read."""
    monkeypatch.setattr(products, "packed_slowdown", lambda ops, dtype: 2.0)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products run in the compiled kernels."""
    monkeypatch.setattr(products, "packed_slowdown", lambda ops, dtype: 0.5)


def rewritten(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "llama") -> Path:
    folder = Path(shutil.copytree(tiny_model(name)[1], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# --- shares of ranks -------------------------------------------------------------------------------------------------


def parameters(folder: Path, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    return dict(fused(folder, rank=rank, world=world).named_parameters())


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_shares_of_ranks_stacked_are_the_whole(name: str) -> None:
    folder = tiny_model(name, num_key_value_heads=2)[1]
    whole, first, second = parameters(folder), parameters(folder, 0, 2), parameters(folder, 1, 2)
    for key, tensor in whole.items():
        parts = first[key], second[key]
        if key.endswith(("output.weight", "down.weight")):
            assert torch.equal(torch.cat(parts, dim=1), tensor), key
        elif "norm" in key:
            assert torch.equal(parts[0], tensor), key
            assert torch.equal(parts[1], tensor), key
        elif key.endswith(("qkv.weight", "gate_up.weight")):
            sizes = (64, 32, 32) if "qkv" in key else (128, 128)
            blocks = zip(*(part.split([size // 2 for size in sizes]) for part in parts), strict=True)
            for block, expected in zip(blocks, tensor.split(sizes), strict=True):
                assert torch.equal(torch.cat(block), expected), key
        else:
            assert torch.equal(torch.cat(parts), tensor), key


@pytest.mark.usefixtures("plain")
def test_key_heads_are_repeated_where_there_are_fewer_than_ranks() -> None:
    folder = tiny_model("llama", num_key_value_heads=2)[1]
    whole = parameters(folder)["layers.1.qkv.weight"]
    query, key, value = whole.split((64, 32, 32))
    for rank in range(4):
        head = slice(rank * 16, rank * 16 + 16)
        shared = slice(rank // 2 * 16, rank // 2 * 16 + 16)
        share = parameters(folder, rank, 4)["layers.1.qkv.weight"]
        assert torch.equal(share, torch.cat((query[head], key[shared], value[shared])))


@pytest.mark.usefixtures("plain")
def test_one_rank_alone_adds_the_bias_of_a_summed_product() -> None:
    folder = tiny_model("llama", attention_bias=True, mlp_bias=True)[1]
    whole, first, second = parameters(folder), parameters(folder, 0, 2), parameters(folder, 1, 2)
    for name in ("layers.0.output.bias", "layers.0.down.bias"):
        assert torch.equal(first[name], whole[name])
        assert not second[name].any()


@pytest.mark.parametrize("world", [3, 8])
def test_ranks_that_cannot_share_evenly_are_refused(world: int) -> None:
    with pytest.raises(ConfigError, match=rf"SIZE is {world}: .* 4 attention heads .* work are 1, 2, 4"):
        Share.of(blueprint(tiny_model("llama")[1]).spec, 0, world)


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def renamed(prefix: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> object:
        return {key.replace("model.", prefix) if key != "lm_head.weight" else key: t for key, t in tensors.items()}

    return change


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_a_decoder_is_found_under_the_names_of_larger_models_and_smaller_ones(tmp_path: Path, prefix: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> object:
        found = renamed(prefix)(tensors)
        assert isinstance(found, dict)
        return found | ({"vision_tower.patch.weight": torch.ones(2, 2)} if prefix else {})

    model, usual = fused(rewritten(tmp_path, change)), fused(tiny_model("llama")[1])
    assert torch.equal(OneSequence(model).run(IDS), OneSequence(usual).run(IDS))


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def add(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), r"lack 1 tensors.*layers\.1\.mlp\.up_proj\.weight"),
        (drop("lm_head.weight"), r"lack 1 tensors.*lm_head\.weight"),
        (
            add("model.layers.0.self_attn.q_proj.bias", 64),
            r"holds the tensor model\.layers\.0\.self_attn\.q_proj\.bias.*DECODER=transformers",
        ),
        (add("model.layers.9.mlp.up_proj.weight", 128, 64), r"holds the tensor model\.layers\.9"),
        (
            add("model.layers.0.self_attn.k_proj.weight", 48, 64),
            r"k_proj\.weight has the shape \[48, 64\], its config\.json asks for \[32, 64\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_tensors_name(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    with pytest.raises(ModelLoadError, match=words):
        fused(rewritten(tmp_path, change))


def test_tensors_that_are_no_weights_are_passed_over(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> object:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["score.weight"] = torch.ones(1, 64)
        return tensors

    assert isinstance(fused(rewritten(tmp_path, change)), FusedDecoder)


@pytest.mark.usefixtures("plain")
def test_tied_weights_may_stand_in_the_file_twice(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = fused(folder)
    assert model.head is None
    assert torch.equal(model.embedding.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.usefixtures("plain")
def test_a_model_in_several_files_is_read_whole_with_progress_by_bytes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama")[1], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for part in range(3):
        save_file({name: tensors[name].half() for name in names[part::3]}, folder / f"part-{part}.safetensors")
    bars: list[Bar] = []

    class Bar(NoBar):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.asked, self.done = kwargs, 0
            bars.append(self)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)

    files = sorted(folder.glob("*.safetensors"))
    model = read_decoder(blueprint(folder), build(), files, progress=Bar, what="loading it")
    (bar,) = bars
    assert bar.done == bar.asked["total"] == sum(tensor.numel() * 2 for tensor in tensors.values())
    assert bar.asked["desc"] == "loading it"
    assert torch.equal(model.layers[2].down.weight, tensors["model.layers.2.mlp.down_proj.weight"].half().float())  # type: ignore[union-attr, arg-type]


# --- dtypes and other forms of products ------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("tied", [True, False])
def test_slow_16_bit_products_hold_their_rounded_values_in_float32(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setattr(products, "measure_slowdown", lambda dtype: 3.0)
    folder = tiny_model("qwen2", tie_word_embeddings=tied)[1]
    model = fused(folder, dtype=torch.bfloat16)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert {linear.weight.dtype for linear in linears} == {torch.float32}
    assert model.embedding.weight.dtype == (torch.float32 if tied else torch.bfloat16)
    for tensor in model.parameters():
        assert torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))
    monkeypatch.setattr(products, "measure_slowdown", lambda dtype: 1.0)
    narrow = fused(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    wide, small = OneSequence(model).run(IDS), OneSequence(narrow).run(IDS)
    assert wide.dtype == small.dtype == torch.bfloat16
    torch.testing.assert_close(wide.float(), small.float(), atol=0.1, rtol=0.02)


class Doubled(nn.Module):
    """Another form of a product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("halved", weight.detach() / 2)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = 2 * (x @ self.halved.T)  # type: ignore[operator]
        return product if self.bias is None else product + self.bias  # type: ignore[operator]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("random", [False, True])
def test_products_change_their_form_one_layer_at_a_time_and_the_wide_ones_are_freed(random: bool) -> None:
    wide: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        nonlocal most
        wide.append(weakref.ref(weight))
        most = max(most, sum(reference() is not None for reference in wide))
        return Doubled(weight, bias)

    folder = tiny_model("qwen2")[1]
    if random:
        model = random_decoder(blueprint(folder), build(quantize=make_linear), seed=1)
    else:
        model = fused(folder, quantize=make_linear)
    assert len(wide) == 2 * 4
    assert most == 1, "wide weights pile up"
    assert not any(reference() is not None for reference in wide)
    assert model.head is not None, "the output layer keeps its width"
    assert isinstance(model.head, Linear)
    if not random:
        expected = OneSequence(fused(folder)).run(IDS)
        torch.testing.assert_close(OneSequence(model).run(IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("plain")
def test_random_weights_have_the_spread_of_the_configuration_and_norms_that_change_nothing() -> None:
    for name, neutral in (("llama", 1.0), ("gemma2", 0.0)):
        model = random_decoder(blueprint(tiny_model(name)[1]), build(), seed=3)
        for key, tensor in model.named_parameters():
            if "norm" in key:
                assert (tensor == neutral).all()
            else:
                assert tensor.std().item() == pytest.approx(0.2, rel=0.1), key
        again = random_decoder(blueprint(tiny_model(name)[1]), build(), seed=3)
        other = random_decoder(blueprint(tiny_model(name)[1]), build(), seed=4)
        assert torch.equal(model.embedding.weight, again.embedding.weight)
        assert not torch.equal(model.embedding.weight, other.embedding.weight)


@pytest.mark.usefixtures("plain")
def test_every_weight_of_transformers_modules_arrives() -> None:
    folder = tiny_model("llama")[1]
    model = fused(folder)
    theirs = sum(parameter.numel() for parameter in load_reference(folder).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == theirs


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "tied"), [("qwen2", True), ("llama", False), ("gemma3", True)])
def test_packed_products_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, name: str, tied: bool, dtype: torch.dtype
) -> None:
    folder = tiny_model(name, tie_word_embeddings=tied, vocab_size=251)[1]
    model = fused(folder, dtype=dtype)
    assert not [module for module in model.modules() if isinstance(module, Linear)]
    assert isinstance(model.head, PackedLinear)
    monkeypatch.setattr(products, "packed_slowdown", lambda ops, dtype: 2.0)
    usual = fused(folder, dtype=dtype)
    every = torch.arange(251)
    assert torch.equal(model.embedding(every).to(dtype), usual.embedding(every).to(dtype)), "rows of the table"
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.03}
    torch.testing.assert_close(OneSequence(model).run(IDS), OneSequence(usual).run(IDS), **tolerance)
    ours, theirs = weights_bytes(model), weights_bytes(usual)
    assert ours <= theirs * 1.05, "one copy of each weight is held"


@pytest.mark.usefixtures("packed")
def test_small_products_stay_small_beside_a_packed_output_layer() -> None:
    model = fused(tiny_model("qwen2")[1], quantize=Doubled)
    assert isinstance(model.head, PackedLinear)
    assert isinstance(model.layers[0].down, Doubled)  # type: ignore[union-attr]
