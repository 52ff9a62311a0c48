"""From a parsed request to the outputs of its sequences, whole or as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pagedserve_engine.errors import (
    CancelledRequestError,
    InvalidParameterError,
    ModelNotFoundError,
    RequestTimeoutError,
)
from pagedserve_engine.request import FinishReason, SamplingParams, TokenLogprob
from pagedserve_engine.server.common import Generation
from pagedserve_engine.server.keys import Record
from pagedserve_engine.text import TextRequest

if TYPE_CHECKING:
    from pagedserve_engine.frontend import AsyncEngine
    from pagedserve_engine.stream import TextStream
    from pagedserve_engine.text import TextOutput


def check_model(engine: AsyncEngine, name: str | None) -> None:
    """Raise ModelNotFoundError unless ``name`` is what is served, or absent."""
    if name is not None and name != engine.name:
        raise ModelNotFoundError(f"the model {name[:200]!r} isn't served here: ask for {engine.name!r}", param="model")


def make_requests(
    engine: AsyncEngine, response_id: str, prompts: Sequence[Sequence[int]], generation: Generation
) -> list[TextRequest]:
    """One request for each sequence, prompt after prompt; given seeds differ within a prompt.

    Raises InvalidParameterError where there are more than could ever be taken at once.
    """
    num_sequences = len(prompts) * generation.best_of
    most = engine.config.max_queue + engine.config.max_num_seqs
    if num_sequences > most:
        raise InvalidParameterError(
            f"the request asks for {num_sequences} sequences: ask for at most {most}", param="prompt"
        )
    return [
        TextRequest(
            request_id=f"{response_id}-{number * generation.best_of + sample}",
            prompt_ids=prompt,
            params=_seeded(generation, sample),
            stop=generation.stop,
            include_stop=generation.include_stop,
            skip_special_tokens=generation.skip_special_tokens,
            salt=generation.salt,
        )
        for number, prompt in enumerate(prompts)
        for sample in range(generation.best_of)
    ]


def _seeded(generation: Generation, sample: int) -> SamplingParams:
    seed = generation.params.seed
    return generation.params if seed is None or not sample else replace(generation.params, seed=(seed + sample) % 2**64)


@contextmanager
def submitted(engine: AsyncEngine, requests: Sequence[TextRequest], *, deadline: float) -> Iterator[list[TextStream]]:
    """The streams of ``requests``, closed at the end: what still runs then is aborted.

    After ``deadline`` (monotonic seconds) that counts as a timeout, before it as the client's doing.
    """
    streams = engine.submit(requests)
    try:
        yield streams
    finally:
        for stream in streams:
            stream.close(timed_out=time.monotonic() >= deadline)


@asynccontextmanager
async def time_limit(seconds: float, *, since: float) -> AsyncIterator[None]:
    """Raise RequestTimeoutError where the block lasts longer than ``seconds`` after ``since`` (monotonic)."""
    try:
        async with asyncio.timeout_at(since + seconds):
            yield
    except TimeoutError:
        raise RequestTimeoutError(
            f"the request ran longer than {seconds:g} seconds: ask for fewer tokens, or raise REQUEST_TIMEOUT_SECONDS"
        ) from None


@dataclass(slots=True)
class Usage:
    """Tokens of one response."""

    prompt_tokens: int
    """Each prompt once, however many choices it has."""
    completion_tokens: int = 0
    """Of every sequence generated, those that best_of drops included."""
    cached_tokens: dict[int, int] = field(default_factory=dict)
    """By prompt: tokens that the prefix cache answered for its first sequence."""

    def render(self) -> dict[str, Any]:
        """As OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


class Meter:
    """Counts what a response's sequences bring, for its usage and for its record."""

    def __init__(self, record: Record, prompts: Sequence[Sequence[int]], generation: Generation) -> None:
        self.usage = Usage(sum(map(len, prompts)))
        self._record = record
        self._samples = generation.best_of
        record.num_prompt_tokens = self.usage.prompt_tokens

    def count(self, index: int, output: TextOutput, *, dropped: bool = False) -> None:
        """Note an output of sequence ``index``; of dropped ones no token counts."""
        num_tokens = 0 if dropped else len(output.token_ids)
        self._record.count(num_tokens)
        self.usage.completion_tokens += num_tokens
        if output.num_cached_tokens and index % self._samples == 0:
            self.usage.cached_tokens[index // self._samples] = output.num_cached_tokens
            self._record.num_cached_tokens = sum(self.usage.cached_tokens.values())
        if output.finish_reason is not None:
            self._record.finish_reasons = [*self._record.finish_reasons, output.finish_reason.value]


@dataclass(slots=True)
class Collected:
    """A whole sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason = FinishReason.STOP
    stop_reason: str | int | None = None

    @property
    def mean_logprob(self) -> float:
        """Of the chosen tokens, where they were asked for."""
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


async def collect(streams: Sequence[TextStream], meter: Meter, *, dropped: bool = False) -> list[Collected]:
    """Every sequence to its end. One after the other is enough: a stream keeps what comes while nobody reads it."""
    return [await _collect(index, stream, meter, dropped=dropped) for index, stream in enumerate(streams)]


async def _collect(index: int, stream: TextStream, meter: Meter, *, dropped: bool) -> Collected:
    whole, texts = Collected(), []
    async for output in stream:
        meter.count(index, output, dropped=dropped)
        whole.prompt_logprobs = output.prompt_logprobs or whole.prompt_logprobs
        if output.finish_reason is not None:
            whole.finish_reason, whole.stop_reason = checked(output.finish_reason), output.stop_reason
        if not dropped:
            texts.append(output.text)
            whole.token_ids += output.token_ids
            whole.logprobs += output.logprobs or []
    whole.text = "".join(texts)
    return whole


def checked(reason: FinishReason) -> FinishReason:
    """``reason``, unless the sequence was cancelled under its reader's hands."""
    if reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        raise CancelledRequestError("the request was cancelled")
    return reason


async def merge(streams: Sequence[TextStream]) -> AsyncGenerator[tuple[int, TextOutput], None]:
    """The outputs of all streams with their index, as they come; close the iterator."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, TextOutput] | Exception | None] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: TextStream, queue: asyncio.Queue[tuple[int, TextOutput] | Exception | None]
) -> None:
    try:
        async for output in stream:
            await queue.put((index, output))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
