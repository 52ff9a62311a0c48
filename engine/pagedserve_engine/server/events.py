"""Server-sent events: what stays the same from chunk to chunk is rendered once.

A token costs one short JSON string and two concatenations: with many streams this is what bounds the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"

_MARK = "\x00"
_RENDERED_MARK = orjson.dumps(_MARK)

Choice = dict[str, Any]


def event(body: bytes) -> bytes:
    """One event."""
    return b"data: " + body + b"\n\n"


class Chunks:
    """The chunks of one response; ``text_choice`` makes the choice of an index that has some text and nothing else."""

    def __init__(self, head: dict[str, Any], *, include_usage: bool, text_choice: Callable[[int, str], Choice]) -> None:
        self._head = head
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}
        self._text_choice = text_choice
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def text(self, index: int, text: str) -> bytes:
        """A chunk with text alone."""
        frame = self._frames.get(index)
        if frame is None:
            # The mark comes after everything that a client can influence, so that its last occurrence is ours.
            before, _, after = self.choice(self._text_choice(index, _MARK)).rpartition(_RENDERED_MARK)
            frame = self._frames[index] = before, after
        return frame[0] + orjson.dumps(text) + frame[1]

    def choice(self, choice: Choice, **more: Any) -> bytes:
        """A chunk with any choice; ``more`` are fields beside it."""
        return event(orjson.dumps({**self._head, "choices": [choice], **self._tail, **more}))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk, without a choice."""
        none: Sequence[Choice] = []
        return event(orjson.dumps({**self._head, "choices": none, "usage": usage}))
