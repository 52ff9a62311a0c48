"""A load generator on bare sockets, in a process of its own: streamed completions from a fixed number of clients.

It reads just enough HTTP and JSON to stamp each token's arrival, so that it costs the server's machine as little as
possible. ``python -m benchmarks.load HOST PORT MODEL CONCURRENCY REPETITION COUNT`` prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.workloads import HTTP, Request, smaller


class LoadError(Exception):
    """The server answered with something other than the stream asked for."""


@dataclass(slots=True)
class Stream:
    """Arrival times (monotonic seconds) of one streamed answer."""

    sent: float
    events: list[float] = field(default_factory=list)
    """When each event with text or a token came."""
    completion_tokens: int = 0
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [after - before for before, after in zip(self.events, self.events[1:], strict=False)]


class EventReader(asyncio.Protocol):
    """One connection, one request; the answer's events are split at blank lines, across chunk borders."""

    def __init__(self, request: bytes, done: asyncio.Future[Stream]) -> None:
        self._request = request
        self._done = done
        self._buffer = b""
        self._headers_read = False
        self._refused = False
        """Whether the status was not 200; the buffer then holds the answer for the error."""
        self._stream = Stream(0.0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request; its clock starts here, the connection is open."""
        assert isinstance(transport, asyncio.Transport)
        self._stream.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Stamp every event in ``data`` with the time of its last byte."""
        now = time.perf_counter()
        self._buffer += data
        if not self._headers_read and not self._read_headers():
            return
        if self._refused:
            return
        *events, self._buffer = self._buffer.split(b"\n\n")
        for event in events:
            self._take(event, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand over what was read; the server closes after the answer, as it was asked to."""
        if self._done.cancelled():
            return
        if self._refused:
            self._done.set_exception(LoadError(self._buffer[:400].decode(errors="replace")))
        elif exc is not None or not self._stream.ended:
            self._done.set_exception(LoadError(f"the stream broke: {exc or self._buffer[:300]!r}"))
        else:
            self._done.set_result(self._stream)

    def _read_headers(self) -> bool:
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return False
        status = head.split(b"\r\n", 1)[0]
        self._refused = b" 200 " not in status + b" "
        self._headers_read, self._buffer = True, status + b": " + rest if self._refused else rest
        return True

    def _take(self, event: bytes, now: float) -> None:
        # A chunk's size line may stand before the event; what counts begins with "data: ".
        payload = event.partition(b"data: ")[2]
        if payload.startswith(b"[DONE]"):
            self._stream.ended = now
        elif b'"choices":[]' in payload or b'"choices": []' in payload:
            usage = json.loads(_without_chunk_ends(payload))["usage"]
            self._stream.completion_tokens = usage["completion_tokens"]
        elif payload:
            self._stream.events.append(now)


def _without_chunk_ends(payload: bytes) -> bytes:
    return payload[: payload.rindex(b"}") + 1]


def http_request(request: Request, *, host: str, port: int, model: str) -> bytes:
    """The bytes of a streamed completion of exactly ``max_tokens`` greedy tokens."""
    body = json.dumps(
        {
            "model": model,
            "prompt": request.prompt_ids,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def generate_load(host: str, port: int, messages: list[bytes], concurrency: int) -> tuple[float, list[Stream]]:
    """Send ``messages`` from ``concurrency`` clients, each one after another; returns (seconds, streams)."""
    waiting = deque(enumerate(messages))
    streams: dict[int, Stream] = {}
    loop = asyncio.get_running_loop()

    async def client() -> None:
        while waiting:
            index, message = waiting.popleft()
            done: asyncio.Future[Stream] = loop.create_future()
            await loop.create_connection(partial(EventReader, message, done), host, port)
            streams[index] = await done

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return time.perf_counter() - started, [streams[index] for index in range(len(messages))]


def summary(seconds: float, streams: list[Stream], requests: list[Request]) -> dict[str, Any]:
    """Figures of a run, times in milliseconds. Raises LoadError where an answer has another length than asked for."""
    tokens = [stream.completion_tokens for stream in streams]
    if tokens != [request.max_tokens for request in requests]:
        raise LoadError(f"output lengths differ from those asked for: {tokens}")
    ttft = [1_000 * stream.ttft for stream in streams]
    gaps = [1_000 * gap for stream in streams for gap in stream.gaps]
    per_token = [
        1_000 * (stream.events[-1] - stream.events[0]) / (stream.completion_tokens - 1)
        for stream in streams
        if stream.completion_tokens > 1
    ]
    return {
        "seconds": seconds,
        "throughput": sum(tokens) / seconds,
        "ttft_p50": statistics.median(ttft),
        "ttft_p99": percentile(ttft, 99),
        "gap_p50": statistics.median(gaps),
        "gap_p99": percentile(gaps, 99),
        "per_token_p50": statistics.median(per_token),
    }


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of 100 values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    parser.add_argument("concurrency", type=int)
    parser.add_argument("repetition", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    requests = (smaller(HTTP) if options.quick else HTTP).requests(options.repetition, options.count)
    messages = [
        http_request(request, host=options.host, port=options.port, model=options.model) for request in requests
    ]
    try:
        seconds, streams = asyncio.run(generate_load(options.host, options.port, messages, options.concurrency))
        print(json.dumps(summary(seconds, streams, requests)), flush=True)
    except* (LoadError, OSError) as errors:
        print(json.dumps({"error": str(errors.exceptions[0])}), flush=True)


if __name__ == "__main__":
    main()
