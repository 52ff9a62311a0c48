"""Tool calls in a model's output, found while it streams.

Two spellings are read where the model decides: ``<tool_call>{"name": …, "arguments": …}</tool_call>`` (Hermes, Qwen)
anywhere, and bare ``{"name": …, "parameters": …}`` (Llama 3.1) as the whole output. What isn't a call of a known tool
stays text. Where the request demands a call, a grammar has made the output one bare object.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BARE_BEGINNINGS = ('{"name"', '{"type"', '{"function"', '{"parameters"', '{"arguments"')
_DEMANDED = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of a call's arguments, JSON text."""

    index: int
    text: str


Piece = str | CallStart | CallArguments
"""Strings are content."""


class CallParser(Protocol):
    """Tells calls from text."""

    def feed(self, text: str) -> list[Piece]:
        """What can be told so far."""

    def finish(self) -> list[Piece]:
        """The rest, at the output's end."""


@dataclass(slots=True)
class FreeCallParser:
    """For output where the model decides; ``names`` are the tools'."""

    names: frozenset[str]
    _held: str = ""
    _num_calls: int = 0
    _began: bool = False
    """Whether some text has been let pass: a bare call can't come any more."""

    def feed(self, text: str) -> list[Piece]:
        """What can be told so far; a call is told when it is complete."""
        self._held += text
        pieces: list[Piece] = []
        if not self._began and _may_be_bare(self._held):
            return pieces
        while True:
            before, opened, inside = self._held.partition(OPEN)
            if not opened:
                break
            body, closed, after = inside.partition(CLOSE)
            if not closed:
                self._held = opened + inside
                return pieces + self._content(before.rstrip())
            calls = _read_calls(body, self.names)
            pieces += self._content(before.rstrip() if calls else before + OPEN + body + CLOSE)
            pieces += self._started(calls)
            self._held = after
        keep = _undecided(self._held)
        sendable, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return pieces + self._content(sendable)

    def finish(self) -> list[Piece]:
        """A bare call, or the held back text; white space after calls is dropped."""
        held, self._held = self._held, ""
        calls = [] if self._began else _read_calls(held, self.names)
        if calls:
            return self._started(calls)
        return [] if self._num_calls and not held.strip() else self._content(held)

    def _content(self, text: str) -> list[Piece]:
        if not text or (self._num_calls and not text.strip()):
            return []
        self._began = True
        return [text]

    def _started(self, calls: list[tuple[str, str]]) -> list[Piece]:
        pieces: list[Piece] = []
        for name, arguments in calls:
            pieces += [CallStart(self._num_calls, new_call_id(), name), CallArguments(self._num_calls, arguments)]
            self._num_calls += 1
            self._began = True
        return pieces


@dataclass(slots=True)
class DemandedCallParser:
    """For output that a grammar holds to one call: its arguments are told as they come."""

    _held: str = ""
    _started: bool = False
    _scanner: ObjectScanner = field(default_factory=lambda: ObjectScanner())

    def feed(self, text: str) -> list[Piece]:
        """The name once it is known, then the arguments."""
        if self._started:
            return self._arguments(text)
        self._held += text
        match = _DEMANDED.match(self._held)
        if match is None:
            return []
        self._started = True
        start = CallStart(0, new_call_id(), json.loads(match[1], strict=False))
        return [start, *self._arguments(self._held[match.end() :])]

    def finish(self) -> list[Piece]:
        """Nothing, or as text what was cut before its name."""
        return [self._held] if self._held and not self._started else []

    def _arguments(self, text: str) -> list[Piece]:
        own = text[: self._scanner.feed(text)]
        return [CallArguments(0, own)] if own else []


@dataclass(slots=True)
class ObjectScanner:
    """Finds where a JSON object ends."""

    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _ended: bool = False

    def feed(self, text: str) -> int:
        """How many characters of ``text`` still belong to the object."""
        for at, character in enumerate(text):
            if self._ended:
                return at
            self._step(character)
        return len(text)

    def _step(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._ended = self._depth == 0


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _may_be_bare(text: str) -> bool:
    """Whether the output, of which ``text`` is all so far, may still be a bare call."""
    start = re.sub(r"\s", "", text[:64])
    return any(start.startswith(beginning) or beginning.startswith(start) for beginning in _BARE_BEGINNINGS)


def _undecided(text: str) -> int:
    """Length of the end of ``text`` that may be white space before a call, or the beginning of its tag."""
    tag = next((n for n in range(min(len(text), len(OPEN) - 1), 0, -1) if text.endswith(OPEN[:n])), 0)
    rest = text[: len(text) - tag]
    return tag + len(rest) - len(rest.rstrip())


def _read_calls(text: str, names: frozenset[str]) -> list[tuple[str, str]]:
    """Names and arguments (JSON text) of the calls that make up ``text``, ; or white space between; else nothing."""
    decoder = json.JSONDecoder(strict=False)
    calls, at, text = [], 0, text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = _read_call(value, names)
        if call is None:
            return []
        calls.append(call)
        at += len(text[at:]) - len(text[at:].lstrip("; \t\r\n"))
    return calls


def _read_call(value: Any, names: frozenset[str]) -> tuple[str, str] | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _load(arguments)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    try:
        return name, orjson.dumps(arguments).decode()
    except TypeError:
        # Numbers beyond 64 bits, or half a surrogate pair: the standard library writes what it read.
        return name, json.dumps(arguments)


def _load(text: str) -> Any:
    try:
        return json.loads(text or "{}", strict=False)
    except (ValueError, RecursionError):
        return None
