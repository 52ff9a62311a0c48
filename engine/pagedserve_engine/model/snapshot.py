"""GGUF files become safetensors folders, once.

Reading a GGUF takes transformers tens of seconds (it parses the vocabulary in Python and unpacks every block), a
safetensors folder one. So the first start converts into the cache folder and later starts find the result. A folder's
name holds everything that its content depends on, and it appears under that name only when complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedserve_engine.errors import ModelLoadError
from pagedserve_engine.model.gguf_header import Value, read_header
from pagedserve_engine.model.progress import Progress, transformers_progress

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_LAYOUT_VERSION = 1
"""Rises when this module writes something else from the same file."""


def file_digest(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def snapshot_folder(cache_dir: Path, gguf: Path, *, digest: str, dtype: str) -> Path:
    """Where the snapshot of the file with this SHA-256 lies, or would lie, in ``cache_dir``.

    float32 holds every value that a GGUF can hold, and serves any dtype; a snapshot in a 16-bit dtype is rounded as
    loading would round it, and takes half the disk: so each dtype has its own, unless a float32 one is there already.
    """
    exact = cache_dir / _folder_name(gguf, digest, "float32")
    return exact if exact.is_dir() else cache_dir / _folder_name(gguf, digest, dtype)


def _folder_name(gguf: Path, digest: str, dtype: str) -> str:
    version = metadata.version("transformers")
    return f"{gguf.stem}-{digest[:16]}-{dtype}-transformers-{version}-{_LAYOUT_VERSION}"


def convert(gguf: Path, cache_dir: Path, *, dtype: str, progress: Progress) -> Path:
    """The safetensors folder that holds ``gguf`` in ``dtype`` (a torch dtype's name), made now unless it exists.

    Raises ModelLoadError where the file can't be read or the cache folder not be written.
    """
    digest = file_digest(gguf)
    folder = snapshot_folder(cache_dir, gguf, digest=digest, dtype=dtype)
    if folder.is_dir():
        return folder
    try:
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _convert_into(folder, gguf, getattr(torch, dtype), progress)
    except OSError as error:
        raise ModelLoadError(
            f"{gguf} can't be converted into {cache_dir}: {error}; set CACHE_DIR to a writable folder with space",
            param="cache_dir",
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold that file's lock, across processes; the system frees it if the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(folder: Path, gguf: Path, dtype: torch.dtype, progress: Progress) -> None:
    logger.info("converting %s to safetensors, once, into %s", gguf.name, folder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        _write_snapshot(gguf, Path(temporary), dtype, progress)
        # A rename within one folder is atomic: others see the whole snapshot or none.
        Path(temporary).rename(folder)
        Path(temporary).mkdir()  # for TemporaryDirectory to remove
    folder.chmod(0o755)
    logger.info("converted %s in %.0f s", gguf.name, time.monotonic() - started)


def _write_snapshot(gguf: Path, target: Path, dtype: torch.dtype, progress: Progress) -> None:
    header = read_header(gguf)
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with transformers_progress(progress, f"converting {gguf.name}"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, dtype=dtype, **_unpacked())
        except (ValueError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
            raise ModelLoadError(
                f"{gguf} can't be read as a GGUF model: {error}; use a folder of safetensors, or another conversion",
                param="model",
            ) from error
        # The values are plain now; transformers refuses to save while the configuration still says GGUF.
        vars(model.config).pop("quantization_config", None)
        vars(model).pop("hf_quantizer", None)
        model.config.architectures = [type(model).__name__]
        _mend_tokenizer(tokenizer, header)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    _keep_as_saved(target, tokenizer)


def _unpacked() -> dict[str, Any]:
    """Ask for plain values where transformers could keep a GGUF's blocks packed (newer than 5.17)."""
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _mend_tokenizer(tokenizer: Any, header: dict[str, Value]) -> None:
    """Set what the file says and some version of transformers loses: <bos>, special tokens, template, byte decoding."""
    for name, key in _SPECIAL_TOKENS.items():
        if f"tokenizer.ggml.{key}" in header:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(header[f"tokenizer.ggml.{key}"]))
    if "tokenizer.chat_template" in header:
        tokenizer.chat_template = header["tokenizer.chat_template"]
    backend = tokenizer.backend_tokenizer
    if header.get("tokenizer.ggml.model") == "gpt2":
        backend.decoder = ByteLevel()
    bos = tokenizer.bos_token
    if "tokenizer.ggml.add_bos_token" in header and bos is not None:
        start = f"{bos} " if header["tokenizer.ggml.add_bos_token"] else ""
        backend.post_processor = TemplateProcessing(
            single=f"{start}$A", pair=f"{start}$A {start}$B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
        )


def _keep_as_saved(target: Path, tokenizer: Any) -> None:
    """Name the tokenizer class that takes tokenizer.json as it is: a model's own would build parts of it anew."""
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["add_bos_token"] = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    path.write_text(json.dumps(settings, indent=2) + "\n")
