"""Two real engines that several scenarios share, and the texts that they give undisturbed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from e2e.streams import Question

from operator_world import World

ENV = [{"name": "NUM_THREADS", "value": "1"}]
"""Several engines share two cores."""
QUESTIONS = tuple(Question(prompt, 300) for prompt in ("Once upon a time", "The river", "Four", "In the year", "Why"))


@dataclass(frozen=True)
class Pair:
    """A resource of a small model with two replicas, and where its Service answers."""

    world: World
    name: str
    address: str
    texts: Mapping[Question, str]
