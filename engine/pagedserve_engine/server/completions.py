"""POST /v1/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pagedserve_engine.request import FinishReason, TokenLogprob
from pagedserve_engine.server.bodies import json_response
from pagedserve_engine.server.events import Chunks
from pagedserve_engine.server.generation import (
    Collected,
    Meter,
    check_model,
    checked,
    collect,
    make_requests,
    merge,
    submitted,
    time_limit,
)
from pagedserve_engine.server.keys import CONFIG, ENGINE, RECORD
from pagedserve_engine.server.logprobs import LogprobRenderer
from pagedserve_engine.server.replies import head, trace_request
from pagedserve_engine.server.schema import CompletionRequest, parse_completion
from pagedserve_engine.server.streaming import respond

if TYPE_CHECKING:
    from pagedserve_engine.frontend import AsyncEngine
    from pagedserve_engine.stream import TextStream
    from pagedserve_engine.text import TextOutput


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Complete one or several prompts, whole or streaming."""
    engine, record = request.app[ENGINE], RECORD.get()
    limit = request.app[CONFIG].request_timeout_seconds
    async with time_limit(limit, since=record.started):
        asked = parse_completion(await request.read(), engine.vocab_size)
        check_model(engine, asked.generation.model)
        if asked.generation.params.grammar is not None:
            await engine.compile_grammar(asked.generation.params.grammar)
        prompts = await _encode(engine, asked)
    meter = Meter(record, prompts, asked.generation)
    writer = CompletionWriter(
        asked=asked,
        prompts=prompts,
        echoed=_echoed(engine, asked, prompts),
        head=head(request, f"cmpl-{uuid.uuid4().hex}", "text_completion"),
        names=LogprobRenderer(engine.tokenizer, asked.logprobs or 0),
        prompt_names=LogprobRenderer(engine.tokenizer, asked.prompt_logprobs or 0),
    )
    trace_request(request, "text_completion", asked.generation, writer.head["id"])
    requests = make_requests(engine, writer.head["id"], prompts, asked.generation)
    with submitted(engine, requests, deadline=record.started + limit) as streams:
        if asked.generation.stream:
            return await respond(request, _events(writer, streams, meter))
        async with time_limit(limit, since=record.started):
            sequences = await collect(streams, meter, dropped=asked.prompt_only)
    return json_response(writer.whole(sequences, meter))


async def _encode(engine: AsyncEngine, asked: CompletionRequest) -> list[list[int]]:
    return [
        await engine.encode(prompt, add_special_tokens=asked.add_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in asked.prompts
    ]


def _echoed(engine: AsyncEngine, asked: CompletionRequest, prompts: Sequence[list[int]]) -> list[str]:
    if not asked.echo:
        return [""] * len(prompts)
    return [
        prompt
        if isinstance(prompt, str)
        else engine.tokenizer.decode(ids, skip_special_tokens=False)
        if engine.tokenizer
        else ""
        for prompt, ids in zip(asked.prompts, prompts, strict=True)
    ]


async def _events(writer: CompletionWriter, streams: Sequence[TextStream], meter: Meter) -> AsyncGenerator[bytes, None]:
    async with aclosing(merge(streams)) as outputs:
        async for index, output in outputs:
            meter.count(index, output, dropped=writer.asked.prompt_only)
            data = writer.chunk(index, output)
            if data:
                yield data
    if writer.asked.generation.include_usage:
        yield writer.chunks.usage(meter.usage.render())


@dataclass(slots=True, kw_only=True)
class CompletionWriter:
    """Renders one response."""

    asked: CompletionRequest
    prompts: Sequence[list[int]]
    echoed: Sequence[str]
    """Text before each prompt's output."""
    head: dict[str, Any]
    names: LogprobRenderer
    prompt_names: LogprobRenderer
    chunks: Chunks = field(init=False)
    _offsets: dict[int, int] = field(default_factory=dict)
    """Of the streaming choices: characters written."""

    def __post_init__(self) -> None:
        self.chunks = Chunks(self.head, include_usage=self.asked.generation.include_usage, text_choice=_text_choice)

    def whole(self, sequences: Sequence[Collected], meter: Meter) -> bytes:
        """The response of all choices, the likeliest n of each prompt's."""
        generation = self.asked.generation
        choices = []
        for number in range(len(self.prompts)):
            samples = sequences[number * generation.best_of : (number + 1) * generation.best_of]
            if generation.best_of > generation.n:
                samples = sorted(samples, key=lambda sample: sample.mean_logprob, reverse=True)[: generation.n]
            choices += [self._choice(number, number * generation.n + at, sample) for at, sample in enumerate(samples)]
        return orjson.dumps({**self.head, "choices": choices, "usage": meter.usage.render()})

    def chunk(self, index: int, output: TextOutput) -> bytes:
        """What an output of sequence ``index`` makes known; empty where nothing is."""
        asked, first = self.asked, index not in self._offsets
        text = "" if asked.prompt_only else output.text
        plain = asked.logprobs is None and not asked.generation.return_token_ids and not (first and asked.echo)
        if plain and output.finish_reason is None:
            self._offsets[index] = 0
            return self.chunks.text(index, text) if text else b""
        part = Collected(
            text=text,
            token_ids=[] if asked.prompt_only else output.token_ids,
            logprobs=[] if asked.prompt_only else output.logprobs or [],
            prompt_logprobs=output.prompt_logprobs,
        )
        choice = self._choice(index // asked.generation.best_of, index, part, opens=first)
        self._offsets[index] = self._offsets.get(index, 0) + len(choice["text"])
        if output.finish_reason is None:
            return self.chunks.choice({**choice, "finish_reason": None})
        reason = FinishReason.LENGTH if asked.prompt_only else checked(output.finish_reason)
        return self.chunks.choice({**choice, "finish_reason": reason.value, "stop_reason": output.stop_reason})

    def _choice(self, number: int, index: int, part: Collected, *, opens: bool = True) -> dict[str, Any]:
        """A choice of prompt ``number``; ``opens`` puts what belongs before its output."""
        asked, echo = self.asked, self.asked.echo and opens
        reason = FinishReason.LENGTH if asked.prompt_only else part.finish_reason
        return {
            "index": index,
            "text": (self.echoed[number] if echo else "") + part.text,
            "logprobs": None if asked.logprobs is None else self._logprobs(number, index, part, echo=echo),
            "finish_reason": reason.value,
            "stop_reason": part.stop_reason,
            **self._extensions(number, part, opens=opens),
        }

    def _logprobs(self, number: int, index: int, part: Collected, *, echo: bool) -> dict[str, Any]:
        token_ids, entries = part.token_ids, part.logprobs
        if echo:
            before: list[TokenLogprob | None] = list(part.prompt_logprobs or [])
            return self.names.completion([*self.prompts[number][: len(before)], *token_ids], [*before, *entries], 0)
        return self.names.completion(token_ids, entries, self._offsets.get(index, 0))

    def _extensions(self, number: int, part: Collected, *, opens: bool) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.asked.generation.return_token_ids:
            more["token_ids"] = part.token_ids
            if opens:
                more["prompt_token_ids"] = self.prompts[number]
        if self.asked.prompt_logprobs is not None and part.prompt_logprobs is not None:
            more["prompt_logprobs"] = self.prompt_names.prompt(part.prompt_logprobs)
        return more


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
