"""A request: what the client asked for, what the core knows of it, and what it answers.

``SamplingParams`` and ``GenerationOutput`` cross between the two sides and hold plain values only.
``RequestState`` belongs to the scheduler; nothing else changes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from pagedserve_engine.errors import ContextLengthError, InvalidParameterError, PagedServeError


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the output must conform to: ``kind`` is ``json_object``, ``json_schema`` or ``regex``."""

    kind: str
    source: str
    """The schema as JSON text, or the pattern; empty for ``json_object``."""
    param: str = field(default="response_format", compare=False)
    """The client's field that asks for it, for errors."""


_BOUNDS = (
    ("max_tokens", 1, math.inf),
    ("min_tokens", 0, math.inf),
    ("temperature", 0.0, 1e6),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, math.inf),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-6, 1e6),
    ("frequency_penalty", -1e6, 1e6),
    ("presence_penalty", -1e6, 1e6),
    ("logprobs", 0, math.inf),
    ("prompt_logprobs", 0, math.inf),
)
"""(field, lowest, highest): what the arithmetic bears; the HTTP side asks for OpenAI's own, narrower ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is generated. Raises InvalidParameterError for a number that is out of its range."""

    max_tokens: int | None = None
    """Tokens to generate at most; None: as many as the context has room for."""
    min_tokens: int = 0
    """No end before so many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as transformers does it."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Random numbers depend on (seed, position) alone, so that what shares the batch never matters."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; 0: of the chosen token; k: of the k likeliest as well. Of the raw distribution."""
    prompt_logprobs: int | None = None
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            # A NaN compares false with everything, so ask whether it is inside, not whether it is outside.
            if value is not None and not low <= value <= high:
                bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
                raise InvalidParameterError(f"{name} is {value}: give a number {bounds}", param=name)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether a token's score depends on how often it came before."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class RequestStatus(Enum):
    """Where a request stands. WAITING may come again after RUNNING: preemption."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


_NEXT: Mapping[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.WAITING, RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """Log probability of a token, and of the likeliest at its place (ids and values, best first)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class GenerationOutput:
    """News of one request: what came since the last message, and its end if it ended."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One entry for each prompt token, the first None; sent once, with the first token."""
    finish_reason: FinishReason | None = None
    error: PagedServeError | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache answered."""
    stop_token_id: int | None = None
    """The token id, not part of the text, that ended the request."""

    @property
    def finished(self) -> bool:
        """Whether this is the request's last message."""
        return self.finish_reason is not None


@dataclass(slots=True, eq=False)
class RequestState:
    """What the core knows of one sequence; owned and changed by the scheduler alone."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    arrival_time: float
    """Monotonic seconds."""
    max_tokens: int
    """Tokens to generate at most, resolved against the context length."""
    seed: int
    salt: bytes = b""
    """Keeps the prefix caches of tenants apart."""
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1
    """Row in the scheduler's table while running, -1 otherwise."""
    output_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks known so far."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        arrival_time: float,
        max_model_len: int,
        salt: bytes = b"",
    ) -> RequestState:
        """Check ``prompt_ids`` against ``max_model_len`` (tokens) and resolve what the parameters leave open.

        Raises ContextLengthError where the request can never fit.
        """
        room = max_model_len - len(prompt_ids)
        if not prompt_ids:
            raise ContextLengthError("the prompt is empty: send at least one token", param="prompt")
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context holds {max_model_len}: "
                f"send at most {max_model_len - 1}, one less than the context",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens asks for {params.max_tokens} more, but the "
                f"model's context holds {max_model_len}: ask for at most {room}",
                param="max_tokens",
            )
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        return cls(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            arrival_time=arrival_time,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=seed,
            salt=salt,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is RequestStatus.FINISHED

    def move_to(self, status: RequestStatus) -> None:
        """Change the status; a transition that the state machine does not know is a bug."""
        assert status in _NEXT[self.status], f"{self.request_id}: {self.status} -> {status}"
        self.status = status
