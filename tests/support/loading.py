"""Loads models as the engine does, behind an attention function that needs no cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from models import tiny_model
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.model.loader import LoadedModel, load_model
from pagedserve_engine.model.progress import NoBar

CPU = torch.device("cpu")
ATTENTION = "test_loader_attention"


def plain_attention(
    module: torch.nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention without mask, window or cap: enough for short prompts of models that have none."""
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True
    )
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, plain_attention)


def load(model: str | Path, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(model), **settings), CPU, attention_name=ATTENTION, progress=NoBar)


def load_modules(model: str | Path, **settings: Any) -> LoadedModel:
    """In transformers' own modules."""
    return load(model, decoder="transformers", **settings)


def copied(tmp_path: Path, name: str = "llama") -> Path:
    return Path(shutil.copytree(tiny_model(name)[1], tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
