"""The OpenAPI document and the table of fields in docs/http.md, both made from the request tables.

``python -m pagedserve_engine.server.openapi docs/http.md`` renews the tables in place.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pagedserve_engine.server import tables
from pagedserve_engine.server.objects import Object

BODIES: dict[str, Object] = {
    "/v1/completions": tables.COMPLETION,
    "/v1/chat/completions": tables.CHAT,
    "/tokenize": tables.TOKENIZE,
    "/detokenize": tables.DETOKENIZE,
}

_ERRORS = {
    "400": "The request can't be served as it stands",
    "401": "No API key, or a wrong one",
    "404": "No such model",
    "413": "The body is too large",
    "429": "The queue is full; Retry-After says when to try again",
    "500": "The server failed",
    "503": "The model is loading, the engine leaves, or the core is dead",
    "504": "The request ran longer than it may",
}
_SUMMARIES = {
    "/v1/completions": "Complete one or several prompts",
    "/v1/chat/completions": "Answer a conversation",
    "/tokenize": "Token ids of a text or a conversation",
    "/detokenize": "The text of token ids",
}
_MODEL = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "max_model_len": {"type": "integer"}},
    "required": ["id", "object", "created", "owned_by"],
}
_HEALTH = {
    "type": "object",
    "properties": {"status": {"enum": ["ok", "loading", "draining", "dead"]}, "reason": {"type": "string"}},
    "required": ["status", "reason"],
}
_RESPONSES = {
    "/v1/completions": ("text_completion", ["id", "object", "created", "model", "choices", "usage"]),
    "/v1/chat/completions": ("chat.completion", ["id", "object", "created", "model", "choices", "usage"]),
    "/tokenize": (None, ["count", "max_model_len", "tokens"]),
    "/detokenize": (None, ["prompt"]),
}


def build_document(version: str, *, keys: bool) -> dict[str, Any]:
    """The document; ``keys`` says whether the server asks for an API key."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "pagedserve", "version": version, "description": "The OpenAI API over a paged cache."},
        "paths": {**{path: {"post": _post(path)} for path in BODIES}, **_gets()},
        "components": {"schemas": {table.name: table.definition() for table in BODIES.values()}},
    }
    document["components"]["schemas"]["Error"] = _error_schema()
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in ("/health/live", "/health/ready", "/metrics"):
            document["paths"][path]["get"]["security"] = []
    return document


def _post(path: str) -> dict[str, Any]:
    kind, required = _RESPONSES[path]
    answer: dict[str, Any] = {"type": "object", "required": required}
    content = {"application/json": {"schema": answer}}
    if kind:
        answer["properties"] = {"object": {"const": kind}}
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "operationId": BODIES[path].name,
        "summary": _SUMMARIES[path],
        "requestBody": {"required": True, "content": {"application/json": {"schema": BODIES[path].schema()}}},
        "responses": {"200": {"description": "The answer", "content": content}, **_failures(*_ERRORS)},
    }


def _gets() -> dict[str, Any]:
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    listed = {
        "type": "object",
        "properties": {"data": {"type": "array", "items": _MODEL}},
        "required": ["object", "data"],
    }
    return {
        "/v1/models": {"get": _get("The models served", listed, _failures("401", "503"))},
        "/v1/models/{model}": {
            "get": {**_get("One model", _MODEL, _failures("401", "404", "503")), "parameters": [model]}
        },
        "/health/live": {"get": _get("Whether the process makes progress", _HEALTH, _unhealthy())},
        "/health/ready": {"get": _get("Whether new requests are welcome", _HEALTH, _unhealthy())},
        "/metrics": {"get": _get("Prometheus metrics", None, {})},
        "/openapi.json": {"get": _get("This document", {"type": "object"}, _failures("401"))},
    }


def _get(summary: str, schema: dict[str, Any] | None, failures: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": summary}
    if schema is not None:
        answer["content"] = {"application/json": {"schema": schema}}
    return {"summary": summary, "responses": {"200": answer, **failures}}


def _failures(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _unhealthy() -> dict[str, Any]:
    return {
        "503": {"description": "It isn't; the reason says why", "content": {"application/json": {"schema": _HEALTH}}}
    }


def _error_schema() -> dict[str, Any]:
    text_or_null = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text_or_null, "code": text_or_null}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def field_table(table: Object) -> str:
    """A Markdown table of the fields of ``table``."""
    rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
    for field in table.fields:
        default = "required" if field.required else "" if field.default is None else f"`{field.default}`"
        notes = " *(no effect)*" if field.inert else " *(extension)*" if field.extension else ""
        words = field.kind.words.replace("|", "\\|")
        rows.append(f"| `{field.name}` | {words} | {default} | {field.help}{notes} |")
    return "\n".join(rows)


def renew_tables(text: str) -> str:
    """``text`` with the table after each ``<!-- fields of PATH -->`` renewed, up to ``<!-- end -->``."""

    def renew(match: re.Match[str]) -> str:
        return f"<!-- fields of {match[1]} -->\n{field_table(BODIES[match[1]])}\n<!-- end -->"

    return re.sub(r"<!-- fields of (\S+) -->\n.*?<!-- end -->", renew, text, flags=re.DOTALL)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(renew_tables(target.read_text()))
