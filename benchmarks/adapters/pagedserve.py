"""The engine of this repository through its library."""

from __future__ import annotations

from importlib.metadata import version

import torch

from benchmarks.adapters import Outcome, Settings
from benchmarks.workloads import Request
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.manager import ContinuousBatchingManager, run_batch
from pagedserve_engine.request import SamplingParams

BLOCK_SIZE = 32


def engine_config(settings: Settings) -> EngineConfig:
    """The settings that all engines share, in this engine's words."""
    return EngineConfig(
        model=settings.folder,
        dtype=settings.dtype,  # type: ignore[arg-type]
        num_threads=settings.threads,
        num_blocks=settings.cache_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        max_num_seqs=settings.max_running,
        host="127.0.0.1",
    )


class PagedServe:
    """The manager, started once."""

    def __init__(self, settings: Settings) -> None:
        self.versions = {"pagedserve": version("pagedserve-engine"), "torch": torch.__version__}
        self._manager = ContinuousBatchingManager.from_config(engine_config(settings))
        self._manager.start()

    def run(self, requests: list[Request]) -> Outcome:
        """Submit all in one message, then wait for each."""
        outputs = run_batch(
            self._manager,
            [request.prompt_ids for request in requests],
            [SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True) for request in requests],
            progress=False,
        )
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise failed
        prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        cached = sum(output.num_cached_tokens for output in outputs)
        return Outcome([len(output.token_ids) for output in outputs], prompt_tokens - cached)


def load(settings: Settings) -> PagedServe:
    return PagedServe(settings)
