import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loading import ATTENTION, copied, edit_config, load, load_modules
from models import (
    TINY_NAMES,
    load_reference,
    reference_generate,
    reference_logits,
    tiny_chat_model,
    tiny_model,
)
from pagedserve_engine.errors import ModelLoadError, StartupError, UnsupportedModelError
from pagedserve_engine.model import products
from pagedserve_engine.model.decoder import FusedDecoder
from pagedserve_engine.model.loader import choose_dtype
from pagedserve_engine.model.probe import probe
from pagedserve_engine.model.progress import LogBar, progress_for
from pagedserve_engine.model.quantization import QuantizedLinear
from pagedserve_engine.model.recipes import COVERED
from pagedserve_engine.model.spec import ModelSpec

# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_folder_loads_behind_our_attention(name: str) -> None:
    config, folder = tiny_model(name)
    loaded = load_modules(folder)
    assert loaded.model.config._attn_implementation == ATTENTION
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.spec == ModelSpec.from_config(config)
    assert loaded.name == folder.name
    assert loaded.dtype == torch.float32
    reference = load_reference(folder)
    assert loaded.weights_bytes >= sum(p.numel() * 4 for p in reference.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mixtral"])
def test_the_attention_that_was_named_computes_the_answers(name: str) -> None:
    _, folder = tiny_model(name)
    ids = [5, 90, 17, 200, 33]
    expected = reference_logits(load_reference(folder), ids)
    torch.testing.assert_close(reference_logits(load_modules(folder).model, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_models_say_more_than_one_thing(name: str) -> None:
    model = load_reference(tiny_model(name)[1])
    prompt = np.random.default_rng(7).integers(3, 256, 24).tolist()
    assert len(set(reference_generate(model, prompt, 40))) >= 10


@pytest.mark.real_model
def test_the_tiny_chat_model_talks_without_stopping_at_once() -> None:
    loaded = load(tiny_chat_model()[1])
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    output = reference_generate(load_reference(tiny_chat_model()[1]), prompt, 24)
    assert len(set(output)) >= 8
    assert not set(output[:16]) & set(loaded.spec.eos_token_ids)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_covered_families_run_in_the_fused_decoder_and_others_in_transformers_modules(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = tiny_model(name)
    with caplog.at_level(logging.INFO):
        loaded = load(folder)
    covered = config.model_type in COVERED
    assert isinstance(loaded.model, FusedDecoder) is covered
    reasons = [record.message for record in caplog.records if "transformers' modules" in record.message]
    assert len(reasons) == (0 if covered else 1)
    assert loaded.spec == ModelSpec.from_config(config)
    assert not loaded.model.training
    weights = sum(p.numel() * 4 for p in load_reference(folder).parameters())
    assert weights <= loaded.weights_bytes <= weights + 10 * 2048 * 16 * 4, "weights and rotary tables, nothing else"


def test_a_model_that_is_not_covered_is_refused_where_the_fused_decoder_is_demanded() -> None:
    with pytest.raises(UnsupportedModelError, match=r"DECODER is 'fused'.*mixtral has no fused decoder.*DECODER=auto"):
        load(tiny_model("mixtral")[1], decoder="fused")


def test_a_models_own_end_of_sequence_tokens_are_found(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(folder).spec.eos_token_ids == load_modules(folder).spec.eos_token_ids == (7, 9, 2)


def test_weights_that_are_no_safetensors_are_left_to_transformers(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    torch.save(load_reference(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert not isinstance(load(folder).model, FusedDecoder)


def test_a_code_of_its_own_is_not_replaced_by_the_fused_decoder(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Model"})
    assert isinstance(load(folder).model, FusedDecoder), "not trusted: transformers' own family is what is served"
    with pytest.raises(StartupError):
        load(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 2048),
        ({"max_model_len": 100, "max_batch_tokens": 70}, 100),
        ({"max_model_len": 100, "max_batch_tokens": 4096}, 4096),
    ],
)
def test_rotary_tables_reach_as_far_as_requests_and_batches(settings: dict[str, Any], longest: int) -> None:
    model = load(tiny_model("llama")[1], **settings).model
    assert model.get_buffer("rotary_all").shape == (longest, 16)


def test_the_served_name_can_be_set() -> None:
    assert load(tiny_model("llama")[1], served_model_name="mine").name == "mine"


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def promise_another_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def promise_more_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=5)


def promise_wider_layers(folder: Path) -> None:
    edit_config(folder, intermediate_size=256)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_weights, "holds no weights"),
        (cut_weights, "model.safetensors is cut short"),
        (promise_another_shard, "model-00002.safetensors is missing"),
        (promise_more_layers, "lack .* tensors"),
        (promise_wider_layers, "shape|can't be loaded"),
        (remove_config, "no config.json"),
        (break_config, "can't be read"),
    ],
)
def test_a_damaged_folder_is_refused_by_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], None], words: str, decoder: str
) -> None:
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(ModelLoadError, match=words):
        load(folder, decoder=decoder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "never_heard_of"}, "never_heard_of.*doesn't know"),
        ({"model_type": "bloom"}, "bloom.*ALiBi"),
        ({"model_type": "gptj", "rotary_dim": 8}, "gptj.*attention interface"),
        ({"model_type": "clip"}, "clip"),
    ],
)
def test_an_architecture_that_cannot_be_served_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = copied(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        load(folder)


def test_code_that_comes_with_a_model_needs_permission(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(StartupError, match="TRUST_REMOTE_CODE"):
        load(folder)


# --- quantisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["int8", "fp8"])
@pytest.mark.parametrize("source", ["{}", "random://{}"])
@pytest.mark.parametrize("decoder", ["fused", "transformers"])
def test_quantised_products_replace_those_of_the_layers_alone(decoder: str, source: str, setting: str) -> None:
    model = source.format(tiny_model("llama")[1])
    loaded = load(model, decoder=decoder, quantization=setting)
    small = [name for name, module in loaded.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(small) == 3 * (4 if decoder == "fused" else 7)
    assert not [name for name in small if "head" in name]
    assert loaded.weights_bytes < 0.7 * load(model, decoder=decoder).weights_bytes


def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantised already \(gptq\)"):
        load(folder)


# --- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("llama", {"num_kv_heads": 4}, "heads"),
        ("llama", {"head_dim": 32}, "sizes"),
        ("llama", {"num_layers": 4, "layer_types": ("full",) * 4}, "layers"),
        ("mistral", {"layer_types": ("full",) * 2}, "window of 16"),
        ("gemma3", {"sliding_window": 8}, "window of 16 tokens, its configuration for 8"),
        ("gemma2", {"softcap": None}, "caps scores at 50"),
    ],
)
def test_the_probe_finds_where_layers_differ_from_the_spec(name: str, wrong: dict[str, Any], words: str) -> None:
    config, folder = tiny_model(name)
    model = load_reference(folder)
    probe(model, ModelSpec.from_config(config))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModelError, match=words):
        probe(model, dataclasses.replace(ModelSpec.from_config(config), **wrong))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert", "num_key_value_heads": 4}, "layer 0 is not causal"),
        ({"model_type": "diffllama"}, "layer 0 calls attention 2 times"),
        ({"model_type": "doge"}, "layer 0 brings a mask of its own"),
        ({"model_type": "granite_swa", "sliding_window": 16}, "layer 0 has attention sinks"),
        ({"model_type": "nemotron"}, "layer 0 does not pass keyword arguments on"),
    ],
)
def test_the_probe_refuses_families_whose_configuration_looks_fine(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = copied(tmp_path)
    edit_config(folder, num_hidden_layers=2, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        load(f"random://{folder}")


def test_the_probe_refuses_a_model_that_counts_positions_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = tiny_model("llama")
    model = load_reference(folder)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids, **kwargs: forward(**kwargs))
    with pytest.raises(UnsupportedModelError, match="positions"):
        probe(model, ModelSpec.from_config(config))


# --- random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_NAMES)
def test_random_weights_come_with_the_buffers_of_a_real_model(name: str) -> None:
    folder = tiny_model(name)[1]
    loaded = load_modules(f"random://{folder}/config.json")
    real = dict(load_reference(folder).named_buffers())
    found = dict(loaded.model.named_buffers())
    assert found.keys() == real.keys()
    for key, value in real.items():
        assert torch.equal(found[key], value), key
    assert loaded.tokenizer is None
    assert torch.isfinite(reference_logits(loaded.model, [1, 2, 3])).all()


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
def test_random_weights_are_the_same_at_every_start(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "packed_slowdown", lambda ops, dtype: 2.0)  # parameters, as they are read
    source = f"random://{tiny_model('llama')[1]}"
    first, second = load(source, decoder=decoder), load(source, decoder=decoder)
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.real_model
def test_random_weights_take_the_tokenizer_beside_them() -> None:
    loaded = load(f"random://{tiny_chat_model()[1]}/config.json")
    assert loaded.tokenizer is not None


# --- dtype and progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "device", "capability", "dtype"),
    [
        ("auto", "cpu", None, torch.float32),
        ("bfloat16", "cpu", None, torch.bfloat16),
        ("auto", "cuda:0", (8, 0), torch.bfloat16),
        ("auto", "cuda:0", (7, 5), torch.float16),
        ("float32", "cuda:0", (9, 0), torch.float32),
    ],
)
def test_the_dtype_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: str, capability: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(setting, torch.device(device)) == dtype


def test_progress_is_a_bar_on_a_terminal_and_log_lines_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert progress_for(Terminal()) is not LogBar
    assert progress_for(io.StringIO()) is LogBar
    with caplog.at_level(logging.INFO):
        for _ in progress_for(io.StringIO())(range(1000), desc="loading x"):
            pass
    assert [record.message.split(" after")[0] for record in caplog.records] == ["loading x: 100%"]
