"""The only module that launches device work: one forward pass and the sampling of its rows."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import PreTrainedModel

from pagedserve_engine.batch import Batch, StepOutput
from pagedserve_engine.errors import DeviceFailedError, OutOfDeviceMemoryError, PagedServeError
from pagedserve_engine.inputs import InputBuilder, StepInputs
from pagedserve_engine.request import RequestState, SamplingParams, TokenLogprob
from pagedserve_engine.sampling import TokenLogprobs, sample, token_logprobs
from pagedserve_engine.sampling_state import SamplingState, collect_logprobs


class ModelRunner:
    """Runs batches through one model on one device."""

    def __init__(self, model: PreTrainedModel, inputs: InputBuilder, sampling: SamplingState) -> None:
        self._model = model
        self._inputs = inputs
        self._sampling = sampling

    def run(self, batch: Batch) -> StepOutput:
        """Compute one step. Raises OutOfDeviceMemoryError or DeviceFailedError where the device is at fault."""
        try:
            return self._run(batch)
        except PagedServeError:
            raise
        except Exception as error:
            raise classify(error) from error

    def _run(self, batch: Batch) -> StepOutput:
        for row in batch.admitted:
            self._sampling.bind(int(batch.slots[row]), batch.requests[row])
        inputs = self._inputs.build(batch)
        with torch.inference_mode():
            logits = self._forward(inputs)
            token_ids, logprobs, failed = self._sample(batch, logits[: inputs.num_sampled])
            prompt_logprobs = _score_prompts(inputs, logits)
        return StepOutput(token_ids, logprobs, prompt_logprobs, failed)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [K, vocab] of the wanted tokens."""
        output = self._model(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=inputs.logit_tokens,
            paged=inputs.paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(
        self, batch: Batch, logits: torch.Tensor
    ) -> tuple[np.ndarray, dict[int, TokenLogprob], dict[int, Exception]]:  # type: ignore[type-arg]
        slots = batch.slots[batch.sampled]
        if not len(slots):
            return np.empty(0, np.int32), {}, {}
        positions = (batch.context_lens + batch.query_lens)[batch.sampled]
        tensors = self._sampling.prepare(slots, positions)
        sampled = sample(logits, tensors)
        token_ids = sampled.token_ids.cpu().numpy().astype(np.int32)
        failed = self._sampling.commit(slots, token_ids)
        return token_ids, collect_logprobs(self._sampling, slots, token_ids, sampled), failed

    def warm_up(self, num_tokens: int, num_seqs: int) -> float:
        """Run a step of ``num_tokens`` query tokens in up to ``num_seqs`` rows on the null block; returns seconds.

        It writes into the null block alone and samples nothing that anybody sees.
        """
        started = time.perf_counter()
        inputs = self._inputs.build(_empty_batch(num_tokens, min(num_seqs, num_tokens), self._inputs))
        with torch.inference_mode():
            self._forward(inputs).argmax(-1).cpu()
        return time.perf_counter() - started


def classify(error: Exception) -> Exception:
    """What an error of the device means: memory that a smaller step may spare, a broken device, or just this step."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OutOfDeviceMemoryError(text.splitlines()[0] if text else "out of memory")
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if (accelerator_error is not None and isinstance(error, accelerator_error)) or "CUDA error" in text:
        return DeviceFailedError(f"the device failed: {text.splitlines()[0]}")
    return error


def _score_prompts(inputs: StepInputs, logits: torch.Tensor) -> dict[int, list[TokenLogprob]]:
    return {
        row.row: _entries(
            row.next_ids,
            token_logprobs(
                logits[row.first_logit : row.first_logit + len(row.next_ids)],
                torch.tensor(row.next_ids, device=logits.device),
                row.num_top,
            ),
        )
        for row in inputs.prompt_rows
    }


def _entries(token_ids: list[int], scored: TokenLogprobs) -> list[TokenLogprob]:
    columns = zip(
        token_ids,
        scored.logprobs.tolist(),
        scored.ranks.tolist(),
        scored.top_ids.tolist(),
        scored.top_logprobs.tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in columns
    ]


def _empty_batch(num_tokens: int, num_rows: int, inputs: InputBuilder) -> Batch:
    """Rows of one token, the last one taking the rest, all on the null block."""
    query_lens = np.ones(num_rows, np.int32)
    query_lens[-1] += num_tokens - num_rows
    columns = -(-int(query_lens[-1]) // inputs.block_size)
    request = RequestState.create("warm-up", [0], SamplingParams(max_tokens=1), arrival_time=0.0, max_model_len=2)
    return Batch(
        requests=[request] * num_rows,
        slots=np.arange(num_rows, dtype=np.int32),
        query_lens=query_lens,
        context_lens=np.zeros(num_rows, np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        sampled=np.ones(num_rows, np.bool_),
        block_tables=tuple(np.zeros((num_rows, columns), np.int32) for _ in range(inputs.num_groups)),
        num_decodes=num_rows - 1,
        admitted=(),
    )
