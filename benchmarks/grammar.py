"""``python -m benchmarks.grammar``: llguidance beside xgrammar on the small model's tokenizer, in one run.

xgrammar isn't among the engine's dependencies: ``uv run --with xgrammar python -m benchmarks.grammar``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import llguidance
import llguidance.hf
import numpy as np
import xgrammar
from transformers import AutoTokenizer

from benchmarks.__main__ import small_model_folder

VOCAB = 49_152
END = 2

OBJECT: dict[str, Any] = {"type": "object"}
SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 5},
        "place": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "lat": {"type": "number"}, "lon": {"type": "number"}},
            "required": ["street", "lat", "lon"],
            "additionalProperties": False,
        },
    },
    "required": ["id", "tags", "place"],
    "additionalProperties": False,
}
REFERENCES: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["leaf", "branch"]},
                "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["kind", "code"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LONG_LISTS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 500}}, "required": ["a"]},
    "minItems": 100,
    "maxItems": 1000,
}

Source = dict[str, Any] | str
"""A JSON schema, or a pattern."""

CASES: dict[str, tuple[Source, str]] = {
    "json_object": (OBJECT, '{"title": "A day at the sea", "pages": 12, "nested": {"x": null, "y": [1, 2.5e3, true]}}'),
    "schema: small": (SMALL, '{"name": "Ada Lovelace", "age": 36}'),
    "schema: nested": (
        NESTED,
        '{"id": 17, "tags": ["red", "blue"], "place": {"street": "12 Main Street", "lat": 1.25, "lon": -3.5}}',
    ),
    "schema: enum, pattern, $ref": (
        REFERENCES,
        '{"kind": "branch", "code": "AB-123", "children": [{"kind": "leaf", "code": "CD-456"}]}',
    ),
    "regex: date": (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "2024-05-17"),
    "regex: address": (r"[a-z0-9._]{1,20}@[a-z0-9]{1,20}\.(com|org|net)", "ada.lovelace@example.org"),
    "regex: prose": (r"(The|A) [a-z ]{10,200}\.", "The quick brown fox jumps over the lazy dog and runs away."),
    "schema: long lists": (LONG_LISTS, '[{"a": "x"}, {"a": "y"}'),
}

KEYWORDS: dict[str, dict[str, Any]] = {
    "pattern and maxLength": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3},
    "overlapping oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "not": {"not": {"type": "string"}},
    "allOf": {"allOf": [{"type": "object", "required": [name]} for name in ("a", "b")]},
    "contains": {"type": "array", "contains": {"const": 5}, "items": {"type": "integer"}},
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["a"]},
}
"""Where a library must either honour a schema or refuse it."""


@dataclass(frozen=True, slots=True)
class Library:
    """How one library is driven; a matcher is asked for a mask and given a token."""

    name: str
    compile: Callable[[Source], Callable[[], Any]]
    fill: Callable[[Any, np.ndarray], None]
    advance: Callable[[Any, int], bool]


def llguidance_library(tokenizer: Any) -> Library:
    vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=VOCAB, eos_token=END)

    def compile(source: Source) -> Callable[[], Any]:
        text = (
            llguidance.LLMatcher.grammar_from_regex(source)
            if isinstance(source, str)
            else llguidance.LLMatcher.grammar_from_json_schema(json.dumps(source))
        )
        parser = llguidance.LLMatcher(vocabulary, text, log_level=0)
        if parser.is_error():
            raise ValueError(parser.get_error())
        return parser.deep_copy

    def fill(matcher: Any, row: np.ndarray) -> None:
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    return Library("llguidance", compile, fill, lambda matcher, token: bool(matcher.consume_token(token)))


def xgrammar_library(tokenizer: Any) -> Library:
    information = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCAB, stop_token_ids=[END])
    compiler = xgrammar.GrammarCompiler(information, max_threads=2, cache_enabled=False)

    def compile(source: Source) -> Callable[[], Any]:
        if isinstance(source, str):
            compiled = compiler.compile_regex(source)
        else:
            compiled = compiler.compile_json_schema(json.dumps(source))
        return lambda: xgrammar.GrammarMatcher(compiled)

    def fill(matcher: Any, row: np.ndarray) -> None:
        matcher.fill_next_token_bitmask(row.reshape(1, -1))

    return Library("xgrammar", compile, fill, lambda matcher, token: bool(matcher.accept_token(token)))


def measure(library: Library, source: Source, tokens: list[int], repeats: int) -> tuple[float, float, float]:
    """Medians: milliseconds to compile, microseconds for the mask and its 95th percentile, along ``tokens``."""
    row = np.zeros(VOCAB // 32, dtype=np.int32)
    compiles, fills = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        new_matcher = library.compile(source)
        compiles.append((time.perf_counter() - started) * 1e3)
        matcher = new_matcher()
        for token in tokens:
            started = time.perf_counter()
            library.fill(matcher, row)
            fills.append((time.perf_counter() - started) * 1e6)
            assert library.advance(matcher, token), f"{library.name} rejects a valid text"
    return statistics.median(compiles), statistics.median(fills), float(np.percentile(fills, 95))


def judge(library: Library, tokenizer: Any, schema: dict[str, Any], walks: int = 30) -> str:
    """Whether random output under ``schema`` satisfies it: refused, honoured, or how much broke it."""
    try:
        new_matcher = library.compile(schema)
    except Exception:
        return "refused"
    ended = list(finished_texts(library, tokenizer, new_matcher, walks))
    broken = sum(not conforms(schema, text) for text in ended)
    if not ended:
        return "accepted, no output came to an end"
    return f"{broken} of {len(ended)} outputs break it" if broken else f"honoured ({len(ended)} outputs)"


def finished_texts(library: Library, tokenizer: Any, new_matcher: Callable[[], Any], walks: int) -> Iterator[str]:
    row = np.zeros(VOCAB // 32, dtype=np.int32)
    for seed in range(walks):
        rng, matcher, tokens = np.random.default_rng(seed), new_matcher(), []
        while len(tokens) < 60:
            library.fill(matcher, row)
            possible = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            others = possible[possible != END]
            if not len(others) or (len(others) < len(possible) and rng.random() < 0.5):
                yield tokenizer.decode(tokens)
                break
            tokens.append(int(rng.choice(others)))
            library.advance(matcher, tokens[-1])


def conforms(schema: dict[str, Any], text: str) -> bool:
    try:
        return bool(jsonschema_rs.validator_for(schema).is_valid(json.loads(text)))
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="folder; default: SmolLM2's, converted once")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or small_model_folder("bfloat16"))
    libraries = (llguidance_library(tokenizer), xgrammar_library(tokenizer))
    print("| grammar | compile ms: llguidance | xgrammar | ratio | mask µs (p95): llguidance | xgrammar | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (source, text) in CASES.items():
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ours, other = (measure(library, source, tokens, options.repeats) for library in libraries)
        print(
            f"| {name} | {ours[0]:.1f} | {other[0]:.1f} | {other[0] / ours[0]:.1f} "
            f"| {ours[1]:.0f} ({ours[2]:.0f}) | {other[1]:.0f} ({other[2]:.0f}) | {other[1] / ours[1]:.2f} |",
            flush=True,
        )
    print("\n| schema keyword | llguidance | xgrammar |\n|---|---|---|")
    for name, schema in KEYWORDS.items():
        print(f"| {name} | {' | '.join(judge(library, tokenizer, schema) for library in libraries)} |", flush=True)


if __name__ == "__main__":
    main()
