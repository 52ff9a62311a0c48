"""How the demo is told: what happens now, line by line, with the seconds since the begin."""

from __future__ import annotations

import time
from collections.abc import Callable

from e2e.controlplane.build import BuildFailed
from e2e.providers.kind_plan import BadVariable
from e2e.providers.provider import Unavailable

SECONDS = 240.0
"""So long nothing may change while the story waits."""


class Broken(Exception):
    """The story can't be told to its end; says what is wrong."""


PLAIN = (Broken, Unavailable, BadVariable, BuildFailed, TimeoutError, AssertionError)
"""Errors whose message says all."""


class Narrator:
    """Progress on standard output, each line with the seconds since the begin."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._stages = 0

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._begun

    def stage(self, title: str) -> None:
        """A new part of the story."""
        self._stages += 1
        print(f"\n[{self.seconds:4.0f} s] {self._stages}. {title}", flush=True)

    def say(self, text: str) -> None:
        """What happens now, line by line."""
        for line in text.splitlines():
            print(f"[{self.seconds:4.0f} s]    {line}", flush=True)

    def follow(
        self,
        look: Callable[[], list[str]],
        *,
        until: Callable[[list[str]], bool],
        seconds: float = SECONDS,
        every: float = 0.5,
    ) -> None:
        """Say whatever changes, until it is as it should be; raises Broken where nothing changes for ``seconds``."""
        told: list[str] | None = None
        deadline = 0.0
        while True:
            rows = look()
            for row in rows:
                if row not in (told or ()):
                    self.say(row)
            if rows != told:
                deadline = time.monotonic() + seconds
            elif time.monotonic() > deadline:
                raise Broken(f"nothing more within {seconds:.0f} s: {'; '.join(rows)}")
            told = rows
            if until(rows):
                return
            time.sleep(every)


def failure(error: Exception) -> str:
    """An error in one line; its kind, too, where the message alone may say little."""
    said = " ".join(str(error).split())
    return said if said and isinstance(error, PLAIN) else f"{type(error).__name__}: {said}"
