"""transformers' own continuous batching, with the same cache and the settings it takes by itself on a CPU."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.adapters import Outcome, Settings
from benchmarks.workloads import Request

PAGE_SIZE = 256  # its default


class TransformersContinuousBatching:
    """A manager that is kept between runs; its thread, which polls, lives only during one."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        dtype = getattr(torch, settings.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=dtype, attn_implementation="sdpa")
        # No token has the id -1: outputs have the length asked for.
        self._generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._batching = ContinuousBatchingConfig(
            num_blocks=settings.cache_tokens // PAGE_SIZE,
            max_batch_tokens=2_048,
            max_requests_per_batch=settings.max_running,
        )

    def run(self, requests: list[Request]) -> Outcome:
        """Submit all, then collect what has finished."""
        with self._model.continuous_batching_context_manager(
            generation_config=self._generation,
            continuous_batching_config=self._batching,
            persistent_manager=True,
        ) as manager:
            ids = [manager.add_request(request.prompt_ids, max_new_tokens=request.max_tokens) for request in requests]
            lengths: dict[str, int] = {}
            while len(lengths) < len(ids):
                output = manager.get_result(timeout=1)
                if output is not None and output.error:
                    raise RuntimeError(output.error)
                if output is not None and output.is_finished():
                    lengths[output.request_id] = len(output.generated_tokens)
                if output is None and not manager.is_running():
                    raise RuntimeError("the generation thread ended")
        return Outcome([lengths[request_id] for request_id in ids], None)


def load(settings: Settings) -> TransformersContinuousBatching:
    return TransformersContinuousBatching(settings)
