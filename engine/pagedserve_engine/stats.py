"""What the core and the serving side report in plain numbers; metrics.py turns them into Prometheus' instruments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a request ended, as the serving side saw it."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    ERROR = "error"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step in numbers: counts are of this step alone, the rest is the state that it left."""

    duration: float
    """Seconds from the start of scheduling to the end of the commit; with steps in flight, that of an earlier step."""
    wait: float = 0.0
    """Seconds of it in which the host waited for a step's results; where steps compute at their launch, none."""
    gap: float = 0.0
    """Seconds from the last step's results to this one's launch, in which nothing was in flight; 0 where one was."""
    num_tokens: int
    """Query tokens launched; 0: nothing was (requests were cancelled, say), and only the state is news."""
    budget: int
    """Query tokens that the step could have taken."""
    num_running: int
    num_waiting: int
    oldest_waiting_age: float = 0.0
    """Seconds; 0 where nothing waits."""
    queue_waits: Sequence[float] = ()
    """Seconds that each request scheduled for the first time in this step had waited."""
    blocks_free: int
    """Cached ones included: they are free to take."""
    blocks_referenced: int
    blocks_cached: int
    """Unreferenced, but findable by their prefix."""
    blocks_total: int
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache answered."""
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafted ones that requests got."""
    graph_replays: int = 0
    graph_captures: int = 0

    @classmethod
    def idle(cls, *, num_blocks: int) -> StepStats:
        """The state before the first step: of ``num_blocks``, all but the null block are free."""
        free = max(num_blocks - 1, 0)
        return cls(
            duration=0.0,
            num_tokens=0,
            budget=1,
            num_running=0,
            num_waiting=0,
            blocks_free=free,
            blocks_referenced=0,
            blocks_cached=0,
            blocks_total=free,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One ended request."""

    outcome: Outcome
    duration: float
    """Seconds from arrival to the end."""
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """A setting's asked and actual number; ``requested`` is None where it was ``auto``."""

    requested: int | None
    actual: int
