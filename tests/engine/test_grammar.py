from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable

import jsonschema_rs
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from byte_tokenizer import END_OF_TURN, EOS, byte_tokenizer
from models import smollm2_folder
from pagedserve_engine.errors import InvalidParameterError, StepFailedError
from pagedserve_engine.grammar import MAX_SOURCE_BYTES, GrammarCompiler, GrammarMatcher
from pagedserve_engine.request import GrammarSpec

TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER) + 37
"""Logits are often padded beyond the tokenizer's vocabulary."""

SCHEMAS = {
    "a small object": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["ok", "count"],
        "additionalProperties": False,
    },
    "nested with arrays": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
            "at": {
                "type": "array",
                "items": {"type": "number", "minimum": -90, "maximum": 90},
                "minItems": 2,
                "maxItems": 2,
            },
        },
        "required": ["tags", "at"],
        "additionalProperties": False,
    },
    "enums, patterns and references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "kind": {"enum": ["leaf", "branch"]},
                    "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["kind", "code", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}
PATTERNS = [r"\d{4}-\d{2}-\d{2}", r"(yes|no|perhaps( not)?)", r"[a-zé日]{1,12}(,[0-9]+){0,3}!"]


def compiler(**options: int) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB, [EOS, END_OF_TURN], **options)


