"""What is asked of every engine: token ids and output lengths, fixed by seeds.

Standard library alone, because each engine's own environment imports it. Lengths depend on the workload, contents on
the repetition too: a prompt never comes twice, so that no prefix cache answers from an earlier repetition.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

FIRST_TOKEN_ID, LAST_TOKEN_ID = 1_000, 48_000
"""Ids that are ordinary text in the vocabularies of the small models (special tokens lie outside)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how many tokens to generate, whatever the model says."""

    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A named set of requests; a length is given as (lowest, highest) tokens, drawn log-uniformly."""

    name: str
    description: str
    count: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    shared_tokens: int = 0
    """Tokens that all prompts begin with, on top of ``prompt_tokens``."""
    max_running: int = 256
    """Requests that the engine may run at once."""
    model: str = "small"
    """Which of ``benchmarks.models`` answers."""

    def requests(self, repetition: int, count: int | None = None) -> list[Request]:
        """The first ``count`` (all) requests of a repetition."""
        lengths = random.Random(self.name)
        contents = random.Random(f"{self.name} {repetition}")
        shared = _token_ids(contents, self.shared_tokens)
        return [
            Request(
                shared + _token_ids(contents, log_uniform(lengths, *self.prompt_tokens)),
                log_uniform(lengths, *self.output_tokens),
            )
            for _ in range(self.count if count is None else count)
        ]


def log_uniform(source: random.Random, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, short ones as likely as long ones in each octave."""
    return round(math.exp(source.uniform(math.log(low), math.log(high))))


def _token_ids(source: random.Random, count: int) -> list[int]:
    return [source.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(count)]


GREEDY = Workload(
    name="greedy_16x64",
    description="16 prompts of 32 tokens, 64 greedy tokens each",
    count=16,
    prompt_tokens=(32, 32),
    output_tokens=(64, 64),
)
MIXED = Workload(
    name="mixed_64",
    description="64 requests, prompts of 16-512 tokens, outputs of 16-128, log-uniform",
    count=64,
    prompt_tokens=(16, 512),
    output_tokens=(16, 128),
)
SHARED_PREFIX = Workload(
    name="shared_prefix_32",
    description="32 prompts of the same 1,000 tokens and 32 of their own, submitted together, 16 tokens each",
    count=32,
    prompt_tokens=(32, 32),
    output_tokens=(16, 16),
    shared_tokens=1_000,
)
HTTP = Workload(
    name="http",
    description="streamed completions, prompts of 16-256 tokens, outputs of 32-96, two requests for each client",
    count=64,
    prompt_tokens=(16, 256),
    output_tokens=(32, 96),
)
OFFLINE_32 = Workload(
    name="http",  # the same seeds, so the same requests as over HTTP at concurrency 32
    description="the requests of HTTP at concurrency 32 without HTTP, 32 at once",
    count=64,
    prompt_tokens=HTTP.prompt_tokens,
    output_tokens=HTTP.output_tokens,
    max_running=32,
)
GEMMA = Workload(
    name="gemma_32",
    description="Gemma 3 270M: 32 requests, prompts of 16-768 tokens (beyond its window of 512), outputs of 16-64",
    count=32,
    prompt_tokens=(16, 768),
    output_tokens=(16, 64),
    model="gemma",
)
OFFLINE_WORKLOADS = {"greedy": GREEDY, "mixed": MIXED, "shared": SHARED_PREFIX, "gemma": GEMMA}
HTTP_CONCURRENCY = (1, 8, 32)


def smaller(workload: Workload) -> Workload:
    """A quarter of the requests and of the generated tokens, for a quick look that proves nothing."""
    low, high = workload.output_tokens
    return Workload(
        name=workload.name,
        description=f"quick look: {workload.description}",
        count=max(2, workload.count // 4),
        prompt_tokens=workload.prompt_tokens,
        output_tokens=(max(4, low // 4), max(4, high // 4)),
        shared_tokens=workload.shared_tokens,
        max_running=workload.max_running,
        model=workload.model,
    )
