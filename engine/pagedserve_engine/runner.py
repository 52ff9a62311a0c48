"""The only module that launches device work: one forward pass and the sampling of its rows.

``launch`` queues a step and the copies of its results to the host, and waits for nothing; ``PendingStep.read`` waits
for these copies alone. Between two steps the tokens stay on the device: ``last_tokens`` has each slot's latest, and
rows that a step in flight samples take theirs from there. Everything is queued in one stream, so a step finds what
those before it wrote, and may overwrite what they read. A launched step holds all that reading it takes, because its
slots may belong to others by then.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel

from pagedserve_engine.batch import Batch, Int32Array, StepOutput
from pagedserve_engine.errors import DeviceFailedError, OutOfDeviceMemoryError, PagedServeError, StepFailedError
from pagedserve_engine.inputs import InputBuilder, PromptRow, StepInputs
from pagedserve_engine.request import RequestState, SamplingParams, TokenLogprob
from pagedserve_engine.sampling import SamplingTensors, TokenLogprobs, sample, token_logprobs
from pagedserve_engine.sampling_plan import Reported
from pagedserve_engine.sampling_state import SamplingState, read_logprobs

_NOT_A_NUMBER = -1
"""Stands for a token id, so that one copy from the device brings both."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What a step's S sampled rows got, as far as it is on its way to the host."""

    token_ids: torch.Tensor
    """[S] int32, _NOT_A_NUMBER where the scores were none."""
    logprobs: TokenLogprobs | None
    reported: Reported

    def read_logprobs(self, token_ids: Int32Array) -> dict[int, TokenLogprob]:
        """By place among the sampled rows, for those that asked."""
        if self.logprobs is None:
            return {}
        rows, num_top = self.reported.rows, self.reported.num_top
        return dict(zip(rows.tolist(), read_logprobs(token_ids[rows], self.logprobs, num_top), strict=True))


class PendingStep:
    """A step on its way. On CUDA its tensors lie in pinned memory and hold once ``done`` is reached."""

    def __init__(
        self,
        batch: Batch,
        sampling: SamplingState,
        *,
        sampled: SampledRows | None,
        prompts: list[tuple[PromptRow, TokenLogprobs]],
        failed: dict[int, Exception],
    ) -> None:
        self._batch = batch
        self._sampling = sampling
        self._sampled = sampled
        self._prompts = prompts
        self._failed = failed
        self._done: torch.Event | None = None

    def mark(self, device: torch.device) -> Self:
        """Remember the place in the stream of ``device`` at which everything has arrived."""
        if device.type == "cuda":
            self._done = torch.cuda.current_stream(device).record_event()
        return self

    def read(self) -> StepOutput:
        """Wait for the step and bring back what it computed; called once. Raises what ``launch`` raises."""
        try:
            if self._done is not None:
                self._done.synchronize()
            return self._read()
        except PagedServeError:
            raise
        except Exception as error:
            raise classify(error) from error

    def _read(self) -> StepOutput:
        prompt_logprobs = {
            prompt.row: read_logprobs(prompt.next_ids, found, [prompt.num_top] * len(prompt.next_ids))
            for prompt, found in self._prompts
        }
        if self._sampled is None:
            return StepOutput(np.empty(0, np.int32), {}, prompt_logprobs, self._failed)
        token_ids = self._sampled.token_ids.numpy().copy()
        rows = np.flatnonzero(self._batch.sampled)
        for at in np.flatnonzero(token_ids == _NOT_A_NUMBER).tolist():
            token_ids[at] = 0
            self._failed[int(rows[at])] = StepFailedError("the model's scores for the next token are not numbers (NaN)")
        if self._batch.lockstep:
            for at, error in self._sampling.advance(self._batch.slots[rows], token_ids).items():
                self._failed.setdefault(int(rows[at]), error)
        return StepOutput(token_ids, self._sampled.read_logprobs(token_ids), prompt_logprobs, self._failed)


