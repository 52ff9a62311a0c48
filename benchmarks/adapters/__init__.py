"""One adapter for each engine, imported in its own process: load a model folder once, then run sets of requests."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from benchmarks.workloads import Request

MODULES = {
    "pagedserve": "benchmarks.adapters.pagedserve",
    "transformers_cb": "benchmarks.adapters.transformers_cb",
    "padded_generate": "benchmarks.adapters.padded_generate",
    "vllm_cpu": "benchmarks.adapters.vllm_cpu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for every engine."""

    folder: str
    """Model in safetensors with its config.json."""
    dtype: str
    threads: int
    max_running: int
    cache_tokens: int = 32_768


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an engine says of a run."""

    output_lens: list[int]
    """Useful tokens of each request, in request order."""
    prompt_tokens_computed: int | None
    """Prompt tokens that no prefix cache answered; None where the engine does not tell."""


class Adapter(Protocol):
    """An engine that is loaded."""

    versions: dict[str, str]

    def run(self, requests: list[Request]) -> Outcome:
        """Submit all requests together and wait for the last token of the last one."""
        ...


def load(engine: str, settings: Settings) -> Adapter:
    """The adapter of ``engine``, its model loaded."""
    adapter: Adapter = importlib.import_module(MODULES[engine]).load(settings)
    return adapter
