from __future__ import annotations

import json
import logging
import sys

import pytest

from pagedserve_engine.logs import JsonFormatter, TextFormatter, describe_exception, request_id


def line(formatter: logging.Formatter, *, exc_info: object = None, **extra: object) -> str:
    record = logging.LogRecord("pagedserve", logging.INFO, "x.py", 1, "hello %s", ("world",), exc_info)  # type: ignore[arg-type]
    record.__dict__.update(extra)
    return formatter.format(record)


def test_a_json_line_is_one_object() -> None:
    parsed = json.loads(line(JsonFormatter(), fields={"status": 200, 5: "x", "odd": object}))
    assert (parsed["message"], parsed["level"], parsed["logger"], parsed["status"]) == (
        "hello world",
        "info",
        "pagedserve",
        200,
    )
    assert parsed["time"].endswith("+00:00")


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_a_line_names_its_request(formatter: logging.Formatter) -> None:
    assert "request_id" not in line(formatter)
    token = request_id.set("abc-1")
    try:
        assert "abc-1" in line(formatter)
    finally:
        request_id.reset(token)


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_has_its_traceback(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("x")
    except ValueError:
        assert "Traceback" in line(formatter, exc_info=sys.exc_info())


def test_an_exception_is_described_without_its_message() -> None:
    try:
        raise ValueError("secret")
    except ValueError as error:
        text = describe_exception(error)
    assert "ValueError" in text
    assert "test_logs" in text
    assert "raise ValueError" in text
