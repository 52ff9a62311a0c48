from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.server.openapi import BODIES, build_document, renew_tables
from serving import call, chat, complete

DOCUMENT = build_document("1", keys=True)
PAGE = Path(__file__).parents[2] / "docs" / "http.md"


def validator(name: str) -> Any:
    return jsonschema_rs.validator_for({**DOCUMENT, "$ref": f"#/components/schemas/{name}"})


def test_the_page_s_tables_are_those_of_the_schema() -> None:
    text = PAGE.read_text()
    assert renew_tables(text) == text, "run: python -m pagedserve_engine.server.openapi docs/http.md"
    for path in BODIES:
        assert f"<!-- fields of {path} -->" in text


def test_the_document_is_served() -> None:
    assert call("GET", "/openapi.json").json["paths"].keys() == DOCUMENT["paths"].keys()


def test_every_route_is_documented() -> None:
    served = call("GET", "/openapi.json").json["paths"]
    for path, methods in served.items():
        for method in methods:
            assert call(method, path.replace("{model}", "org/fake"), json={}).status != 404


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in DOCUMENT["components"]["schemas"]
        validator(name)


def test_errors_are_as_documented() -> None:
    validator("Error").validate(complete(temperature=3).json)


AGREE: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": [1, 2], "n": 2.0, "stop": None}),
    ("/v1/completions", {"prompt": [[1], [2]], "logit_bias": {"1": 5}}),
    ("/v1/completions", {"prompt": [True]}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": "a", "n": 0}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 5}}),
    ("/v1/completions", {"prompt": "a", "repetition_penalty": 0}),
    ("/v1/completions", {"prompt": "a", "unknown": 1}),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "regex", "pattern": "a"}}),
    ("/v1/completions", {"prompt": "a", "response_format": {"type": "regex"}}),
    ("/v1/completions", {}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": None}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/v1/chat/completions", {"messages": []}),
    ("/detokenize", {"tokens": [1]}),
    ("/detokenize", {"tokens": [-1]}),
]


@pytest.mark.parametrize(("path", "body"), AGREE)
def test_the_document_and_the_reader_agree(path: str, body: dict[str, Any]) -> None:
    table = BODIES[path]
    try:
        table.check(body, "")
    except InvalidParameterError:
        read = False
    else:
        read = True
    assert validator(table.name).is_valid(body) is read


def test_answers_have_the_documented_fields() -> None:
    for reply, path in ((complete(), "/v1/completions"), (chat(), "/v1/chat/completions")):
        content = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
        jsonschema_rs.validator_for(content["application/json"]["schema"]).validate(reply.json)
