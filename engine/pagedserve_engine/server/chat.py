"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.request import TokenLogprob
from pagedserve_engine.server.bodies import json_response
from pagedserve_engine.server.calls import (
    CallArguments,
    CallParser,
    CallStart,
    DemandedCallParser,
    FreeCallParser,
    Piece,
)
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
from pagedserve_engine.server.schema import ChatRequest, TemplateOptions, parse_chat
from pagedserve_engine.server.streaming import respond
from pagedserve_engine.server.tools import ToolChoice

if TYPE_CHECKING:
    from pagedserve_engine.frontend import AsyncEngine
    from pagedserve_engine.stream import TextStream
    from pagedserve_engine.text import TextOutput


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, whole or streaming."""
    engine, record = request.app[ENGINE], RECORD.get()
    limit = request.app[CONFIG].request_timeout_seconds
    async with time_limit(limit, since=record.started):
        asked = parse_chat(await request.read(), engine.vocab_size)
        check_model(engine, asked.generation.model)
        prompt = await encode_conversation(engine, asked.template)
        if asked.generation.params.grammar is not None:
            await engine.compile_grammar(asked.generation.params.grammar)
    meter = Meter(record, [prompt], asked.generation)
    kind = "chat.completion.chunk" if asked.generation.stream else "chat.completion"
    writer = ChatWriter(
        asked=asked,
        prompt=prompt,
        head=head(request, f"chatcmpl-{uuid.uuid4().hex}", kind),
        names=LogprobRenderer(engine.tokenizer, asked.logprobs or 0),
        prompt_names=LogprobRenderer(engine.tokenizer, asked.generation.params.prompt_logprobs or 0),
    )
    trace_request(request, "chat", asked.generation, writer.head["id"])
    requests = make_requests(engine, writer.head["id"], [prompt], asked.generation)
    with submitted(engine, requests, deadline=record.started + limit) as streams:
        if asked.generation.stream:
            return await respond(request, _events(writer, streams, meter))
        async with time_limit(limit, since=record.started):
            sequences = await collect(streams, meter)
    return json_response(writer.whole(sequences, meter))


async def encode_conversation(engine: AsyncEngine, template: TemplateOptions) -> list[int]:
    """The prompt's token ids. Raises InvalidParameterError where the template knows no tools but some were sent."""
    if template.tools and engine.tokenizer is not None and not engine.tokenizer.supports_tools:
        raise InvalidParameterError(
            "the model's chat template has no place for tools: set tool_choice to none, or serve a template that has "
            "(CHAT_TEMPLATE)",
            param="tools",
        )
    return await engine.encode_chat(
        template.messages,
        tools=template.tools,
        add_generation_prompt=template.add_generation_prompt,
        continue_final_message=template.continue_final_message,
        template_kwargs=template.template_kwargs,
    )


async def _events(writer: ChatWriter, streams: Sequence[TextStream], meter: Meter) -> AsyncGenerator[bytes, None]:
    async with aclosing(merge(streams)) as outputs:
        async for index, output in outputs:
            meter.count(index, output)
            data = writer.chunk(index, output)
            if data:
                yield data
    if writer.asked.generation.include_usage:
        yield writer.chunks.usage(meter.usage.render())


@dataclass(slots=True)
class _Turn:
    """A choice while it streams."""

    parser: CallParser | None
    calls: bool = False
    """Whether it has called a tool."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of tokens whose text the parser still holds."""


