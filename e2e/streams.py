"""Answers streamed through a Service, each on a connection of its own, and whether each came whole."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

JSON = dict[str, Any]
SECONDS = 300.0
"""Bound of one answer; none is expected to come near it."""


class Cut(Exception):
    """An answer that didn't come whole; says what came instead."""


@dataclass(frozen=True)
class Question:
    """A greedy completion of exactly so many tokens."""

    prompt: str
    tokens: int

    @property
    def body(self) -> JSON:
        """The request."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }


def ask(address: str, question: Question, *, on_token: Callable[[], object] = lambda: None) -> str:
    """The whole text; raises Cut for anything less."""
    place = urllib.parse.urlsplit(f"//{address}")
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=SECONDS)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    try:
        connection.request("POST", "/v1/completions", json.dumps(question.body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Cut(f"status {response.status}: {response.read().decode(errors='replace')}")
        return _read(response, on_token)
    except (OSError, http.client.HTTPException) as error:
        raise Cut(repr(error)) from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, on_token: Callable[[], object]) -> str:
    text, reason = "", None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            if reason != "length":
                raise Cut(f"it ended by {reason} after {text[-60:]!r}")
            return text
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise Cut(f"an error came after {text[-60:]!r}: {event['error']}")
        for choice in event["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
        on_token()
    raise Cut(f"it was cut after {text[-60:]!r}")


class Stream:
    """One answer in a thread of its own; made, its first tokens are there."""

    def __init__(self, address: str, question: Question) -> None:
        self._address, self._question = address, question
        self._text: str | None = None
        self._failure: Cut | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(SECONDS), f"no stream began at {address}"

    @property
    def runs(self) -> bool:
        """Whether it hasn't ended."""
        return self._thread.is_alive()

    def finish(self) -> str:
        """The whole text, once it is there; raises Cut."""
        self._thread.join(SECONDS)
        if self._failure is not None:
            raise self._failure
        assert self._text is not None, "the stream doesn't end"
        return self._text

    def _run(self) -> None:
        try:
            self._text = ask(self._address, self._question, on_token=self._begun.set)
        except Cut as cut:
            self._failure = cut
        finally:
            self._begun.set()


@dataclass(frozen=True)
class Tally:
    """Streams that were started, and those whose text came whole and was the right one."""

    started: int
    whole: int


class Crowd:
    """Clients that stream one answer after the other through a Service, each compared with ``texts``.

    Left in good order, they finish what they have begun. ``faults`` says what was wrong, one line for each stream.
    """

    def __init__(self, address: str, texts: Mapping[Question, str], *, clients: int = 6) -> None:
        self.faults: list[str] = []
        self._address = address
        self._texts = texts
        self._lock = threading.Lock()
        self._started = self._whole = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        # Whoever leaves by an error or Ctrl-C doesn't wait for the answers.
        for thread in self._threads if kind is None else ():
            thread.join(SECONDS)

    @property
    def tally(self) -> Tally:
        """How many there were so far."""
        with self._lock:
            return Tally(self._started, self._whole)

    def wait_started(self, count: int, *, seconds: float = SECONDS) -> None:
        """Until so many more streams have started."""
        wanted, deadline = self.tally.started + count, time.monotonic() + seconds
        while self.tally.started < wanted:
            assert time.monotonic() < deadline, f"{self.tally} after {seconds:.0f} s: {self.faults[-3:]}"
            time.sleep(0.05)

    def _run(self, client: int) -> None:
        questions: Sequence[Question] = list(self._texts)
        turn = client
        while not self._over.is_set():
            turn += 1
            self._ask(questions[turn % len(questions)])

    def _ask(self, question: Question) -> None:
        with self._lock:
            self._started += 1
            number = self._started
        try:
            text = ask(self._address, question)
        except Cut as cut:
            self.faults.append(f"stream {number} at {time.strftime('%H:%M:%S')}: {cut}")
            # A Service without an engine refuses at once: nobody asks it a thousand times a second.
            self._over.wait(0.2)
            return
        if text != self._texts[question]:
            self.faults.append(f"stream {number}: another text: {text[-60:]!r}")
            return
        with self._lock:
            self._whole += 1
