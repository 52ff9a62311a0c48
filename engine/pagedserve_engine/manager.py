"""The core's side of the two: a thread that owns the processor, commands in, news out.

Callers never touch the processor. They put commands into an inbox, and after every step one message brings the news of
all requests. Where no receiver is given, the news goes to a mailbox for each request, which is how a program uses the
engine without HTTP: ``add_request``, ``request_id_iter``, ``cancel``, or all at once with ``generate_batch``.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

from tqdm import tqdm

from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import CancelledRequestError, DrainingError, EngineDeadError, PagedServeError
from pagedserve_engine.processor import ContinuousBatchProcessor, refusal
from pagedserve_engine.request import GenerationOutput, RequestState, SamplingParams
from pagedserve_engine.stats import StepStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class News:
    """What the core tells after a step."""

    outputs: list[GenerationOutput]
    stats: StepStats | None
    num_received: int
    """Sequences taken from the inbox since the start."""
    death: EngineDeadError | None = None
    """The core's last word: every request that has no end yet ends with it."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: RequestState


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _EvictCached:
    num_blocks: int | None
    evicted: Future[int] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Wake:
    """Makes the core look at its flags."""


_Command = _Add | _Cancel | _EvictCached | _Wake


class Inbox:
    """Commands on their way to the core. Any thread puts, the core takes all there are at once."""

    def __init__(self) -> None:
        self._commands: deque[_Command] = deque()
        self._arrived = threading.Condition()
        self._closed = False

    def put(self, *commands: _Command) -> bool:
        """Add ``commands`` and wake the core; False where nobody will ever take them."""
        with self._arrived:
            if not self._closed:
                self._commands.extend(commands)
                self._arrived.notify()
            return not self._closed

    def close(self) -> list[_Command]:
        """Take no more; returns what was not taken yet."""
        with self._arrived:
            self._closed = True
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def take(self, *, wait: bool) -> list[_Command]:
        """All commands; with ``wait``, blocks until there is one."""
        if not wait and not self._commands:
            return []
        with self._arrived:
            while wait and not self._commands:
                self._arrived.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands


class Mailboxes:
    """News by request, for callers that iterate; the receiver where no other is given."""

    def __init__(self) -> None:
        self._boxes: dict[str, queue.SimpleQueue[GenerationOutput]] = {}
        self._lock = threading.Lock()

    def open(self, request_id: str) -> None:
        """Keep news of ``request_id`` from now on."""
        with self._lock:
            self._boxes[request_id] = queue.SimpleQueue()

    def receive(self, news: News) -> None:
        """Sort ``news`` into the boxes."""
        with self._lock:
            for output in news.outputs:
                if output.request_id in self._boxes:
                    self._boxes[output.request_id].put(output)
            if news.death is not None:
                for request_id, box in self._boxes.items():
                    box.put(refusal(request_id, news.death))

    def iterate(self, request_id: str) -> Iterator[GenerationOutput]:
        """News of one request to its end; ends at once for a request that nobody opened or that was read already."""
        with self._lock:
            box = self._boxes.get(request_id)
        while box is not None:
            output = box.get()
            if output.finished:
                with self._lock:
                    self._boxes.pop(request_id, None)
                box = None
            yield output


