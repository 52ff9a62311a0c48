"""Messages in the forms that the OpenAI API allows become what a model's chat template understands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pagedserve_engine.errors import InvalidParameterError

Message = dict[str, Any]

# `for part in message['content']`, `for part in message.content`: such a template takes lists of parts.
_READS_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+\w+(\.content\b|\[['\"]content['\"]\])")
_READS_TEXT = re.compile(r"(\.content|\[['\"]content['\"]\])\s+is\s+(not\s+)?string")
_READS_TOOLS = re.compile(r"\btools\b")


class TemplateTraits:
    """What a template's source says about the messages that it takes."""

    def __init__(self, source: str) -> None:
        self.supports_tools = bool(_READS_TOOLS.search(source))
        self.knows_developer = "developer" in source
        self.needs_parts = bool(_READS_PARTS.search(source)) and not _READS_TEXT.search(source)


def prepare_messages(messages: Sequence[Mapping[str, Any]], traits: TemplateTraits) -> list[Message]:
    """Copies of ``messages`` as the template wants them; raises InvalidParameterError naming the part at fault."""
    return [_prepare(message, traits, f"messages[{index}]") for index, message in enumerate(messages)]


def _prepare(message: Mapping[str, Any], traits: TemplateTraits, path: str) -> Message:
    prepared = dict(message)
    if prepared.get("role") == "developer" and not traits.knows_developer:
        prepared["role"] = "system"
    text = _join_text(prepared.get("content"), path)
    prepared["content"] = [{"type": "text", "text": text}] if traits.needs_parts else text
    if prepared.get("tool_calls"):
        prepared["tool_calls"] = [
            _parse_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(prepared["tool_calls"])
        ]
    return prepared


def _join_text(content: Any, path: str) -> str:
    """The text of a string, of parts (a line each), or of nothing: a turn that only calls tools has no content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidParameterError(
                f"{path}.content[{index}] is of type {kind!r}: this model reads parts of type 'text' only",
                param=f"{path}.content[{index}].type",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _parse_call(call: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Arguments come as JSON text; templates print them from an object."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as error:
            raise InvalidParameterError(
                f"{path}.function.arguments isn't JSON: {error}", param=f"{path}.function.arguments"
            ) from error
    return {**call, "function": function}