@dataclass(slots=True, kw_only=True)
class ChatWriter:
    """Renders one response."""

    asked: ChatRequest
    prompt: list[int]
    head: dict[str, Any]
    names: LogprobRenderer
    prompt_names: LogprobRenderer
    chunks: Chunks = field(init=False)
    _turns: dict[int, _Turn] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chunks = Chunks(self.head, include_usage=self.asked.generation.include_usage, text_choice=_text_choice)

    def whole(self, sequences: Sequence[Collected], meter: Meter) -> bytes:
        """The response of all choices."""
        body = {
            **self.head,
            "choices": [self._choice(index, sequence) for index, sequence in enumerate(sequences)],
            "usage": meter.usage.render(),
        }
        if self.asked.generation.return_token_ids:
            body["prompt_token_ids"] = self.prompt
        if sequences[0].prompt_logprobs is not None:
            body["prompt_logprobs"] = self.prompt_names.prompt(sequences[0].prompt_logprobs)
        return orjson.dumps(body)

    def _choice(self, index: int, sequence: Collected) -> dict[str, Any]:
        content, calls = read_output(sequence.text, self.asked.tool_choice)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": None if self.asked.logprobs is None else self.names.chat(sequence.logprobs),
            "finish_reason": _reason(sequence.finish_reason.value, calls=bool(calls)),
            "stop_reason": sequence.stop_reason,
            **({"token_ids": sequence.token_ids} if self.asked.generation.return_token_ids else {}),
        }

    def chunk(self, index: int, output: TextOutput) -> bytes:
        """What an output of choice ``index`` makes known: opening, deltas, end; empty where nothing is."""
        turn, data = self._turns.get(index), []
        if turn is None:
            turn = self._turns[index] = _Turn(new_parser(self.asked.tool_choice))
            data.append(self._opening(index))
        ids = self.asked.generation.return_token_ids
        if turn.parser is None and self.asked.logprobs is None and not ids:
            if output.text:
                data.append(self.chunks.text(index, output.text))
        else:
            data += self._deltas(index, turn, output)
        if output.finish_reason is not None:
            reason = _reason(checked(output.finish_reason).value, calls=turn.calls)
            data.append(
                self.chunks.choice(_delta_choice(index, {}, finish_reason=reason, stop_reason=output.stop_reason))
            )
        return b"".join(data)

    def _opening(self, index: int) -> bytes:
        choice = _delta_choice(index, {"role": "assistant", "content": "", "refusal": None})
        more = {"prompt_token_ids": self.prompt} if self.asked.generation.return_token_ids else {}
        return self.chunks.choice(choice, **more)

    def _deltas(self, index: int, turn: _Turn, output: TextOutput) -> list[bytes]:
        pieces: list[Piece] = [output.text] if output.text else []
        if turn.parser is not None:
            pieces = turn.parser.feed(output.text)
            pieces += turn.parser.finish() if output.finish_reason is not None else []
        turn.calls = turn.calls or any(isinstance(piece, CallStart) for piece in pieces)
        turn.logprobs += output.logprobs or []
        deltas = [_delta(piece) for piece in pieces]
        more = {"token_ids": output.token_ids} if self.asked.generation.return_token_ids else {}
        if not deltas and (more or (turn.logprobs and output.finish_reason is not None)):
            deltas.append({"content": ""})
        choices = [_delta_choice(index, delta) for delta in deltas]
        if choices:
            choices[0].update(more)
            if self.asked.logprobs is not None:
                choices[0]["logprobs"] = self.names.chat(turn.logprobs)
                turn.logprobs = []
        return [self.chunks.choice(choice) for choice in choices]


def new_parser(tool_choice: ToolChoice | None) -> CallParser | None:
    """What reads an output under ``tool_choice``; None: all of it is content."""
    if tool_choice is None:
        return None
    return DemandedCallParser() if tool_choice.grammar is not None else FreeCallParser(tool_choice.names)


def read_output(text: str, tool_choice: ToolChoice | None) -> tuple[str | None, list[dict[str, Any]]]:
    """Content and calls of a whole output; the content is None where there are calls alone."""
    parser = new_parser(tool_choice)
    if parser is None:
        return text, []
    content = ""
    calls: list[dict[str, Any]] = []
    for piece in [*parser.feed(text), *parser.finish()]:
        if isinstance(piece, str):
            content += piece
        elif isinstance(piece, CallStart):
            calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}})
        else:
            calls[piece.index]["function"]["arguments"] += piece.text
    return (content or None) if calls else content, calls


def _reason(reason: str, *, calls: bool) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return _delta_choice(index, {"content": text})


def _delta_choice(
    index: int, delta: dict[str, Any], *, finish_reason: str | None = None, **more: Any
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **more}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"content": piece}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    function = {"name": piece.name, "arguments": ""}
    return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}