class ModelRunner:
    """Runs batches through one model on one device."""

    def __init__(
        self, model: PreTrainedModel, inputs: InputBuilder, sampling: SamplingState, *, max_num_seqs: int
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._sampling = sampling
        self._device = inputs.device
        self._prompt_lens = np.zeros(max_num_seqs, np.int32)
        """[max_num_seqs] prompt tokens of the request bound to each slot."""
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self._device)
        """[max_num_seqs + 1] the token that each slot sampled last; the last one is for rows that only pad."""

    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step. Raises OutOfDeviceMemoryError or DeviceFailedError where the device is at fault."""
        try:
            return self._launch(batch)
        except PagedServeError:
            raise
        except Exception as error:
            raise classify(error) from error

    def _launch(self, batch: Batch) -> PendingStep:
        failed = self._bind(batch)
        with torch.inference_mode():
            inputs = self._inputs.build(batch)
            logits = self._forward(inputs)
            sampled = self._sample(batch, inputs, logits) if inputs.num_sampled else None
            prompts = [(row, _to_host(_score_prompt(row, logits))) for row in inputs.prompt_rows]
        return PendingStep(batch, self._sampling, sampled=sampled, prompts=prompts, failed=failed).mark(self._device)

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
        if inputs.carries:
            inputs.carry_over(self.last_tokens)
        output = self._model(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=inputs.logit_tokens,
            paged=inputs.paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, batch: Batch, inputs: StepInputs, logits: torch.Tensor) -> SampledRows:
        """Choose the sampled rows' next tokens, keep them for the next step, and send them to the host."""
        slots = batch.slots[batch.sampled]
        positions = (batch.context_lens + batch.query_lens)[batch.sampled]
        tensors = self._sampling.prepare(slots, positions, positions - self._prompt_lens[slots])
        sampled = choose(logits[: inputs.num_sampled], tensors, inputs.sampled_slots, last_tokens=self.last_tokens)
        self._sampling.record(slots, sampled.token_ids)
        return SampledRows(
            token_ids=sampled.marked.to("cpu", non_blocking=True),
            logprobs=None if sampled.logprobs is None else _to_host(sampled.logprobs),
            reported=self._sampling.reported(slots),
        )

    def warm_up(self, num_tokens: int, num_seqs: int) -> float:
        """Run a step of ``num_tokens`` query tokens in up to ``num_seqs`` rows on the null block; returns seconds.

        It writes into the null block alone and samples nothing that anybody sees.
        """
        started = time.perf_counter()
        batch = _empty_batch(num_tokens, min(num_seqs, num_tokens), self._inputs)
        with torch.inference_mode():
            inputs = self._inputs.build(batch)
            self._forward(inputs).argmax(-1).cpu()
        return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens that were chosen, on the device."""

    token_ids: torch.Tensor
    """[S] int64."""
    marked: torch.Tensor
    """[S] int32: the same, with _NOT_A_NUMBER where the scores are NaN."""
    logprobs: TokenLogprobs | None


def choose(logits: torch.Tensor, tensors: SamplingTensors, slots: torch.Tensor, *, last_tokens: torch.Tensor) -> Choice:
    """Sample each row of ``logits`` [S, vocab] and leave the tokens in ``last_tokens`` at ``slots`` [S] (int64)."""
    sampled = sample(logits, tensors)
    last_tokens.index_copy_(0, slots, sampled.token_ids)
    # A row of which any score is NaN has NaN for its likeliest token.
    chosen = logits.gather(1, sampled.token_ids.unsqueeze(1)).squeeze(1)
    marked = sampled.token_ids.masked_fill(chosen.isnan(), _NOT_A_NUMBER).to(torch.int32)
    return Choice(sampled.token_ids, marked, sampled.logprobs)


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


def _score_prompt(row: PromptRow, logits: torch.Tensor) -> TokenLogprobs:
    own = logits[row.first_logit : row.first_logit + len(row.next_ids)]
    return token_logprobs(own, row.targets, row.num_top)


def _to_host(logprobs: TokenLogprobs) -> TokenLogprobs:
    """Copies in pinned memory, queued without waiting."""
    return TokenLogprobs(
        *(getattr(logprobs, part.name).to("cpu", non_blocking=True) for part in dataclasses.fields(TokenLogprobs))
    )


def _empty_batch(num_tokens: int, num_rows: int, inputs: InputBuilder) -> Batch:
    """Rows of one token, the last one taking the rest, all on the null block."""
    query_lens = np.ones(num_rows, np.int32)
    query_lens[-1] += num_tokens - num_rows
    columns = -(-int(query_lens[-1]) // inputs.block_size)
    request = RequestState.create("warm-up", [0], SamplingParams(max_tokens=1), arrival_time=0.0, max_model_len=2)
    return Batch(
        requests=[request] * num_rows,
        slots=np.arange(num_rows, dtype=np.int32),
        stays=np.zeros(num_rows, np.int32),
        query_lens=query_lens,
        context_lens=np.zeros(num_rows, np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        carried=np.zeros(num_rows, np.bool_),
        sampled=np.ones(num_rows, np.bool_),
        block_tables=tuple(np.zeros((num_rows, columns), np.int32) for _ in range(inputs.num_groups)),
        num_decodes=num_rows - 1,
        admitted=(),
    )
