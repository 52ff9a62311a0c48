"""Ctrl-C and SIGTERM: both end what runs in order, and neither breaks off the ending."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_BOTH = (signal.SIGINT, signal.SIGTERM)


def end_in_order_on_sigterm() -> None:
    """SIGTERM raises KeyboardInterrupt, so that whatever was entered is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Both signals are ignored here, by programs that are started meanwhile, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _BOTH}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
