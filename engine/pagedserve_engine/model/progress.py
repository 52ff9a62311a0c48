"""Long work says how far it is: a bar on a terminal, a log line now and then elsewhere.

Everything here is a ``tqdm`` class, because that is what the hub client and transformers know how to drive.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

Progress = type[Any]
"""What functions take that report progress: a tqdm class."""

LOG_SECONDS = 10.0
LOG_SHARE = 0.1


class LogBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar that writes one log line every ten seconds or ten percent, whichever comes later, and one at its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"file": io.StringIO(), "mininterval": LOG_SECONDS, "miniters": None, "ascii": True}
        self._logged_share = 0.0
        self.disable: bool = False
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Log instead of drawing; called by tqdm at most every ``mininterval``."""
        share = self.n / self.total if self.total else None
        if self.disable or self.n == 0 or (share is not None and share < 1 and share - self._logged_share < LOG_SHARE):
            return
        self._logged_share = share or 0.0
        percent = "" if share is None else f" {share:.0%}"
        logger.info("%s:%s after %.0f s", (self.desc or "working").rstrip(": "), percent, self.format_dict["elapsed"])

    def close(self) -> None:
        """End the bar; a full one has its last line."""
        if not self.disable and self.total and self.n >= self.total and self._logged_share < 1:
            self.display()
        self.disable = True


class NoBar(tqdm):  # type: ignore[misc]
    """Says nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"disable": True}))


def progress_for(stream: TextIO | None = None) -> Progress:
    """The class that suits ``stream`` (standard error where none is given)."""
    stream = sys.stderr if stream is None else stream
    return tqdm if stream.isatty() else LogBar


@contextmanager
def transformers_progress(progress: Progress, what: str) -> Iterator[None]:
    """Route transformers' own bars into ``progress``, described as ``what``; hush its other chatter meanwhile."""

    def make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return progress(*args, **(kwargs | {"desc": what, "leave": False}))

    verbosity = transformers_logging.get_verbosity()
    previous = transformers_logging.set_tqdm_hook(make)
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)
        transformers_logging.set_verbosity(verbosity)
