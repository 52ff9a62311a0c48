"""From a sequence's tokens to its text: stop strings are found across token borders, and nothing is sent too early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagedserve_engine.request import FinishReason, GenerationOutput, SamplingParams, TokenLogprob


class Detokenizer(Protocol):
    """Turns tokens into text that never ends in half a character."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What is left, however broken."""


class NoText:
    """Stands in where the model has no tokenizer: clients get token ids alone."""

    def push(self, token_ids: Sequence[int]) -> str:
        """No text."""
        return ""

    def flush(self) -> str:
        """No text."""
        return ""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One sequence to generate, in the terms of a client."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    salt: bytes = b""


@dataclass(slots=True)
class TextOutput:
    """What a stream has for its client since the last time."""

    text: str = ""
    """Never part of a stop string, never half a character."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the asked-for stop token that ended the sequence."""
    num_cached_tokens: int = 0

    def extend(self, later: TextOutput) -> None:
        """Take in what came after."""
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *later.logprobs]
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)


class StopFinder:
    """Lets text pass until a stop string is complete, and holds back what may still become one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, armed: bool) -> str:
        """Text that may be sent. Unarmed, stop strings pass as text."""
        if not self._stops:
            return text
        if not armed:
            sendable, self._held = self._held + text, ""
            return sendable
        text = self._held + text
        hits = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            start, _, self.found = min(hits)
            self._held = ""
            return text[: start + len(self.found)] if self._include_stop else text[:start]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` and does not complete it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextAssembler:
    """One sequence's way from GenerationOutput to TextOutput."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self._finder = StopFinder(stop, include_stop=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._num_tokens = 0

    def push(self, news: GenerationOutput) -> TextOutput:
        """The text of ``news``; where a stop string ends it, the reason is STOP and later tokens are dropped."""
        output = TextOutput(prompt_logprobs=news.prompt_logprobs, num_cached_tokens=news.num_cached_tokens)
        for at, token in enumerate(news.token_ids):
            self._take(output, token, news, at)
            if self._finder.found is not None:
                output.finish_reason, output.stop_reason = FinishReason.STOP, self._finder.found
                return output
        if news.finished:
            self._end(output, news)
        return output

    def _take(self, output: TextOutput, token: int, news: GenerationOutput, at: int) -> None:
        self._num_tokens += 1
        output.token_ids.append(token)
        if news.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), news.logprobs[at]]
        ends_here = token == news.stop_token_id and at == len(news.token_ids) - 1
        if ends_here and not self._include_stop:
            return
        text = self._detokenizer.push([token])
        if text:
            output.text += self._finder.push(text, armed=self._num_tokens >= self._min_tokens)

    def _end(self, output: TextOutput, news: GenerationOutput) -> None:
        output.text += self._finder.push(self._detokenizer.flush(), armed=self._num_tokens >= self._min_tokens)
        output.finish_reason = news.finish_reason
        if self._finder.found is not None:
            output.finish_reason, output.stop_reason = FinishReason.STOP, self._finder.found
            return
        output.text += self._finder.flush()
        if news.stop_token_id in self._stop_token_ids:
            output.stop_reason = news.stop_token_id
