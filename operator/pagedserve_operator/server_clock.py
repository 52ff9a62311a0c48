"""What time it is for the API server, by the date on its answers: it judges certificates, by its own clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

import aiohttp

logger = logging.getLogger(__name__)

WRONG_SECONDS: Final = 60.0
"""From so much on the difference is told: dates have whole seconds, and answers take a while."""


class ServerClock:
    """Our own clock, put right by the difference that was last seen; ``clock`` gives our time, with its zone."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._ahead = timedelta()
        self._told = False

    @property
    def ahead_seconds(self) -> float:
        """How far the API server's clock is ahead of ours; negative where it is behind."""
        return self._ahead.total_seconds()

    def now(self) -> datetime:
        """The API server's time; ours before its first answer."""
        return self._clock() + self._ahead

    def saw(self, date: str) -> None:
        """An answer has just come with this date; what is no date is passed over."""
        try:
            theirs = parsedate_to_datetime(date)
        except ValueError:
            return
        self._ahead = (theirs if theirs.tzinfo else theirs.replace(tzinfo=UTC)) - self._clock()
        wrong = abs(self.ahead_seconds) > WRONG_SECONDS
        if wrong and not self._told:
            logger.warning(
                "this machine's clock and the API server's differ by %.0f s: set the wrong one right (certificates are "
                "made by the API server's)",
                abs(self.ahead_seconds),
            )
        self._told = wrong


def reading(clock: ServerClock) -> Any:
    """A client middleware that shows the clock each answer's date."""

    async def middleware(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await handler(request)
        if "Date" in response.headers:
            clock.saw(response.headers["Date"])
        return response

    return middleware
