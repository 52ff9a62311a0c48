"""Who kills the operator again and again while something else goes on."""

from __future__ import annotations

import http.client
import threading
from types import TracebackType
from typing import Self

from e2e.installation import Installation
from e2e.providers.provider import Provider

from control_client import ApiError

_PASSING = (LookupError, ApiError, OSError, http.client.HTTPException)
"""A pod that is gone by now, an API server that is away: the next turn may do better."""


class Killer:
    """Kills the operator that leads every ``seconds`` while it is entered; ``kills`` names the pods.

    ``missed`` is the last turn's error that passes; any other ends it, and is raised by ``check`` and on leaving.
    """

    def __init__(self, provider: Provider, installation: Installation, *, seconds: float = 5.0) -> None:
        self.kills: list[str] = []
        self.missed: Exception | None = None
        self._provider = provider
        self._installation = installation
        self._seconds = seconds
        self._failure: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what ended it, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._turn()
            except _PASSING as passing:
                self.missed = passing
            except Exception as failure:
                self._failure = failure
                return
            self._over.wait(self._seconds)

    def _turn(self) -> None:
        # Where none leads at the moment, whoever may lead next.
        names = [pod["metadata"]["name"] for pod in self._installation.pods()]
        if victim := self._installation.leader() or next(iter(names), None):
            self._provider.kill(self._installation.namespace, victim)
            self.kills.append(victim)