class ContinuousBatchingManager:
    """Owns the processor's thread. ``receive`` gets every News, on that thread; it must not block."""

    def __init__(
        self,
        processor: ContinuousBatchProcessor,
        *,
        receive: Callable[[News], None] | None = None,
        stall_seconds: float = 300.0,
    ) -> None:
        self._processor = processor
        self._mailboxes = Mailboxes() if receive is None else None
        self._receive = self._mailboxes.receive if self._mailboxes is not None else receive
        self._stall_seconds = stall_seconds
        self._inbox = Inbox()
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self._run, name="pagedserve-core", daemon=True)
        self._stopping: bool | None = None
        """None while running, then whether what runs may finish."""
        self._num_received = 0
        self._progress = time.monotonic()
        self._idle = True
        self._death: EngineDeadError | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Load the model and build the core; raises StartupError where it can't."""
        # Imported here: the HTTP side uses this module before torch and transformers have been read.
        from pagedserve_engine.assembly import build_core

        return cls(build_core(config).processor)

    # --- the callers' side ------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the core makes progress: it waits for work, or a step has begun lately."""
        stalled = not self._idle and time.monotonic() - self._progress > self._stall_seconds
        return self._death is None and self._thread.is_alive() and not stalled

    @property
    def death(self) -> EngineDeadError | None:
        """Why the core died, None while it has not."""
        return self._death

    def start(self) -> None:
        """Start the core's thread."""
        self._processor.on_failure(lambda: self._inbox.put(_Wake()))
        self._thread.start()

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> str:
        """Queue one sequence and return its id.

        Raises ContextLengthError where it can never fit, DrainingError after ``stop``, EngineDeadError on a dead core.
        """
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        self.add_requests([self.build_request(request_id, prompt_ids, params or SamplingParams(), salt=salt)])
        return request_id

    def build_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, salt: bytes = b""
    ) -> RequestState:
        """A request checked against the context length (ContextLengthError) and not queued yet."""
        return RequestState.create(
            request_id,
            prompt_ids,
            params,
            arrival_time=time.monotonic(),
            max_model_len=self._processor.scheduler.max_model_len,
            salt=salt,
        )

    def add_requests(self, requests: Sequence[RequestState]) -> None:
        """Queue ``requests`` together: one step may take them all."""
        if self._death is not None:
            raise self._death
        if self._stopping is not None:
            raise DrainingError("the engine is stopping and takes no new requests", retry_after=1.0)
        if self._mailboxes is not None:
            for request in requests:
                self._mailboxes.open(request.request_id)
        if not self._inbox.put(*(_Add(request) for request in requests)):
            raise self._death or DrainingError("the engine has stopped and takes no new requests", retry_after=1.0)

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """News of one request as it comes, the last of them with a finish reason."""
        assert self._mailboxes is not None, "the news goes to the receiver that this manager was given"
        return self._mailboxes.iterate(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; one that has ended already stays as it is."""
        self._inbox.put(_Cancel(request_id))

    def evict_cached(self, num_blocks: int | None = None) -> Future[int]:
        """Forget the oldest idle cached blocks (all where no number is given); the result is how many."""
        command = _EvictCached(num_blocks)
        if not self._inbox.put(command):
            command.evicted.set_result(0)
        return command.evicted

    def stop(self, block: bool = True, drain: bool = False) -> None:
        """End the core: with ``drain`` once all requests have ended, else at once, cancelling them.

        ``block`` waits for the thread.
        """
        self._stopping = drain
        self._inbox.put(_Wake())
        if block and self._thread.is_alive():
            self._thread.join()

    # --- the core's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._die(error)
        self._send(News(self._refuse(self._inbox.close()), None, self._num_received))
        self._processor.close()

    def _refuse(self, commands: list[_Command]) -> list[GenerationOutput]:
        """Answer what came too late to be taken in."""
        cause = self._death or CancelledRequestError("the engine was stopped before the request began")
        for command in commands:
            if isinstance(command, _EvictCached):
                command.evicted.set_result(0)
        return [refusal(command.request.request_id, cause) for command in commands if isinstance(command, _Add)]

    def _turn(self) -> bool:
        """One round: take in commands, run a step, send the news. False at the end."""
        scheduler = self._processor.scheduler
        self._idle = scheduler.idle
        outputs = self._obey(self._inbox.take(wait=scheduler.idle and self._stopping is None))
        self._idle, self._progress = False, time.monotonic()
        if self._stopping is False:
            cause = CancelledRequestError("the engine was stopped before the request ended")
            outputs.extend(self._processor.fail_all_requests(cause))
        news, stats = self._processor.step()
        outputs.extend(news)
        self._send(News(outputs, stats, self._num_received))
        return self._stopping is None or not scheduler.idle

    def _obey(self, commands: list[_Command]) -> list[GenerationOutput]:
        outputs: list[GenerationOutput | None] = []
        for command in commands:
            match command:
                case _Add(request):
                    self._num_received += 1
                    outputs.append(self._processor.add_request(request))
                case _Cancel(request_id):
                    outputs.append(self._processor.cancel(request_id))
                case _EvictCached(num_blocks, evicted):
                    evicted.set_result(self._processor.scheduler.cache.evict_cached(num_blocks))
                case _Wake():
                    pass
        return [output for output in outputs if output is not None]

    def _send(self, news: News) -> None:
        assert self._receive is not None
        self._receive(news)

    def _die(self, error: BaseException) -> None:
        logger.critical("the core died", exc_info=error)
        death = EngineDeadError(f"the engine's core died: {error or type(error).__name__}")
        death.__cause__ = error
        self._death = death
        self._send(News([], None, self._num_received, death))


def generate_batch(
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: bool = True,
) -> list[GenerationOutput]:
    """Generate for all ``prompts`` (token ids) and return one complete output each, in their order.

    A prompt that fails has its ``error`` set and hurts no other; ``progress`` shows a bar over the requests.
    """
    manager = ContinuousBatchingManager.from_config(config)
    manager.start()
    try:
        return run_batch(manager, prompts, params, progress=progress)
    finally:
        manager.stop(block=True)


def run_batch(
    manager: ContinuousBatchingManager,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    progress: bool = True,
) -> list[GenerationOutput]:
    """``generate_batch`` on a manager that runs already."""
    every = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
    results: list[GenerationOutput | None] = []
    requests: list[RequestState] = []
    for index, (prompt_ids, own) in enumerate(zip(prompts, every, strict=True)):
        try:
            requests.append(manager.build_request(f"batch-{next(manager._ids)}", prompt_ids, own))
            results.append(None)
        except PagedServeError as error:
            results.append(refusal(f"refused-{index}", error))
    manager.add_requests(requests)
    pending = iter(requests)
    with tqdm(total=len(prompts), disable=not progress, unit="request", desc="generating") as bar:
        for index, result in enumerate(results):
            if result is None:
                results[index] = collect(manager.request_id_iter(next(pending).request_id))
            bar.update()
    return [result for result in results if result is not None]


def collect(outputs: Iterator[GenerationOutput]) -> GenerationOutput:
    """All news of one request as a single output."""
    whole: GenerationOutput | None = None
    for output in outputs:
        if whole is None:
            whole = output
            continue
        whole.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            whole.logprobs = [*(whole.logprobs or []), *output.logprobs]
        whole.finish_reason, whole.error = output.finish_reason, output.error
        whole.stop_token_id = output.stop_token_id
    assert whole is not None, "the request was read already"
    return whole
