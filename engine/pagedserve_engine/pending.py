"""A launched step on its way to the host: what it holds until it is read, and what an error of the device means."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from pagedserve_engine.batch import Batch, Int32Array, StepOutput
from pagedserve_engine.errors import DeviceFailedError, OutOfDeviceMemoryError, PagedServeError, StepFailedError
from pagedserve_engine.inputs import PromptRow
from pagedserve_engine.request import TokenLogprob
from pagedserve_engine.sampling import TokenLogprobs
from pagedserve_engine.sampling_plan import Reported
from pagedserve_engine.sampling_state import SamplingState, read_logprobs

NOT_A_NUMBER = -1
"""Stands for a token id, so that one copy from the device brings both."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What a step's S sampled rows got, as far as it is on its way to the host."""

    token_ids: torch.Tensor
    """[S] int32, NOT_A_NUMBER where the scores were none."""
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
        replayed: bool,
    ) -> None:
        self._batch = batch
        self._replayed = replayed
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
        for at in np.flatnonzero(token_ids == NOT_A_NUMBER).tolist():
            token_ids[at] = 0
            self._failed[int(rows[at])] = StepFailedError("the model's scores for the next token are not numbers (NaN)")
        if self._batch.read_first:
            for at, error in self._sampling.advance(self._batch.slots[rows], token_ids).items():
                self._failed.setdefault(int(rows[at]), error)
        logprobs = self._sampled.read_logprobs(token_ids)
        return StepOutput(token_ids, logprobs, prompt_logprobs, self._failed, self._replayed)


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


def to_host(logprobs: TokenLogprobs) -> TokenLogprobs:
    """Copies in pinned memory, queued without waiting."""
    return TokenLogprobs(
        *(getattr(logprobs, part.name).to("cpu", non_blocking=True) for part in dataclasses.fields(TokenLogprobs))
    )
