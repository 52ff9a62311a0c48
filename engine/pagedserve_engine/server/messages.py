"""A conversation: what each role's message may hold, and its form for a chat template.

Which roles and content forms a template knows is the tokenizer's business; here the shape alone is checked.
"""

from __future__ import annotations

from typing import Any

import orjson

from pagedserve_engine.server.containers import Either, ListOf, Opaque, is_shallow
from pagedserve_engine.server.fields import Integer, Text, refuse
from pagedserve_engine.server.objects import Field, Object, Tagged

_PART = Tagged(
    "type",
    (
        (
            "text",
            Object((Field("text", Text(), required=True), Field("prompt_cache_breakpoint", Opaque(), inert=True))),
        ),
    ),
)
_CONTENT = Either((Text(), ListOf(_PART, low=1)))
_NAME = Field("name", Text(high=256))
_SAID = Object((Field("content", _CONTENT, required=True), _NAME))

TOOL_CALL = Tagged(
    "type",
    (
        (
            "function",
            Object(
                (
                    Field("id", Text(high=256)),
                    Field("index", Integer(0, 1 << 16), inert=True),
                    Field(
                        "function",
                        Object(
                            (
                                Field("name", Text(1, 256), required=True),
                                Field(
                                    "arguments", Either((Text(), Opaque())), "an object, as JSON text", required=True
                                ),
                            )
                        ),
                        required=True,
                    ),
                )
            ),
        ),
    ),
)

_ASSISTANT = Object(
    (
        Field("content", _CONTENT),
        _NAME,
        Field("tool_calls", ListOf(TOOL_CALL, high=128)),
        Field("reasoning_content", Text()),
        Field("refusal", Text(), inert=True),
        Field("annotations", ListOf(Opaque()), inert=True),
    ),
    refused=(("function_call", "send tool_calls"), ("audio", "the model reads text only")),
)
_TOOL = Object((Field("content", _CONTENT, required=True), Field("tool_call_id", Text(high=256)), _NAME))

MESSAGE = Tagged(
    "role", (("system", _SAID), ("developer", _SAID), ("user", _SAID), ("assistant", _ASSISTANT), ("tool", _TOOL))
)
CONVERSATION = ListOf(MESSAGE, low=1, high=4096)

_INERT = ("refusal", "annotations")


def for_template(messages: list[dict[str, Any]], path: str = "messages") -> list[dict[str, Any]]:
    """Checked messages as templates expect them: absent fields left out, call arguments as objects.

    Raises InvalidParameterError naming arguments that aren't an object.
    """
    return [_plain(message, f"{path}[{index}]") for index, message in enumerate(messages)]


def _plain(message: dict[str, Any], path: str) -> dict[str, Any]:
    plain = {name: value for name, value in message.items() if value is not None and name not in _INERT}
    if isinstance(plain.get("content"), list):
        plain["content"] = [{"type": part["type"], "text": part["text"]} for part in plain["content"]]
    if message["role"] == "assistant":
        plain.setdefault("content", "")
    if "tool_calls" in plain:
        plain["tool_calls"] = [
            _plain_call(call, f"{path}.tool_calls[{index}].function.arguments")
            for index, call in enumerate(plain["tool_calls"])
        ]
    return plain


def _plain_call(call: dict[str, Any], path: str) -> dict[str, Any]:
    function = call["function"]
    arguments = {"name": function["name"], "arguments": parse_object(function["arguments"], path)}
    return {"type": "function", **({"id": call["id"]} if call["id"] else {}), "function": arguments}


def parse_object(value: str | dict[str, Any], path: str) -> dict[str, Any]:
    """An object given as such or as JSON text, which may be empty."""
    if isinstance(value, dict):
        return value
    try:
        parsed = orjson.loads(value or "{}")
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict) or not is_shallow(parsed):
        raise refuse(path, value, Opaque().words + " (as JSON text)")
    return parsed
