"""One request's stream of text, between the core's news and a reader that may be slow or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Self

from pagedserve_engine.errors import PagedServeError
from pagedserve_engine.request import FinishReason, GenerationOutput
from pagedserve_engine.stats import Outcome
from pagedserve_engine.text import TextAssembler, TextOutput, TextRequest

_OUTCOMES = {
    FinishReason.STOP: Outcome.STOP,
    FinishReason.LENGTH: Outcome.LENGTH,
    FinishReason.CANCELLED: Outcome.CANCELLED,
    FinishReason.ERROR: Outcome.ERROR,
}


class TextStream:
    """What comes of one request: iterate to its end, and close it in any case; closing early aborts it."""

    def __init__(
        self, request: TextRequest, assembler: TextAssembler, *, on_close: Callable[[TextStream], None]
    ) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self.last_token: float | None = None
        """Monotonic seconds at which the latest token came."""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: PagedServeError | None = None
        self.timed_out = False
        self._assembler = assembler
        self._on_close = on_close
        self._pending: TextOutput | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self._read_to_end = False

    @property
    def outcome(self) -> Outcome:
        """How the request ended, or would if it were closed now."""
        return Outcome.TIMEOUT if self.timed_out else _OUTCOMES[self.finish_reason or FinishReason.CANCELLED]

    @property
    def ended(self) -> bool:
        """Whether no more will come from the core."""
        return self.finish_reason is not None

    def push(self, news: GenerationOutput) -> None:
        """Take in the core's news."""
        if news.error is not None:
            self.fail(news.error)
            return
        output = self._assembler.push(news)
        self.num_tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason
        if self._pending is None:
            self._pending = output
        else:
            self._pending.extend(output)
        self._changed.set()

    def fail(self, error: PagedServeError) -> None:
        """End the stream with ``error``; what came before it is still read."""
        self.error = error
        self.finish_reason = FinishReason.ERROR
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextOutput:
        while True:
            output, self._pending = self._pending, None
            if output is not None:
                return output
            if self.error is not None:
                raise self.error
            if self.ended or self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()

    def close(self, *, timed_out: bool = False) -> None:
        """Abort what is not finished, because of its time or of its client; closing again changes nothing."""
        if not self._closed:
            self._closed = True
            self.timed_out = timed_out and not self.ended
            self._changed.set()
            self._on_close(self)