def allowed(matcher: GrammarMatcher, vocab: int = VOCAB) -> set[int]:
    row = np.zeros((vocab + 31) // 32, dtype=np.int32)
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def generate(matcher: GrammarMatcher, seed: int, max_tokens: int, *, vocab: int = VOCAB) -> tuple[list[int], bool]:
    """Draw from random logits at temperature 1 under the mask; returns the tokens and whether they came to an end."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(max_tokens):
        possible = np.array(sorted(allowed(matcher, vocab)))
        assert possible.size, f"nothing may follow {tokens}"
        weights = np.exp(rng.normal(size=possible.size))
        # Ends and closing marks are rare among so many tokens: without help most outputs would never close.
        weights[np.isin(possible, CLOSING)] *= 4 * possible.size
        token = int(rng.choice(possible, p=weights / weights.sum()))
        matcher.advance(token)
        if token in (EOS, END_OF_TURN):
            return tokens, True
        tokens.append(token)
    return tokens, False


CLOSING = [EOS, END_OF_TURN, *(TOKENIZER.encode(mark)[0] for mark in '"}]')]


def specs() -> list[tuple[str, GrammarSpec, Callable[[str], bool]]]:
    def is_object(text: str) -> bool:
        return isinstance(json.loads(text), dict)

    cases = [("any object", GrammarSpec("json_object", ""), is_object)]
    for name, schema in SCHEMAS.items():
        validator = jsonschema_rs.validator_for(schema)
        cases.append(
            (
                name,
                GrammarSpec("json_schema", json.dumps(schema)),
                lambda text, v=validator: v.is_valid(json.loads(text)),
            )
        )
    for pattern in PATTERNS:
        cases.append((pattern, GrammarSpec("regex", pattern), lambda text, p=pattern: bool(re.fullmatch(p, text))))
    return cases


CASES = [pytest.param(spec, valid, id=name) for name, spec, valid in specs()]


@pytest.mark.parametrize(("spec", "valid"), CASES)
def test_random_output_conforms_to_its_grammar(spec: GrammarSpec, valid: Callable[[str], bool]) -> None:
    grammar, ended = compiler().compile(spec), 0
    for seed in range(12):
        tokens, complete = generate(grammar.matcher(), seed, 300)
        if complete:
            ended += 1
            text = TOKENIZER.decode(tokens)
            assert valid(text), text
    assert ended >= 6


def test_white_space_between_the_parts_of_an_object_ends() -> None:
    def may_follow(text: str, mark: str) -> bool:
        matcher = grammar.matcher()
        for token in TOKENIZER.encode(text):
            matcher.advance(token)
        return TOKENIZER.encode(mark)[0] in allowed(matcher)

    for spec in (GrammarSpec("json_object", ""), GrammarSpec("json_schema", '{"type": "object"}')):
        grammar = compiler().compile(spec)
        assert may_follow("{", "\n")
        assert may_follow("{\n" + 39 * " ", " ")
        assert not may_follow("{\n" + 40 * " ", " ")
        assert not may_follow("{\n", "\n")


@pytest.mark.parametrize(("spec", "valid"), CASES)
def test_output_that_is_cut_short_can_still_be_completed(spec: GrammarSpec, valid: Callable[[str], bool]) -> None:
    grammar = compiler().compile(spec)
    for seed in range(6):
        matcher = grammar.matcher()
        start, complete = generate(matcher, seed, 7)
        for attempt in range(20):
            if complete:
                break
            again = grammar.matcher()
            for token in start:
                again.advance(token)
            rest, complete = generate(again, 100 + attempt, 300)
            if complete:
                assert valid(TOKENIZER.decode(start + rest))
        assert complete


@pytest.mark.real_model
def test_a_real_vocabulary_writes_valid_json() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    schema = SCHEMAS["enums, patterns and references"]
    grammar = GrammarCompiler(tokenizer, 49_152, [2]).compile(GrammarSpec("json_schema", json.dumps(schema)))
    matcher, tokens = grammar.matcher(), []
    for token in tokenizer.encode('{"kind": "leaf", "code": "AB-123", "next": null}', add_special_tokens=False):
        assert token in allowed(matcher, 49_152)
        matcher.advance(token)
        tokens.append(token)
    assert allowed(matcher, 49_152) == {2}


# --- the end of the output -------------------------------------------------------------------------------------------


def test_a_complete_grammar_allows_the_ends_alone_however_often() -> None:
    matcher = compiler().compile(GrammarSpec("regex", "a|ab")).matcher()
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    matcher.advance(a)
    assert allowed(matcher) == {b, EOS, END_OF_TURN}
    assert not matcher.finished
    matcher.advance(b)
    for end in (EOS, END_OF_TURN, EOS):
        assert matcher.finished
        assert allowed(matcher) == {EOS, END_OF_TURN}
        matcher.advance(end)
    with pytest.raises(StepFailedError, match="complete"):
        matcher.advance(a)


def test_a_token_that_is_not_allowed_is_an_error_that_stays() -> None:
    matcher = compiler().compile(GrammarSpec("regex", "a")).matcher()
    with pytest.raises(StepFailedError):
        matcher.advance(TOKENIZER.encode("b")[0])
    assert not matcher.finished
    with pytest.raises(StepFailedError):
        allowed(matcher)


def test_matchers_of_one_grammar_do_not_know_of_each_other() -> None:
    grammar = compiler().compile(GrammarSpec("regex", "ab"))
    first, second = grammar.matcher(), grammar.matcher()
    first.advance(TOKENIZER.encode("a")[0])
    assert allowed(second) != allowed(first)
    assert allowed(grammar.matcher()) == allowed(second)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        pytest.param("json_schema", "{", "EOF|expected|Expecting", id="not JSON"),
        pytest.param("json_schema", "[1]", "object", id="not a schema"),
        pytest.param("json_schema", '{"type": "strin"}', "strin", id="unknown type"),
        pytest.param("json_schema", '{"$ref": "#/$defs/none"}', "none", id="dangling reference"),
        pytest.param("json_schema", '{"not": {"type": "string"}}', "not", id="unsupported keyword"),
        pytest.param("json_schema", '{"type":"array","uniqueItems":true}', "uniqueItems", id="another"),
        pytest.param("json_schema", "[" * 5000, "recursion", id="nested too deeply"),
        pytest.param("json_schema", '{"a":' * 5000 + "{}" + "}" * 5000, "recursion", id="objects nested too deeply"),
        pytest.param("regex", "(", "unclosed", id="broken pattern"),
        pytest.param("regex", "(?=a)b", "look-", id="look-ahead"),
        pytest.param("regex", r"(a)\1", "backreference", id="backreference"),
        pytest.param("regex", "a" * (MAX_SOURCE_BYTES + 1), str(MAX_SOURCE_BYTES), id="too large"),
        pytest.param("ebnf", "root ::= x", "json_object, json_schema or regex", id="unknown kind"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(kind: str, source: str, reason: str) -> None:
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        compiler().compile(GrammarSpec(kind, source, "guided"))
    assert caught.value.param == "guided"
    assert "guided" in caught.value.message
    assert len(caught.value.message) < 500


def test_repetitions_that_multiply_compile_without_being_unrolled() -> None:
    grammar = compiler().compile(GrammarSpec("regex", "((a{0,1000}){0,1000}|[a-z ]{10,5000})x"))
    assert TOKENIZER.encode("a")[0] in allowed(grammar.matcher())


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_latest_grammars_are_kept() -> None:
    kept = compiler(max_cached=2)
    first = kept.compile(GrammarSpec("regex", "a"))
    second = kept.compile(GrammarSpec("regex", "b"))
    assert kept.compile(GrammarSpec("regex", "a")) is first
    kept.compile(GrammarSpec("regex", "c"))
    assert kept.compile(GrammarSpec("regex", "a")) is first
    assert kept.compile(GrammarSpec("regex", "b")) is not second


def test_threads_share_a_compiler() -> None:
    shared, results, failures = compiler(max_cached=3), [], []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                digits = 1 + (number + turn) % 5
                matcher = shared.compile(GrammarSpec("regex", f"[0-9]{{{digits}}}")).matcher()
                tokens, complete = generate(matcher, turn, 10)
                results.append(complete and bool(re.fullmatch(rf"\d{{{digits}}}", TOKENIZER.decode(tokens))))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert results == [True] * 80
