"""From the configuration to a model in memory, ready for the runner: weights, shape, tokenizer and name."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import MemoryPlanError, ModelLoadError, UnsupportedModelError
from pagedserve_engine.memory import AUTO_BATCH_TOKENS
from pagedserve_engine.model.decoder import FusedDecoder
from pagedserve_engine.model.decoder_loading import Blueprint, Build, draw_blueprint, random_decoder, read_decoder
from pagedserve_engine.model.modules import RANDOM_SEED, Place, load_modules
from pagedserve_engine.model.progress import Progress, progress_for
from pagedserve_engine.model.quantization import choose_quantization, refuse_quantized
from pagedserve_engine.model.recipes import NotCovered
from pagedserve_engine.model.snapshot import convert
from pagedserve_engine.model.sources import ModelSource, resolve
from pagedserve_engine.model.spec import ModelSpec, refusal, token_ids
from pagedserve_engine.model.tokenizer import Tokenizer
from pagedserve_engine.model.weights import find_files
from pagedserve_engine.ranks import ALONE, Rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, in evaluation mode, calling the attention function that it was loaded for."""

    model: torch.nn.Module
    """Called as a transformers model is: that, or a FusedDecoder."""
    spec: ModelSpec
    tokenizer: Tokenizer | None
    """None where random weights come without one: prompts are token ids then."""
    dtype: torch.dtype
    """Of activations, and of weights but where ``widen_products`` keeps a wider copy instead."""
    weights_bytes: int
    """Bytes that parameters and buffers hold on the device, shared ones once."""
    name: str
    """What clients call the model."""


def load_model(
    config: EngineConfig,
    device: torch.device,
    *,
    attention_name: str,
    progress: Progress | None = None,
    rank: Rank = ALONE,
) -> LoadedModel:
    """Load what ``config.model`` names, or the part of ``rank``, onto ``device``.

    ``attention_name`` is registered with transformers already.

    Raises ModelLoadError, UnsupportedModelError or MemoryPlanError with what to do about it.
    """
    progress = progress_for() if progress is None else progress
    started = time.monotonic()
    source = resolve(config, progress)
    dtype = choose_dtype(config.dtype, device)
    if source.kind == "gguf":
        source = _converted(source, config, dtype, progress)
    shape = read_config(source.path, trust_remote_code=config.trust_remote_code)
    spec = _supported_spec(shape)
    refuse_quantized(shape)
    quantize = choose_quantization(config.quantization, device)
    model: torch.nn.Module
    with _clear_errors(source, device):
        files = find_files(source.path) if source.kind == "folder" else []
        blueprint = _choose_decoder(config, source, shape, spec, files)
        if blueprint is None:
            _check_whole(source, rank)
            model = load_modules(source, shape, spec, Place(device, dtype, attention_name, quantize), progress)
        else:
            build = Build(
                device=device,
                dtype=dtype,
                positions=_positions(config, spec),
                quantize=quantize,
                rank=rank.index,
                world=rank.world,
                collective=rank.collective,
            )
            model = _fused_model(blueprint, build, source, files, progress)
    tokenizer = Tokenizer.load(_folder(source), config, model_eos=_model_eos(model, spec))
    spec = dataclasses.replace(spec, eos_token_ids=tokenizer.eos_token_ids if tokenizer else _model_eos(model, spec))
    weights = weights_bytes(model)
    logger.info("loaded %s: %.2f GB in %s on %s, %.1f s", source.name, weights / 1e9, dtype, device, _since(started))
    return LoadedModel(model, spec, tokenizer, dtype, weights, config.served_model_name or source.name)


def resolve_model(config: EngineConfig, progress: Progress | None = None) -> Path:
    """The folder of safetensors that ``config.model`` is served from, downloaded or converted if it has to be."""
    progress = progress_for() if progress is None else progress
    source = resolve(config, progress)
    if source.kind == "gguf":
        source = _converted(source, config, choose_dtype(config.dtype, torch.device("cpu")), progress)
    return _folder(source)


