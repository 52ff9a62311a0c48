"""Many streaming clients at once over plain sockets, some of which hang up, and what a server's memory is then."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SECONDS = 240.0
"""Bound of one client's whole conversation; none is expected to come near it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy completion to ask for."""

    prompt: str
    max_tokens: int

    @property
    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Answer:
    """What a client saw."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    complete: bool = False
    """The end mark came, and the body's own end after it."""
    hung_up: bool = False
    num_events: int = 0
    num_refused: int = 0
    """Answers 429 before this one."""

    def take(self, data: bytes) -> None:
        """Read one event, or the body of an error."""
        if data.startswith(b"{"):
            self.error = json.loads(data)["error"]
        elif data == b"data: [DONE]\n\n":
            self.complete = True
        else:
            event = json.loads(data.removeprefix(b"data: "))
            self.num_events += 1
            self.error = event.get("error")
            for choice in event.get("choices", ()):
                self.text += choice["text"]
                self.finish_reason = choice["finish_reason"] or self.finish_reason


async def ask(
    port: int,
    question: Question,
    *,
    hang_up_after: int | None = None,
    abort: bool = False,
    on_event: Callable[[Answer], object] = lambda answer: None,
) -> Answer:
    """Stream one completion; hang up after so many events (0: once asked, before any answer), rudely with ``abort``.

    A response that is cut raises IncompleteReadError.
    """
    answer = Answer()
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_request(question))
            await writer.drain()
            if hang_up_after == 0:
                answer.hung_up = True
                return answer
            await _follow(reader, answer, hang_up_after=hang_up_after, on_event=on_event)
            return answer
        finally:
            writer.transport.abort() if abort else writer.close()


async def _follow(
    reader: asyncio.StreamReader,
    answer: Answer,
    *,
    hang_up_after: int | None,
    on_event: Callable[[Answer], object],
) -> None:
    """Read the response into ``answer``, to its end or to the event at which the client hangs up."""
    answer.status, answer.headers = await _read_head(reader)
    if answer.status != 200:
        answer.take(await reader.readexactly(int(answer.headers["content-length"])))
        return
    while data := await _read_chunk(reader):
        answer.take(data)
        on_event(answer)
        if answer.num_events == hang_up_after:
            answer.hung_up = True
            return


async def insist(port: int, question: Question, **options: Any) -> Answer:
    """``ask``, and again whenever the server says that it is full."""
    num_refused = 0
    while True:
        answer = await ask(port, question, **options)
        if answer.status != 429:
            answer.num_refused = num_refused
            return answer
        num_refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))


@dataclass(frozen=True)
class Crowd:
    """Clients that come all at once; a third of them hangs up at a moment that the seed decides."""

    questions: Sequence[Question]
    num_clients: int = 500

    async def storm(self, port: int, *, seed: int) -> list[tuple[Question, Answer]]:
        """What each client asked and saw."""
        chance = random.Random(seed)
        asked = [self.questions[n % len(self.questions)] for n in range(self.num_clients)]
        chance.shuffle(asked)
        leaving = set(chance.sample(range(self.num_clients), self.num_clients // 3))
        tasks = [
            insist(
                port,
                question,
                hang_up_after=chance.randrange(question.max_tokens) if n in leaving else None,
                abort=chance.random() < 0.5,
            )
            for n, question in enumerate(asked)
        ]
        return list(zip(asked, await asyncio.gather(*tasks), strict=True))


def tally(samples: Mapping[str, float]) -> Counter[str]:
    """Requests by outcome, of a server's samples."""
    prefix = "requests_total{outcome="
    return Counter(
        {name.removeprefix(prefix)[:-1]: int(value) for name, value in samples.items() if name.startswith(prefix)}
    )


def anonymous_bytes(pid: int) -> int:
    """The process's own memory and its children's. A library's pages would count more when others that share it end."""
    process = psutil.Process(pid)
    return sum(_anonymous(each.pid) for each in (process, *process.children(recursive=True)))


def _anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no Pss_Anon of {pid}")


def _request(question: Question) -> bytes:
    body = json.dumps({**question.body, "stream": True}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    fields = (line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value for name, value in fields}


async def _read_chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk's data, which the server makes of one event; empty at the body's end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:size]
