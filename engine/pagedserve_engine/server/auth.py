"""API keys from a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from pagedserve_engine.errors import AuthenticationError, ConfigError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""The file is looked at no more often."""

_Stamp = tuple[int, int, int]


class ApiKeys:
    """The keys of one file: one a line, blank lines and those that begin with # skipped.

    Where the file can't be read any more, or has no key, the last keys stay: a broken mount neither opens the door nor
    shuts everybody out.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked = clock()
        try:
            self._stamp: _Stamp | None = _stamp(path)
            self._digests = _read(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"API_KEY_FILE is {path}: {error}; give a file with one key a line", param="api_key_file"
            ) from None

    def check(self, authorization: str) -> None:
        """Raise AuthenticationError unless the header's value is "Bearer" with one of the keys."""
        self._reload_if_changed()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("no API key came: send it as Authorization: Bearer <key>")
        digest = _digest(key.strip())
        # Compare with all of them, so that the time taken tells nothing of which one was close.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise AuthenticationError("the API key is not one of this server's: check the Authorization header")

    def _reload_if_changed(self) -> None:
        now = self._clock()
        if now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._digests = _read(self._path)
        except (OSError, ValueError) as error:
            self._complain_once(error)
            return
        self._stamp = stamp
        logger.info("read %d API keys again", len(self._digests))

    def _complain_once(self, error: Exception) -> None:
        if self._stamp is not None:
            logger.warning("API_KEY_FILE can't be read, the last keys stay: %s", error)
        self._stamp = None


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> frozenset[bytes]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    digests = frozenset(_digest(line) for line in lines if line and not line.startswith("#"))
    if not digests:
        raise ValueError("it holds no key")
    return digests


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
