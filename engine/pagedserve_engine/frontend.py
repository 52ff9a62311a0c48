"""The HTTP side's view of the core: submit text requests, read streams, abort by closing, drain.

Lives on one event loop. The core's news arrives there once a step and is turned into text at once; a reader that is
slow gets what has come in the meantime as one output, so that nothing here waits for a client.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import (
    CancelledRequestError,
    DrainingError,
    EngineDeadError,
    InvalidParameterError,
    NotReadyError,
    PagedServeError,
    QueueFullError,
)
from pagedserve_engine.manager import ContinuousBatchingManager, News
from pagedserve_engine.metrics import EngineMetrics
from pagedserve_engine.request import FinishReason, GenerationOutput, GrammarSpec
from pagedserve_engine.stats import Outcome, Planned, RequestStats, StepStats
from pagedserve_engine.stream import TextStream
from pagedserve_engine.text import NoText, TextAssembler, TextRequest

if TYPE_CHECKING:
    from pagedserve_engine.assembly import Core
    from pagedserve_engine.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

VERSION = metadata.version("pagedserve-engine")

LONG_TEXT = 4096
"""Characters from which on text is tokenized on a thread of its own, so that the event loop stays free."""


class AsyncEngine:
    """A model that loads, serves, drains and tells how it fares."""

    def __init__(
        self, config: EngineConfig, metrics: EngineMetrics, *, build: Callable[[EngineConfig], Core] | None = None
    ) -> None:
        self.config = config
        self.created = int(time.time())
        self.draining = False
        self._metrics = metrics
        self._build = build or _build_core
        self._core: Core | None = None
        self._manager: ContinuousBatchingManager | None = None
        self._streams: dict[str, TextStream] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._num_submitted = 0
        self._num_received = 0
        self._num_running = 0
        self._num_waiting = 0
        self.died: asyncio.Future[EngineDeadError] | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model and start the core; raises StartupError."""
        loop = asyncio.get_running_loop()
        self.died = loop.create_future()
        core = await asyncio.to_thread(self._build, self.config)
        manager = ContinuousBatchingManager(core.processor, receive=lambda news: _call_soon(loop, self._dispatch, news))
        manager.start()
        self._core, self._manager = core, manager
        self._report(core)

    def _report(self, core: Core) -> None:
        plan = core.plan
        blocks, batch, length = (
            Planned(requested=None if requested == "auto" else requested, actual=actual)
            for _, requested, actual in plan.settings
        )
        self._metrics.report_settings(
            num_blocks=blocks, max_batch_tokens=batch, max_model_len=length, block_size=plan.block_size
        )
        self._metrics.report_engine(
            model=core.name, dtype=str(core.dtype).removeprefix("torch."), attention=core.attention, version=VERSION
        )
        self._metrics.report_device_memory(used=plan.used, total=plan.total)
        self._metrics.observe_step(StepStats.idle(num_blocks=plan.num_blocks))

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and let what runs finish within ``seconds``; what is left then fails with DrainingError."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._all_ended.wait()
        except TimeoutError:
            logger.warning("%d requests did not end within DRAIN_SECONDS", len(self._streams))
            for stream in list(self._streams.values()):
                stream.fail(
                    DrainingError("the engine is leaving and the request took longer than it may", retry_after=1.0)
                )
                self._end(stream)

    async def close(self) -> None:
        """Stop the core; open requests are cancelled."""
        self.draining = True
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, block=True, drain=False)

    @property
    def ready(self) -> bool:
        """Whether requests are welcome: loaded, alive and not draining."""
        return self._manager is not None and self._manager.alive and not self.draining

    @property
    def alive(self) -> bool:
        """Whether the core makes progress, or is still to be loaded."""
        return self._manager is None or self._manager.alive

    @property
    def reason(self) -> str:
        """Why the engine is not ready; empty where it is."""
        if self.draining:
            return "draining"
        if self._manager is None:
            return "loading"
        if self._manager.death is not None:
            return self._manager.death.message
        return "" if self._manager.alive else "the core has stopped making progress"

    # --- the model --------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Core:
        """The loaded core; raises NotReadyError before."""
        if self._core is None:
            raise NotReadyError("the model is still loading", retry_after=5.0)
        return self._core

    @property
    def name(self) -> str:
        """The served model's name."""
        return self.core.name

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.core.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.core.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self.core.tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``."""
        tokenizer = self._require_tokenizer("prompt")
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of ``messages`` in the model's chat template; ``options`` as ``Tokenizer.apply_chat_template``."""
        tokenizer = self._require_tokenizer("messages")
        return await asyncio.to_thread(tokenizer.apply_chat_template, messages, **options)

    def _require_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidParameterError("this model has no tokenizer: send the prompt as token ids", param=param)
        return self.tokenizer

    async def compile_grammar(self, spec: GrammarSpec) -> None:
        """Check and prepare ``spec``; raises InvalidParameterError with the reason."""
        grammars = self.core.grammars
        if grammars is None:
            raise InvalidParameterError(
                "this model has no tokenizer: its output can't be constrained", param="response_format"
            )
        await asyncio.to_thread(grammars.compile, spec)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[TextRequest]) -> list[TextStream]:
        """Queue ``requests``, all or none.

        Raises QueueFullError, DrainingError, NotReadyError, EngineDeadError or ContextLengthError.
        """
        try:
            streams = self._queue(requests)
        except PagedServeError:
            for _ in requests:
                self._metrics.observe_request(RequestStats(outcome=Outcome.REJECTED, duration=0.0))
            raise
        for stream in streams:
            self._streams[stream.request.request_id] = stream
        self._all_ended.clear()
        return streams

    def _queue(self, requests: Sequence[TextRequest]) -> list[TextStream]:
        if self.draining:
            raise DrainingError("the engine is leaving and takes no new requests", retry_after=1.0)
        manager = self._manager
        if manager is None:
            raise NotReadyError("the model is still loading", retry_after=5.0)
        if manager.death is not None:
            raise manager.death
        self._check_queue(len(requests))
        states = [manager.build_request(r.request_id, r.prompt_ids, r.params, salt=r.salt) for r in requests]
        streams = [TextStream(request, self._assembler(request), on_close=self._on_close) for request in requests]
        manager.add_requests(states)
        self._num_submitted += len(states)
        return streams

    def _check_queue(self, num_new: int) -> None:
        on_the_way = self._num_submitted - self._num_received
        free = 0 if self._num_waiting else max(0, self.config.max_num_seqs - self._num_running)
        waiting = self._num_waiting + max(0, on_the_way + num_new - free)
        if waiting > self.config.max_queue:
            wait = self._metrics.recent_queue_wait.value(0.0)
            raise QueueFullError(
                f"{waiting - num_new} requests wait and {self.config.max_queue} may: try again later",
                retry_after=float(min(60, max(1, math.ceil(wait)))),
            )

    def _assembler(self, request: TextRequest) -> TextAssembler:
        tokenizer = self.tokenizer
        detokenizer = (
            NoText()
            if tokenizer is None
            else tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens, prompt_ids=request.prompt_ids)
        )
        return TextAssembler(
            detokenizer,
            stop=request.stop,
            include_stop=request.include_stop,
            min_tokens=request.params.min_tokens,
            stop_token_ids=request.params.stop_token_ids,
        )

    def _dispatch(self, news: News) -> None:
        """The core's news, on the event loop."""
        self._num_received = news.num_received
        if news.stats is not None:
            self._num_running, self._num_waiting = news.stats.num_running, news.stats.num_waiting
            self._metrics.observe_step(news.stats)
        for output in news.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                self._push(stream, output)
        if news.death is not None:
            for stream in list(self._streams.values()):
                stream.fail(news.death)
                self._end(stream)
            if self.died is not None and not self.died.done():
                self.died.set_result(news.death)

    def _push(self, stream: TextStream, output: GenerationOutput) -> None:
        if output.token_ids:
            self._observe_tokens(stream)
        try:
            stream.push(output)
        except Exception as error:
            logger.exception("text of %s could not be made", output.request_id)
            stream.fail(PagedServeError(f"the output could not be turned into text: {error}"))
        if stream.ended:
            if not output.finished:  # A stop string was found: the core does not know yet.
                self._cancel(stream)
            self._end(stream)

    def _observe_tokens(self, stream: TextStream) -> None:
        now = time.monotonic()
        if stream.last_token is None:
            self._metrics.observe_first_token(now - stream.submitted)
        else:
            self._metrics.observe_inter_token(now - stream.last_token)
        stream.last_token = now

    def _on_close(self, stream: TextStream) -> None:
        if not stream.ended:
            stream.finish_reason = FinishReason.CANCELLED
            stream.error = CancelledRequestError("the request was cancelled")
            self._cancel(stream)
        self._end(stream)

    def _cancel(self, stream: TextStream) -> None:
        if self._manager is not None:
            self._manager.cancel(stream.request.request_id)

    def _end(self, stream: TextStream) -> None:
        if self._streams.pop(stream.request.request_id, None) is None:
            return
        self._metrics.observe_request(
            RequestStats(
                outcome=stream.outcome,
                duration=time.monotonic() - stream.submitted,
                prompt_tokens=len(stream.request.prompt_ids),
                generated_tokens=stream.num_tokens,
            )
        )
        if not self._streams:
            self._all_ended.set()


def _build_core(config: EngineConfig) -> Core:
    # Imported here, on the loading thread: torch and transformers take seconds, and the probes answer meanwhile.
    from pagedserve_engine.assembly import build_core

    return build_core(config)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[News], None], news: News) -> None:
    try:
        loop.call_soon_threadsafe(call, news)
    except RuntimeError:  # The loop is closed: the process is on its way out and nobody reads any more.
        logger.debug("news came after the event loop's end")
