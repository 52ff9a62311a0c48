"""An engine without a model: a byte is a token, and the answer is what the test says.

The text side (stop strings, half characters) is the real one; loading, queueing and the core are played.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import (
    CancelledRequestError,
    ContextLengthError,
    DrainingError,
    EngineDeadError,
    InvalidParameterError,
    NotReadyError,
    PagedServeError,
)
from pagedserve_engine.request import FinishReason, GenerationOutput, GrammarSpec, RequestState, TokenLogprob
from pagedserve_engine.text import TextAssembler, TextOutput

EOS = 256
VOCAB_SIZE = 260
MAX_MODEL_LEN = 4096


class FakeDetokenizer:
    """UTF-8 without half characters."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, token_ids: Sequence[int]) -> str:
        self._bytes += bytes(token for token in token_ids if token < 256)
        for keep in range(4):
            end = len(self._bytes) - keep
            try:
                text = self._bytes[:end].decode()
            except UnicodeDecodeError:
                continue
            self._bytes = self._bytes[end:]
            return text
        return self.flush()

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


class FakeTokenizer:
    """A byte is a token; ids from 256 on are special and have names."""

    def __init__(self, *, supports_tools: bool = True) -> None:
        self.supports_tools = supports_tools
        self.has_chat_template = True
        self.chats: list[dict[str, Any]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([257] if add_special_tokens else []), *text.encode()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        self.chats.append({"messages": messages, **options})
        return self.encode("".join(f"<{m['role']}>{m.get('content', '')}" for m in messages), add_special_tokens=False)

    def token_text(self, token: int) -> str:
        return bytes([token]).decode(errors="replace") if token < 256 else f"<special{token}>"

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.token_text(token).encode()


class FakeStream:
    """One sequence: the answer's bytes, some at a time."""

    def __init__(self, engine: FakeEngine, request: Any, answer: str) -> None:
        self.request = request
        self.closed = False
        self._engine = engine
        self._assembler = TextAssembler(
            FakeDetokenizer(),
            stop=request.stop,
            include_stop=request.include_stop,
            min_tokens=request.params.min_tokens,
        )
        self._news = iter(self._make_news(answer))
        self._ended = False

    def _make_news(self, answer: str) -> list[GenerationOutput]:
        params, ids = self.request.params, list(answer.encode())
        most = MAX_MODEL_LEN if params.max_tokens is None else params.max_tokens
        stops = len(ids) <= most
        ids, step = ids[:most], self._engine.tokens_per_output
        news = [self._some(ids[at : at + step]) for at in range(0, len(ids), step)] or [self._some([])]
        if params.prompt_logprobs is not None:
            prompt = self.request.prompt_ids
            news[0].prompt_logprobs = [None, *(self._logprob(token, params.prompt_logprobs) for token in prompt[1:])]
        news[0].num_cached_tokens = self._engine.cached_tokens
        news[-1] = replace(news[-1], finish_reason=FinishReason.STOP if stops else FinishReason.LENGTH)
        return news

    def _some(self, ids: list[int]) -> GenerationOutput:
        top = self.request.params.logprobs
        logprobs = None if top is None else [self._logprob(token, top) for token in ids]
        return GenerationOutput(self.request.request_id, token_ids=ids, logprobs=logprobs)

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        mean = self._engine.mean_logprob(self.request)
        return TokenLogprob(token, mean, 1, tuple(((token + k) % 256, mean - k) for k in range(top)))

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TextOutput:
        await asyncio.sleep(0)
        engine = self._engine
        engine.num_read += 1
        if engine.hold_after is not None and engine.num_read > engine.hold_after:
            await engine.released.wait()
        if engine.fail_after is not None and engine.num_read > engine.fail_after[0]:
            self._ended = True
            raise engine.fail_after[1]
        if self.closed and not self._ended:
            raise CancelledRequestError("the request was cancelled")
        if self._ended:
            raise StopAsyncIteration
        output = self._assembler.push(next(self._news))
        self._ended = output.finish_reason is not None
        return output

    def close(self, *, timed_out: bool = False) -> None:
        self.closed = True
        self._engine.stream_closed()


class FakeEngine:
    """What the server needs of an AsyncEngine."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        answer: str | Callable[[Any], str] = "Hello world.",
        tokenizer: FakeTokenizer | None = None,
        has_tokenizer: bool = True,
        tokens_per_output: int = 1,
        cached_tokens: int = 0,
        hold_after: int | None = None,
        fail_after: tuple[int, Exception] | None = None,
        refusal: PagedServeError | None = None,
        loads: bool = True,
        loads_in_thread: bool = False,
        release_on_drain: bool = False,
        load_error: Exception | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.answer = answer
        self.fake_tokenizer = (tokenizer or FakeTokenizer()) if has_tokenizer else None
        self.tokens_per_output = tokens_per_output
        self.cached_tokens = cached_tokens
        self.hold_after = hold_after
        self.fail_after = fail_after
        self.refusal = refusal
        self.loads = loads
        self.loads_in_thread = loads_in_thread
        self.release_on_drain = release_on_drain
        self.load_error = load_error
        self.created = 1_700_000_000
        self.draining = False
        self.loaded = False
        self.alive = True
        self.died: asyncio.Future[EngineDeadError] | None = None
        self.requests: list[Any] = []
        self.streams: list[FakeStream] = []
        self.grammars: list[GrammarSpec] = []
        self.num_read = 0
        self.events: list[str] = []
        self.released = asyncio.Event()
        self.all_closed = asyncio.Event()
        self.submitted = asyncio.Event()
        self.mean_logprob: Callable[[Any], float] = lambda request: -0.5

    async def start(self) -> None:
        self.died = asyncio.get_running_loop().create_future()
        self.events.append("start")
        if self.load_error is not None:
            raise self.load_error
        if self.loads_in_thread:
            await asyncio.to_thread(threading.Event().wait)
        if not self.loads:
            await asyncio.Event().wait()
        self.loaded = True

    async def drain(self, seconds: float) -> None:
        self.draining = True
        self.events.append("drain")
        if self.release_on_drain:
            self.released.set()
        if any(not stream.closed for stream in self.streams):
            self.all_closed.clear()
            await asyncio.wait_for(self.all_closed.wait(), seconds)

    async def close(self) -> None:
        self.events.append("close")

    @property
    def ready(self) -> bool:
        return self.loaded and self.alive and not self.draining

    @property
    def reason(self) -> str:
        return "" if self.ready else "draining" if self.draining else "loading" if self.alive else "dead"

    def _need(self) -> None:
        if not self.loaded:
            raise NotReadyError("the model is still loading", retry_after=5.0)

    @property
    def name(self) -> str:
        self._need()
        return "org/fake"

    @property
    def max_model_len(self) -> int:
        self._need()
        return MAX_MODEL_LEN

    @property
    def vocab_size(self) -> int:
        self._need()
        return VOCAB_SIZE

    @property
    def tokenizer(self) -> FakeTokenizer | None:
        self._need()
        return self.fake_tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise InvalidParameterError("this model has no tokenizer", param="prompt")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        if self.tokenizer is None:
            raise InvalidParameterError("this model has no tokenizer", param="messages")
        return self.tokenizer.apply_chat_template(messages, **options)

    async def compile_grammar(self, spec: GrammarSpec) -> None:
        if spec.source == "(":
            raise InvalidParameterError("the pattern can't be read", param="response_format")
        self.grammars.append(spec)

    def submit(self, requests: Sequence[Any]) -> list[FakeStream]:
        if self.draining:
            raise DrainingError("the engine is leaving", retry_after=1.0)
        self._need()
        if self.refusal is not None:
            raise self.refusal
        for request in requests:
            self._check(request)
        answers = [self.answer(request) if callable(self.answer) else self.answer for request in requests]
        streams = [FakeStream(self, *pair) for pair in zip(requests, answers, strict=True)]
        self.requests += requests
        self.streams += streams
        self.submitted.set()
        return streams

    def _check(self, request: Any) -> None:
        if len(request.prompt_ids) + 1 > MAX_MODEL_LEN:
            raise ContextLengthError("the prompt is too long", param="prompt")
        RequestState.create(
            request.request_id, request.prompt_ids, request.params, arrival_time=0.0, max_model_len=MAX_MODEL_LEN
        )

    def stream_closed(self) -> None:
        if all(stream.closed for stream in self.streams):
            self.all_closed.set()
