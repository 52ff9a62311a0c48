"""Tool calls found in text that comes in any parts."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.server.calls import CallArguments, CallStart, DemandedCallParser, FreeCallParser, ObjectScanner

NAMES = frozenset({"add", "sub"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FRAGMENTS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<tool", "{", "}", '{"name": "add", "arguments": {}}', '"', " ", "\n", "hi"]
    ),
    max_size=8,
).map("".join)


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(at % (len(text) + 1) for at in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def told(parser: FreeCallParser | DemandedCallParser, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            content += piece
        elif isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.text)
    return content, calls


@given(text=FRAGMENTS, cuts=st.lists(st.integers(0, 1000), max_size=6))
def test_how_the_text_is_cut_never_matters(text: str, cuts: list[int]) -> None:
    assert told(FreeCallParser(NAMES), cut(text, cuts)) == told(FreeCallParser(NAMES), [text])


@given(text=st.text(), cuts=st.lists(st.integers(0, 1000), max_size=6))
def test_text_without_calls_passes_unchanged(text: str, cuts: list[int]) -> None:
    assert told(FreeCallParser(NAMES), cut(text, cuts)) == (text, [])


@given(
    arguments=st.dictionaries(st.text(), JSON),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    tail=st.sampled_from(["}", " }\n", ""]),
)
def test_demanded_arguments_come_through_to_the_letter(
    arguments: dict[str, object], cuts: list[int], tail: str
) -> None:
    written = json.dumps(arguments)
    text = f'{{"name": "add", "arguments": {written}' + tail
    assert told(DemandedCallParser(), cut(text, cuts)) == ("", [("add", written)])


def test_a_demanded_call_cut_before_its_name_stays_text() -> None:
    assert told(DemandedCallParser(), ['{"na']) == ('{"na', [])


def test_deeply_nested_output_is_no_call() -> None:
    text = '{"name": ' + "[" * 100_000
    assert told(FreeCallParser(NAMES), [text]) == (text, [])


def test_arguments_beyond_64_bits_are_kept() -> None:
    text = '{"name": "add", "arguments": {"a": 123456789012345678901234567890}}'
    assert told(FreeCallParser(NAMES), [text]) == ("", [("add", '{"a": 123456789012345678901234567890}')])


def test_llama_calls_may_be_separated_by_semicolons() -> None:
    text = '{"name": "add", "parameters": {}}; {"name": "sub", "parameters": {}}'
    assert told(FreeCallParser(NAMES), [text])[1] == [("add", "{}"), ("sub", "{}")]


def test_text_after_a_call_is_told() -> None:
    text = 'a <tool_call>{"name": "add", "arguments": {}}</tool_call> b'
    assert told(FreeCallParser(NAMES), [text]) == ("a b", [("add", "{}")])


@given(value=st.dictionaries(st.text(), JSON), rest=st.text())
def test_the_scanner_finds_an_object_s_end(value: dict[str, object], rest: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert ObjectScanner().feed(text + rest) == len(text)
