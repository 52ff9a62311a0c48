"""transformers' own modules, behind the attention function that we registered: they serve what no recipe covers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pagedserve_engine.model.probe import probe
from pagedserve_engine.model.products import widen_products
from pagedserve_engine.model.progress import Progress, transformers_progress
from pagedserve_engine.model.quantization import Quantize, quantize_model
from pagedserve_engine.model.sources import ModelSource
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.model.weights import refuse_missing

_AUTO_MODEL: Any = AutoModelForCausalLM
"""transformers gives these methods no types."""

RANDOM_SEED = 0
"""Random weights are the same at every start."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a model is to stand."""

    device: torch.device
    dtype: torch.dtype
    attention_name: str
    """As registered with transformers."""
    quantize: Quantize | None = None
    """Makes the layers' products small."""

    @property
    def reading_device(self) -> torch.device:
        """Where weights are read to: a model that is to be made small need never fit the device while it is wide."""
        return self.device if self.quantize is None else torch.device("cpu")


def load_modules(source: ModelSource, shape: Any, spec: ModelSpec, place: Place, progress: Progress) -> PreTrainedModel:
    """The model in evaluation mode, probed; ``shape`` is its configuration."""
    if source.kind == "random":
        model = _random_model(shape, place)
    else:
        with transformers_progress(progress, f"loading {source.name}"):
            model = _read_model(source.path, shape, place)
    model.train(False).requires_grad_(False)
    probe(model, spec)
    if place.quantize is not None:
        quantize_model(model, place.quantize, device=place.device)
        model.to(place.device)  # type: ignore[arg-type]
    widen_products(model)
    return model


def _read_model(folder: Path, shape: Any, place: Place) -> PreTrainedModel:
    model, report = _AUTO_MODEL.from_pretrained(
        folder,
        config=shape,
        dtype=place.dtype,
        device_map={"": place.reading_device},
        attn_implementation=place.attention_name,
        local_files_only=True,
        trust_remote_code=bool(getattr(shape, "auto_map", None)),
        output_loading_info=True,
    )
    refuse_missing(folder, report["missing_keys"])
    return model  # type: ignore[no-any-return]


def _random_model(shape: Any, place: Place) -> PreTrainedModel:
    """The real shape with random weights, built where they stay: buffers come out as in any other construction."""
    devices = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), place.device:
        torch.manual_seed(RANDOM_SEED)
        model = _AUTO_MODEL.from_config(shape, dtype=place.dtype, attn_implementation=place.attention_name)
    return model  # type: ignore[no-any-return]
