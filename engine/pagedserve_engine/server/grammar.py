"""What the output must conform to: one constraint from the several names under which clients send it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.request import GrammarSpec
from pagedserve_engine.server.messages import parse_object


def read_grammar(values: dict[str, Any]) -> GrammarSpec | None:
    """The constraint of a checked body; None where the output is free.

    Raises InvalidParameterError where several are given.
    """
    found = {name: replace(spec, param=name) for name, spec in _specs(values) if spec}
    if len(found) > 1:
        names = ", ".join(found)
        raise InvalidParameterError(
            f"the output can't have several constraints: give one of {names}", param=list(found)[1]
        )
    return next(iter(found.values()), None)


def schema_grammar(schema: dict[str, Any]) -> GrammarSpec:
    """The output is JSON that ``schema`` describes."""
    return GrammarSpec("json_schema", orjson.dumps(schema).decode())


def _specs(values: dict[str, Any]) -> list[tuple[str, GrammarSpec | None]]:
    structured = values["structured_outputs"] or {"json": None, "regex": None, "json_object": None}
    return [
        ("response_format", _response_format(values["response_format"])),
        ("structured_outputs.json", _schema(structured["json"], "structured_outputs.json")),
        ("structured_outputs.regex", _regex(structured["regex"])),
        ("structured_outputs.json_object", GrammarSpec("json_object", "") if structured["json_object"] else None),
        ("guided_json", _schema(values["guided_json"], "guided_json")),
        ("guided_regex", _regex(values["guided_regex"])),
    ]


def _response_format(given: dict[str, Any] | None) -> GrammarSpec | None:
    kind = given["type"] if given else "text"
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec("json_object", "")
    return schema_grammar(given["json_schema"]["schema"]) if kind == "json_schema" else _regex(given["pattern"])


def _schema(given: Any, path: str) -> GrammarSpec | None:
    return None if given is None else schema_grammar(parse_object(given, path))


def _regex(pattern: str | None) -> GrammarSpec | None:
    return None if pattern is None else GrammarSpec("regex", pattern)
