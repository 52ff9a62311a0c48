"""The only module that launches device work: one forward pass and the sampling of its rows."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import PreTrainedModel

from pagedserve_engine.batch import Batch, Int32Array, StepOutput
from pagedserve_engine.errors import DeviceFailedError, OutOfDeviceMemoryError, PagedServeError, StepFailedError
from pagedserve_engine.inputs import InputBuilder, StepInputs
from pagedserve_engine.request import RequestState, SamplingParams, TokenLogprob
from pagedserve_engine.sampling import sample, token_logprobs
from pagedserve_engine.sampling_state import SamplingState, read_logprobs

_NOT_A_NUMBER = -1
"""Stands for a token id, so that one copy from the device brings both."""


class ModelRunner:
    """Runs batches through one model on one device."""

    def __init__(
        self, model: PreTrainedModel, inputs: InputBuilder, sampling: SamplingState, *, max_num_seqs: int
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._sampling = sampling
        self._prompt_lens = np.zeros(max_num_seqs, np.int32)
        """[max_num_seqs] prompt tokens of the request bound to each slot."""

    def run(self, batch: Batch) -> StepOutput:
        """Compute one step. Raises OutOfDeviceMemoryError or DeviceFailedError where the device is at fault."""
        try:
            return self._run(batch)
        except PagedServeError:
            raise
        except Exception as error:
            raise classify(error) from error

    def _run(self, batch: Batch) -> StepOutput:
        failed = self._bind(batch)
        inputs = self._inputs.build(batch)
        with torch.inference_mode():
            logits = self._forward(inputs)
            token_ids, logprobs = self._sample(batch, logits[: inputs.num_sampled], failed)
            prompt_logprobs = _score_prompts(inputs, logits)
        return StepOutput(token_ids, logprobs, prompt_logprobs, failed)

    def _bind(self, batch: Batch) -> dict[int, Exception]:
        """Tell the sampler of the requests that came in; returns, by row, what is wrong with what they ask."""
        failed: dict[int, Exception] = {}
        for row in batch.admitted:
            slot, request = int(batch.slots[row]), batch.requests[row]
            self._prompt_lens[slot] = len(request.prompt_ids)
            try:
                self._sampling.bind(slot, request)
            except PagedServeError as error:
                failed[row] = error
        return failed

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
        self, batch: Batch, logits: torch.Tensor, failed: dict[int, Exception]
    ) -> tuple[Int32Array, dict[int, TokenLogprob]]:
        """The next token of each sampled row and the log probabilities of those that asked; adds to ``failed``."""
        slots = batch.slots[batch.sampled]
        if not len(slots):
            return np.empty(0, np.int32), {}
        positions = (batch.context_lens + batch.query_lens)[batch.sampled]
        tensors = self._sampling.prepare(slots, positions, positions - self._prompt_lens[slots])
        sampled = sample(logits, tensors)
        token_ids = _mark_nan(logits, sampled.token_ids).cpu().numpy().astype(np.int32)
        rows = np.flatnonzero(batch.sampled)
        for at in np.flatnonzero(token_ids == _NOT_A_NUMBER).tolist():
            token_ids[at] = 0
            failed[int(rows[at])] = StepFailedError("the model's scores for the next token are not numbers (NaN)")
        for at, error in self._sampling.commit(slots, token_ids).items():
            failed.setdefault(int(rows[at]), error)
        if sampled.logprobs is None:
            return token_ids, {}
        return token_ids, self._sampling.collect_logprobs(slots, token_ids, sampled.logprobs)

    def warm_up(self, num_tokens: int, num_seqs: int) -> float:
        """Run a step of ``num_tokens`` query tokens in up to ``num_seqs`` rows on the null block; returns seconds.

        It writes into the null block alone and samples nothing that anybody sees.
        """
        started = time.perf_counter()
        inputs = self._inputs.build(_empty_batch(num_tokens, min(num_seqs, num_tokens), self._inputs))
        with torch.inference_mode():
            self._forward(inputs).argmax(-1).cpu()
        return time.perf_counter() - started


def _mark_nan(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """``token_ids`` [S], with a mark where the row of ``logits`` [S, vocab] is NaN: the likeliest token is then NaN."""
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return token_ids.masked_fill(chosen.isnan(), _NOT_A_NUMBER)


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
    scored: dict[int, list[TokenLogprob]] = {}
    for row in inputs.prompt_rows:
        next_ids = torch.tensor(row.next_ids, device=logits.device)
        found = token_logprobs(logits[row.first_logit : row.first_logit + len(row.next_ids)], next_ids, row.num_top)
        scored[row.row] = read_logprobs(row.next_ids, found, [row.num_top] * len(row.next_ids))
    return scored


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
