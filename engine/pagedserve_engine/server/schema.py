"""Request bodies as typed values: the tables check each field, this module what fields mean together.

Pure: no event loop, no HTTP, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.server import tables
from pagedserve_engine.server.common import Generation, read_generation, read_sampling
from pagedserve_engine.server.grammar import read_grammar
from pagedserve_engine.server.messages import for_template
from pagedserve_engine.server.objects import Object
from pagedserve_engine.server.prompts import check_vocabulary
from pagedserve_engine.server.tools import ToolChoice, read_tool_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A body of /v1/completions."""

    generation: Generation
    prompts: list[str | list[int]]
    add_special_tokens: bool
    echo: bool
    logprobs: int | None
    """Likeliest tokens to render for each position; None: no log probabilities."""
    prompt_logprobs: int | None
    """Likeliest tokens to render for each prompt position, beside an echo's."""
    prompt_only: bool
    """max_tokens was 0: one token is generated and dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """How a conversation becomes a prompt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A body of /v1/chat/completions."""

    generation: Generation
    template: TemplateOptions
    tool_choice: ToolChoice | None
    """None: the output is text."""
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """A body of /tokenize: ``prompt`` or ``template``."""

    model: str | None
    prompt: str | None
    template: TemplateOptions | None
    add_special_tokens: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    """A body of /detokenize."""

    model: str | None
    tokens: list[int]


def parse_completion(body: bytes, vocab_size: int) -> CompletionRequest:
    """Read a body of /v1/completions. Raises InvalidParameterError."""
    values = _read(tables.COMPLETION, body)
    n = values["n"]
    best_of = values["best_of"] or n
    if best_of < n:
        raise InvalidParameterError(f"best_of is {best_of}: give at least n, which is {n}", param="best_of")
    if best_of > n and values["stream"]:
        raise InvalidParameterError("best_of above n can't be streamed: the best are known at the end", param="best_of")
    for index, prompt in enumerate(values["prompt"]):
        if not isinstance(prompt, str):
            check_vocabulary(prompt, vocab_size, f"prompt[{index}]" if len(values["prompt"]) > 1 else "prompt")
    logprobs = values["logprobs"]
    scored = logprobs if logprobs is not None or best_of == n else 0
    params = read_sampling(
        values,
        vocab_size,
        max_tokens=max(1, values["max_tokens"]),
        logprobs=scored,
        prompt_logprobs=_larger(values["prompt_logprobs"], logprobs if values["echo"] else None),
        grammar=read_grammar(values),
    )
    return CompletionRequest(
        generation=read_generation(values, params, best_of=best_of),
        prompts=values["prompt"],
        add_special_tokens=values["add_special_tokens"],
        echo=values["echo"],
        logprobs=logprobs,
        prompt_logprobs=values["prompt_logprobs"],
        prompt_only=values["max_tokens"] == 0,
    )


def parse_chat(body: bytes, vocab_size: int) -> ChatRequest:
    """Read a body of /v1/chat/completions. Raises InvalidParameterError."""
    values = _read(tables.CHAT, body)
    if values["add_special_tokens"]:
        raise InvalidParameterError(
            "add_special_tokens is true: leave it out, the chat template adds special tokens",
            param="add_special_tokens",
        )
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise InvalidParameterError("top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")
    tool_choice = read_tool_choice(values)
    grammar = read_grammar(values)
    if tool_choice and grammar:
        raise InvalidParameterError(
            "constrained output and tools exclude each other: set tool_choice to none or leave response_format out",
            param="response_format",
        )
    logprobs = (values["top_logprobs"] or 0) if values["logprobs"] else None
    params = read_sampling(
        values,
        vocab_size,
        max_tokens=values["max_completion_tokens"] or values["max_tokens"],
        logprobs=logprobs,
        prompt_logprobs=values["prompt_logprobs"],
        grammar=tool_choice.grammar if tool_choice else grammar,
    )
    tools = list(tool_choice.tools) if tool_choice else None
    return ChatRequest(
        generation=read_generation(values, params, best_of=values["n"]),
        template=_template(values, tools),
        tool_choice=tool_choice,
        logprobs=logprobs,
    )


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Read a body of /tokenize. Raises InvalidParameterError."""
    values = _read(tables.TOKENIZE, body)
    if (values["prompt"] is None) == (values["messages"] is None):
        raise InvalidParameterError("give either prompt or messages", param="prompt")
    if values["messages"] is not None and values["add_special_tokens"]:
        raise InvalidParameterError(
            "add_special_tokens is true: leave it out, the chat template adds special tokens",
            param="add_special_tokens",
        )
    return TokenizeRequest(
        model=values["model"],
        prompt=values["prompt"],
        template=_template(values, values["tools"]) if values["messages"] is not None else None,
        add_special_tokens=values["add_special_tokens"] is not False,
        return_token_strs=values["return_token_strs"],
    )


def parse_detokenize(body: bytes, vocab_size: int) -> DetokenizeRequest:
    """Read a body of /detokenize. Raises InvalidParameterError."""
    values = _read(tables.DETOKENIZE, body)
    check_vocabulary(values["tokens"], vocab_size, "tokens")
    return DetokenizeRequest(model=values["model"], tokens=values["tokens"])


def _read(table: Object, body: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidParameterError(f"the body isn't valid JSON: {error}") from None
    return table.check(parsed, "")


def _template(values: dict[str, Any], tools: list[dict[str, Any]] | None) -> TemplateOptions:
    goes_on, opens = values["continue_final_message"], values["add_generation_prompt"]
    if goes_on and opens:
        raise InvalidParameterError(
            "continue_final_message and add_generation_prompt exclude each other: set one to false",
            param="continue_final_message",
        )
    return TemplateOptions(
        messages=for_template(values["messages"]),
        tools=[_plain_tool(tool) for tool in tools] if tools else None,
        add_generation_prompt=not goes_on if opens is None else opens,
        continue_final_message=goes_on,
        template_kwargs=values["chat_template_kwargs"] or {},
    )


def _plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool["function"].items() if value is not None and name != "strict"}
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _larger(left: int | None, right: int | None) -> int | None:
    given = [value for value in (left, right) if value is not None]
    return max(given, default=None)
