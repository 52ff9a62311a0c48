"""A step on all ranks at once: rank 0 tells the others what it launches, and they launch the same.

A step travels as one message: the arrays of its batch and, for rows that enter a slot, what their requests ask. Nothing
comes back. Every rank samples for itself: logits are gathered, so that all have the same bits; the same kernels choose
from them, with random numbers that hang on (seed, position) alone; hence the same tokens, kept on each device for the
next step.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from pagedserve_engine.batch import Batch, PendingStep, StepOutput
from pagedserve_engine.request import RequestState, SamplingParams

_IDLE_SECONDS = 0.5
"""Without a step for so long, the last one is looked at: a device that failed must not go unseen."""


class Runner(Protocol):
    """What runs a batch on one rank."""

    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step."""


class Followers(Protocol):
    """The other ranks, as rank 0 sees them."""

    def send(self, message: bytes) -> None:
        """Give ``message`` to each."""

    def guard(self) -> AbstractContextManager[None]:
        """Whatever goes wrong inside, here or at another rank, is raised as DeviceFailedError with its cause."""


class Leader(Protocol):
    """Rank 0, as another rank sees it."""

    def poll(self, timeout: float) -> bool:
        """Whether a message comes within ``timeout`` seconds."""

    def recv_bytes(self) -> bytes:
        """The next message; raises EOFError at the end."""


class LockstepRunner:
    """Rank 0's runner. A step that fails on one rank leaves the others waiting, so that any failure is the last."""

    def __init__(self, runner: Runner, followers: Followers) -> None:
        self._runner = runner
        self._followers = followers

    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step on every rank; raises DeviceFailedError."""
        with self._followers.guard():
            self._followers.send(encode(batch))
            return _LockstepStep(self._runner.launch(batch), self._followers)


@dataclass(frozen=True, slots=True)
class _LockstepStep:
    pending: PendingStep
    followers: Followers

    def read(self) -> StepOutput:
        """Wait for rank 0's results, which are every rank's; raises DeviceFailedError."""
        with self.followers.guard():
            return self.pending.read()


def follow(leader: Leader, runner: Runner) -> None:
    """Launch what rank 0 launches, until it is gone (EOFError)."""
    requests: dict[int, RequestState] = {}
    last: PendingStep | None = None
    while True:
        if last is not None and not leader.poll(_IDLE_SECONDS):
            last.read()
            last = None
        batch = decode(leader.recv_bytes(), requests)
        last = runner.launch(batch)
        if batch.read_first:
            # Grammars follow the tokens on the host.
            last.read()
            last = None


@dataclass(frozen=True, slots=True)
class _Admission:
    """What a rank must know of a request that enters a slot."""

    request_id: str
    prompt_ids: Sequence[int]
    output_ids: list[int]
    params: SamplingParams
    seed: int

    def request(self) -> RequestState:
        return RequestState(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            params=self.params,
            arrival_time=0.0,
            max_tokens=0,
            seed=self.seed,
            output_ids=self.output_ids,
        )


def encode(batch: Batch) -> bytes:
    """The message for ``batch``; its requests travel when they are admitted."""
    admissions = [
        _Admission(request.request_id, request.prompt_ids, request.output_ids, request.params, request.seed)
        for request in (batch.requests[row] for row in batch.admitted)
    ]
    first = batch.num_decodes
    answered = [row for row, request in enumerate(batch.requests[first:], first) if request.output_ids]
    return pickle.dumps((dataclasses.replace(batch, requests=[]), admissions, answered), protocol=5)


def decode(message: bytes, requests: dict[int, RequestState]) -> Batch:
    """The batch of a message from rank 0; ``requests`` are those admitted so far by slot, and it adds to them."""
    batch: Batch
    batch, admissions, answered = pickle.loads(message)  # from rank 0 alone, through a pipe
    slots = batch.slots.tolist()
    for row, admission in zip(batch.admitted, admissions, strict=True):
        requests[slots[row]] = admission.request()
    own = [requests[slot] for slot in slots]
    for row in answered:
        # Whether there is output tells which prompt positions are still to be scored; what it is, nobody asks here.
        own[row].output_ids = own[row].output_ids or [0]
    return dataclasses.replace(batch, requests=own)
