"""Tools: which the model may call, and the grammar that makes a demanded call always parse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.request import GrammarSpec
from pagedserve_engine.server.grammar import schema_grammar


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools of a request whose output may hold calls."""

    tools: tuple[dict[str, Any], ...]
    """As the client sent them."""
    grammar: GrammarSpec | None = None
    """For a demanded call: the output is one JSON object, name first; None: the model decides."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def read_tool_choice(values: dict[str, Any]) -> ToolChoice | None:
    """The choice of a checked body; None where no call may come.

    Raises InvalidParameterError where the choice asks for a tool that isn't there.
    """
    tools, choice = values["tools"] or [], values["tool_choice"]
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidParameterError(
                f"tools has {name} twice: name each once", param=f"tools[{index}].function.name"
            )
    if not tools and choice not in (None, "none", "auto"):
        raise InvalidParameterError(
            "tool_choice demands a call but there are no tools: send tools", param="tool_choice"
        )
    if not tools or choice == "none":
        return None
    if choice in (None, "auto"):
        return ToolChoice(tuple(tools))
    demanded = (
        tools
        if choice == "required"
        else [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
    )
    if not demanded:
        raise InvalidParameterError(
            f"tool_choice names {choice['function']['name']}, which isn't among the tools: {', '.join(names)}",
            param="tool_choice.function.name",
        )
    return ToolChoice(tuple(tools), replace(schema_grammar(call_schema(demanded)), param="tools"))


def call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A JSON schema of one call of one of ``tools``: {"name": …, "arguments": …}."""
    definitions = {f"arguments{index}": _arguments(tool, index) for index, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": {"$ref": f"#/$defs/arguments{index}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _arguments(tool: dict[str, Any], index: int) -> dict[str, Any]:
    schema = tool["function"]["parameters"] or {"type": "object"}
    moved: dict[str, Any] = _move_references({"type": "object", **schema}, f"#/$defs/arguments{index}")
    return moved


def _move_references(schema: Any, root: str) -> Any:
    """``schema`` with references to its own root pointing to where it now lies; MAX_DEPTH bounds the recursion."""
    if isinstance(schema, list):
        return [_move_references(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _move_references(value, root) for name, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
