"""A whole engine without its thread: a test decides when a step runs, and what comes and goes between two steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from models import reference_generate, reference_logits
from pagedserve_engine.assembly import build_core
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.graphs import Recorder
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, SamplingParams

NEAR_TIE = 1e-3
"""Gap of the reference's two highest logits below which another first choice is excused."""


class SteppedEngine:
    def __init__(
        self, folder: Path, *, steps_in_flight: int | None = None, recorder: Recorder | None = None, **settings: Any
    ) -> None:
        defaults = {"device": "cpu", "dtype": "float32", "num_threads": 2, "max_num_seqs": 8, "num_blocks": 64}
        config = EngineConfig(model=str(folder), **{**defaults, "block_size": 8, **settings})
        self.core = build_core(config, steps_in_flight=steps_in_flight, recorder=recorder)
        self.processor = self.core.processor
        self.scheduler = self.processor.scheduler
        self.requests: dict[str, RequestState] = {}
        self.news: dict[str, list[GenerationOutput]] = {}
        self._arrivals = itertools.count()

    def add(self, prompt: Sequence[int], max_tokens: int = 8, **params: Any) -> str:
        request_id = f"r{len(self.requests)}"
        request = RequestState.create(
            request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, "ignore_eos": True, **params}),
            arrival_time=float(next(self._arrivals)),
            max_model_len=self.core.max_model_len,
        )
        self.requests[request_id] = request
        self.news[request_id] = []
        refused = self.processor.add_request(request)
        self._tell([refused] if refused else [])
        return request_id

    def cancel(self, request_id: str) -> None:
        output = self.processor.cancel(request_id)
        self._tell([output] if output else [])

    def step(self) -> None:
        self._tell(self.processor.step()[0])

    def run(self) -> None:
        while not self.scheduler.idle:
            self.step()
        cache = self.scheduler.cache
        assert cache.num_free == cache.num_total, "blocks were leaked"

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.news[request_id] for token in output.token_ids]

    def last(self, request_id: str) -> GenerationOutput:
        return self.news[request_id][-1]

    def _tell(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            assert output.error is None, output.error
            self.news[output.request_id].append(output)


class Exactness:
    """Compares outputs with the reference's, token for token, and counts near ties."""

    def __init__(self, reference: PreTrainedModel) -> None:
        self._reference = reference
        self._known: dict[tuple[int, ...], list[int]] = {}
        self.num_tokens = 0
        self.num_excused = 0

    def expect(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        key = tuple(prompt)
        if len(self._known.get(key, ())) < num_tokens:
            self._known[key] = reference_generate(self._reference, list(prompt), num_tokens)
        return self._known[key][:num_tokens]

    def check(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        if not tokens:
            return
        expected = self.expect(prompt, len(tokens))
        self.num_tokens += len(tokens)
        first = next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
        if first is None:
            return
        logits = reference_logits(self._reference, [*prompt, *expected[:first]])[-1]
        top = torch.topk(logits.float(), 2).values
        gap = float(top[0] - top[1])
        assert gap < NEAR_TIE, f"token {first} is {tokens[first]}, not {expected[first]}, at a gap of {gap:.5f}"
        self.num_excused += 1

    def check_all(self, engine: SteppedEngine) -> None:
        for request_id, request in engine.requests.items():
            reason = engine.last(request_id).finish_reason
            assert reason in (FinishReason.LENGTH, FinishReason.CANCELLED), request_id
            if reason is FinishReason.LENGTH:
                assert len(engine.tokens(request_id)) == request.max_tokens
            self.check(request.prompt_ids, engine.tokens(request_id))
        assert self.num_excused <= 1 + self.num_tokens // 10_000, f"{self.num_excused} near ties in {self.num_tokens}"
