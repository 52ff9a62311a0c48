"""A processor on a shadow cache and model, step by step: what the scheduler's tests drive."""

from __future__ import annotations

import itertools

from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.manager import CacheManager
from pagedserve_engine.processor import ContinuousBatchProcessor
from pagedserve_engine.request import FinishReason, GenerationOutput, RequestState, SamplingParams
from pagedserve_engine.scheduler.scheduler import Scheduler
from pagedserve_engine.speculation import NgramDrafter
from shadow import VOCAB, ShadowRunner, expected_output


class Engine:
    """A processor on a shadow cache, and what each request was told."""

    def __init__(
        self,
        *,
        layer_types: tuple[str, ...] = ("full", "full"),
        window: int | None = None,
        block_size: int = 4,
        num_blocks: int = 32,
        budget: int = 16,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        policy: str = "fifo",
        safety_margin: float = 0.0,
        prefix_cache: bool = True,
        eos: tuple[int, ...] = (),
        steps_in_flight: int = 0,
        drafted: int = 0,
        period: int | None = None,
    ) -> None:
        layout = CacheLayout.build(
            layer_types, window=window, num_kv_heads=1, head_dim=2, block_size=block_size, dtype_bytes=4
        )
        self.max_model_len = max_model_len or min(256, layout.largest_length(num_blocks, block_size))
        self.cache = CacheManager(
            layout,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(
            self.cache,
            policy=policy,
            max_batch_tokens=budget,
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            safety_margin=safety_margin,
            eos_token_ids=eos,
            drafter=NgramDrafter(drafted) if drafted else None,
        )
        self.runner = ShadowRunner(layout, num_blocks=num_blocks, max_num_seqs=max_num_seqs, period=period)
        self.processor = ContinuousBatchProcessor(self.scheduler, self.runner, steps_in_flight=steps_in_flight)
        self.news: dict[str, list[GenerationOutput]] = {}
        self.requests: dict[str, RequestState] = {}
        self._arrivals = itertools.count()

    def add(self, prompt: list[int], max_tokens: int = 8, **params: object) -> str:
        request_id = f"r{len(self.requests)}"
        request = RequestState.create(
            request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **params}),  # type: ignore[arg-type]
            arrival_time=float(next(self._arrivals)),
            max_model_len=self.max_model_len,
        )
        self.requests[request_id] = request
        self.news[request_id] = []
        refused = self.processor.add_request(request)
        assert refused is None
        return request_id

    def step(self) -> None:
        outputs, _ = self.processor.step()
        self.tell(outputs)

    def tell(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            assert not self.news[output.request_id] or not self.news[output.request_id][-1].finished
            self.news[output.request_id].append(output)

    def cancel(self, request_id: str) -> None:
        output = self.processor.cancel(request_id)
        self.tell([output] if output else [])

    def run(self, max_steps: int = 2000) -> int:
        for step in range(max_steps):
            if self.scheduler.idle:
                return step
            self.step()
        raise AssertionError("requests were left over")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.news[request_id] for token in output.token_ids]

    def reason(self, request_id: str) -> FinishReason | None:
        return self.news[request_id][-1].finish_reason if self.news[request_id] else None

    def expect(self, request_id: str) -> list[int]:
        """The whole output."""
        request = self.requests[request_id]
        return expected_output(request.prompt_ids, request.max_tokens, VOCAB, self.runner.period)

    def assert_exact(self, request_id: str) -> None:
        assert self.tokens(request_id) == self.expect(request_id)
        assert self.reason(request_id) is FinishReason.LENGTH


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + i * 7) % VOCAB for i in range(length)]
