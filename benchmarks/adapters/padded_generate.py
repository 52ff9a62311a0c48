"""Plain ``generate`` in padded batches of 16, in order of arrival: each batch runs until its longest output ends."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.adapters import Outcome, Settings
from benchmarks.workloads import Request

BATCH_SIZE = 16
PADDING_ID = 0


class PaddedGenerate:
    """The model itself; only the tokens that a request asked for count."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        dtype = getattr(torch, settings.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=dtype, attn_implementation="sdpa")

    def run(self, requests: list[Request]) -> Outcome:
        """One ``generate`` for each batch."""
        lengths: list[int] = []
        for start in range(0, len(requests), BATCH_SIZE):
            batch = requests[start : start + BATCH_SIZE]
            longest = max(len(request.prompt_ids) for request in batch)
            paddings = [longest - len(request.prompt_ids) for request in batch]
            ids = [
                [PADDING_ID] * padding + request.prompt_ids for padding, request in zip(paddings, batch, strict=True)
            ]
            mask = [[0] * padding + [1] * (longest - padding) for padding in paddings]
            steps = max(request.max_tokens for request in batch)
            tokens = self._model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                generation_config=GenerationConfig(
                    do_sample=False, eos_token_id=None, pad_token_id=PADDING_ID, max_new_tokens=steps
                ),
            )
            generated = tokens.shape[1] - longest
            lengths += [min(generated, request.max_tokens) for request in batch]
        return Outcome(lengths, sum(len(request.prompt_ids) for request in requests))


def load(settings: Settings) -> PaddedGenerate:
    return PaddedGenerate(settings)
