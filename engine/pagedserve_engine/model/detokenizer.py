"""Tokens to text as they come, at a constant cost for each, and never half a character.

What the pushes return, joined, is what decoding all tokens at once gives. That takes knowing how the vocabulary spells:
byte-level vocabularies (GPT-2's kind) spell UTF-8 bytes, SentencePiece ones spell text and fall back to tokens that
stand for one byte. Both are read here token by token; any other kind is decoded again over a short window.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""


class Detokenizer(Protocol):
    """One output's text; belongs to one sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these next tokens complete."""

    def flush(self) -> str:
        """The rest, at the end of the output; replacement characters for what is no whole character."""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a vocabulary's decoder turns tokens into text, as far as it is known here."""

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0
    """Spaces taken off the start of a whole text."""


def _read_spelling(decoder: dict[str, Any]) -> _Spelling | None:
    """The decoder's description understood, or None."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _Spelling(byte_level=True)
    if not re.fullmatch(r"(Replace )*(ByteFallback )?Fuse (Strip )?", "".join(f"{kind} " for kind in kinds)):
        return None
    replaced = [step for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if any("String" not in step["pattern"] for step in replaced):
        return None
    if any(step["content"] != " " or step["stop"] for step in strips):
        return None
    return _Spelling(
        replace=tuple((step["pattern"]["String"], step["content"]) for step in replaced),
        byte_fallback="ByteFallback" in kinds,
        strip=sum(step["start"] for step in strips),
    )


class Vocabulary:
    """Token ids to what they spell; shared by all outputs and threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token.content for token in added.values() if token.special)
        self._pieces: dict[int, tuple[bytes, bool]] = {}

    @cached_property
    def spelling(self) -> _Spelling | None:
        """None where only the backend can decode."""
        if self._backend.decoder is None:
            return None
        return _read_spelling(json.loads(self._backend.decoder.__getstate__()))

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which text leaves out."""
        return self._backend.id_to_token(token_id) in self._special

    def piece(self, token_id: int) -> tuple[bytes, bool]:
        """(The bytes that the token stands for, whether it is one byte of a character by fallback).

        Unknown ids stand for nothing.
        """
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> tuple[bytes, bool]:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b"", False
        if self.spelling is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode(), False
        if self.spelling.byte_level:
            if all(character in _ALPHABET for character in token):
                return bytes(_ALPHABET[character] for character in token), False
            return token.encode(), False
        for pattern, content in self.spelling.replace:
            token = token.replace(pattern, content)
        byte = _BYTE_TOKEN.fullmatch(token) if self.spelling.byte_fallback else None
        return (bytes([int(byte[1], 16)]), True) if byte else (token.encode(), False)

    def detokenizer(self, *, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> Detokenizer:
        """For the output that follows ``prompt_ids``; with an empty prompt, for a text of its own."""
        if self.spelling is None:
            return WindowDetokenizer(self._backend.decode, skip_special_tokens, prompt_ids)
        kind = ByteLevelDetokenizer if self.spelling.byte_level else FallbackDetokenizer
        skipped = self.is_special if skip_special_tokens else _none_skipped
        return kind(self, skipped, prompt_ids)


def _none_skipped(token_id: int) -> bool:
    return False


class ByteLevelDetokenizer:
    """For vocabularies whose tokens are bytes: text is the bytes' UTF-8, decoded as they come."""

    def __init__(self, vocabulary: Vocabulary, skipped: Callable[[int], bool], prompt_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A prompt may end within a character, which the output then completes.
        self.push(prompt_ids[-_LONGEST_CHARACTER:])
        self._only_prompt = True

    def push(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        pieces = [self._vocabulary.piece(token_id)[0] for token_id in token_ids if not self._skipped(token_id)]
        self._only_prompt = False
        return self._decoder.decode(b"".join(pieces))

    def flush(self) -> str:
        """See Detokenizer."""
        return "" if self._only_prompt else self._decoder.decode(b"", final=True)


class FallbackDetokenizer:
    """For vocabularies that spell text, with byte tokens for what they lack.

    A run of byte tokens is text if all of it is valid UTF-8, and a replacement character for each byte if not: so it is
    held back until it ends.
    """

    def __init__(self, vocabulary: Vocabulary, skipped: Callable[[int], bool], prompt_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        spelling = vocabulary.spelling
        assert spelling is not None
        self._to_strip = 0 if prompt_ids else spelling.strip
        self._run = bytearray()

    def push(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        parts: list[str] = []
        for token_id in token_ids:
            if self._skipped(token_id):
                continue
            spelled, is_byte = self._vocabulary.piece(token_id)
            if is_byte:
                self._run += spelled
            elif spelled:  # An unknown id stands for nothing and ends no run.
                parts += (self._end_run(), spelled.decode())
        return self._stripped("".join(parts))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            text, self._to_strip = (text[1:], self._to_strip - 1) if text[0] == " " else (text, 0)
        return text


class WindowDetokenizer:
    """For any other vocabulary: decodes the last few tokens again and gives out what grew.

    Text that ends in a replacement character waits for the tokens that complete it.
    """

    def __init__(self, decode: Callable[..., str], skip_special_tokens: bool, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-_LONGEST_CHARACTER:])
        self._known = len(self._ids)
        """Tokens at the front of the window whose text is out already."""

    def push(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        return "".join(self._next(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._grown(self._text(self._ids))

    def _next(self, token_id: int) -> str:
        self._ids.append(token_id)
        whole = self._text(self._ids)
        if whole.endswith(REPLACEMENT):
            return ""
        grown = self._grown(whole)
        if grown:
            self._ids = self._ids[self._known :]
            self._known = len(self._ids)
        return grown

    def _grown(self, whole: str) -> str:
        return whole[len(self._text(self._ids[: self._known])) :]

    def _text(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=self._skip)