def load_spec(config: EngineConfig, progress: Progress | None = None) -> ModelSpec:
    """The model's shape without its weights; a GGUF file is read but not converted."""
    source = resolve(config, progress_for() if progress is None else progress)
    gguf = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
    path = source.path.parent if gguf else source.path
    return _supported_spec(read_config(path, trust_remote_code=config.trust_remote_code, **gguf))


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype that DTYPE names; ``auto`` is bfloat16 where a GPU has it, float16 on older ones, float32 on a CPU."""
    if setting != "auto":
        named: torch.dtype = getattr(torch, setting)
        return named
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters and buffers; tensors that share a storage count once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def read_config(path: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """transformers' configuration from a folder or a JSON file; raises ModelLoadError or UnsupportedModelError."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        text = str(error)
        if "trust_remote_code" in text:
            reason = "it comes with Python code of its own; set TRUST_REMOTE_CODE=true if you trust it"
            raise UnsupportedModelError(f"{path}: {reason}", param="trust_remote_code") from error
        kind = _model_type(path)
        if kind is not None and kind in text:
            raise refusal(kind, "the installed transformers doesn't know this architecture") from error
        raise ModelLoadError(f"{path}: config.json can't be read: {text}", param="model") from error
    except (OSError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path}: config.json can't be read: {error}", param="model") from error


def _model_type(path: Path) -> str | None:
    file = path / "config.json" if path.is_dir() else path
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (OSError, ValueError):
        return None
    return kind if isinstance(kind, str) else None


def _since(started: float) -> float:
    return time.monotonic() - started


def _folder(source: ModelSource) -> Path:
    return source.path.parent if source.path.is_file() else source.path


def _converted(source: ModelSource, config: EngineConfig, dtype: torch.dtype, progress: Progress) -> ModelSource:
    cache_dir = config.cache_dir or Path.home() / ".cache" / "pagedserve" / "models"
    folder = convert(source.path, cache_dir, dtype=str(dtype).removeprefix("torch."), progress=progress)
    return ModelSource("folder", folder, source.name)


def _supported_spec(shape: Any) -> ModelSpec:
    spec = ModelSpec.from_config(shape)
    if "AutoModelForCausalLM" in (getattr(shape, "auto_map", None) or {}):
        return spec  # code of the model's own: the probe decides
    if type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refusal(shape.model_type, "transformers has no causal language model of this type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    if not getattr(known, "_supports_attention_backend", False):
        raise refusal(shape.model_type, "its attention does not go through transformers' attention interface")
    return spec


def _choose_decoder(
    config: EngineConfig, source: ModelSource, shape: Any, spec: ModelSpec, files: list[Path]
) -> Blueprint | None:
    """What the fused decoder needs to know, or None for transformers' modules; DECODER may insist on either."""
    if config.decoder == "transformers":
        return None
    found: Blueprint | NotCovered
    if config.trust_remote_code and getattr(shape, "auto_map", None):
        found = NotCovered("it comes with code of its own")
    elif source.kind == "folder" and not files:
        found = NotCovered("its weights are no safetensors")
    else:
        found = draw_blueprint(shape, spec)
    if isinstance(found, Blueprint):
        return found
    if config.decoder == "fused":
        raise UnsupportedModelError(f"DECODER is 'fused' and {source.name}: {found.reason}; set DECODER=auto")
    logger.info("%s runs in transformers' modules, which are slower: %s", source.name, found.reason)
    return None


def _check_whole(source: ModelSource, rank: Rank) -> None:
    if rank.world > 1:
        raise UnsupportedModelError(
            f"TENSOR_PARALLEL_SIZE is {rank.world} and {source.name} runs in transformers' modules, which are not "
            "split over devices: set it to 1, or choose a model that the fused decoder covers (and DECODER=auto)",
            param="tensor_parallel_size",
        )


def _positions(config: EngineConfig, spec: ModelSpec) -> int:
    """Positions that a step may name: those of requests, and those of the largest batch while it warms up."""
    length = spec.max_position_embeddings
    if config.max_model_len != "auto":
        length = min(length, config.max_model_len)
    return max(length, AUTO_BATCH_TOKENS if config.max_batch_tokens == "auto" else config.max_batch_tokens)


def _fused_model(
    blueprint: Blueprint, build: Build, source: ModelSource, files: list[Path], progress: Progress
) -> FusedDecoder:
    if source.kind == "random":
        return random_decoder(blueprint, build, seed=RANDOM_SEED)
    return read_decoder(blueprint, build, files, progress=progress, what=f"loading {source.name}")


def _model_eos(model: torch.nn.Module, spec: ModelSpec) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    return tuple(dict.fromkeys((*token_ids(getattr(generation, "eos_token_id", None)), *spec.eos_token_ids)))


@contextmanager
def _clear_errors(source: ModelSource, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            f"the weights of {source.name} don't fit into the memory of {device}: use a larger device, a smaller model "
            f"or DTYPE=bfloat16 ({error})",
            param="model",
        ) from error
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"{source.name} can't be loaded: {error}", param="model") from error
