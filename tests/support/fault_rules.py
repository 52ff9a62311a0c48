"""Which faults there are, and which call each of them strikes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from fault_calls import Address, Call, Ledger

When = Callable[[Call], bool]

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Kind(StrEnum):
    """What befalls a call."""

    STATUS = "status"
    RESET = "reset"
    TIMEOUT_AFTER_COMMIT = "timeout after commit"
    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    GONE = "watch gone"
    CUT = "watch cut"
    HANG = "hang"


WATCHES_ONLY = frozenset({Kind.GONE, Kind.CUT})
OPEN_WATCHES = frozenset({*WATCHES_ONLY, Kind.HANG, Kind.RESET})
"""What can befall a watch that is open already."""
_ANSWERED_ONLY = frozenset({Kind.TIMEOUT_AFTER_COMMIT, Kind.CRASH_AFTER})
"""What waits for a whole answer, which a watch never gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that can go wrong; made by its class methods."""

    kind: Kind
    code: int = 0
    retry_after: int | None = None
    seconds: float | None = None
    callback: Callable[[Call], None] | None = None

    @classmethod
    def status(cls, code: int, *, retry_after: int | None = None) -> Self:
        """Answer ``code`` with a metav1.Status and don't forward; ``retry_after`` in seconds, 1 for a 429."""
        return cls(kind=Kind.STATUS, code=code, retry_after=1 if code == 429 and retry_after is None else retry_after)

    @classmethod
    def reset(cls) -> Self:
        """Close the connection with RST and don't forward; also for watches that are open."""
        return cls(kind=Kind.RESET)

    @classmethod
    def timeout_after_commit(cls, *, seconds: float | None = 0.05) -> Self:
        """Forward, swallow the answer and close after ``seconds``; None waits until the client gives up."""
        return cls(kind=Kind.TIMEOUT_AFTER_COMMIT, seconds=seconds)

    @classmethod
    def crash_before(cls, callback: Callable[[Call], None]) -> Self:
        """Call ``callback`` (in a thread of its own: it may block) instead of forwarding; never answer."""
        return cls(kind=Kind.CRASH_BEFORE, callback=callback)

    @classmethod
    def crash_after(cls, callback: Callable[[Call], None]) -> Self:
        """Forward, call ``callback`` once the API server has answered; never answer."""
        return cls(kind=Kind.CRASH_AFTER, callback=callback)

    @classmethod
    def gone(cls) -> Self:
        """Send a watch the 410 ERROR event, then end it."""
        return cls(kind=Kind.GONE)

    @classmethod
    def cut(cls) -> Self:
        """End a watch as the API server ends one whose time is up."""
        return cls(kind=Kind.CUT)

    @classmethod
    def hang(cls) -> Self:
        """Keep the connection open and pass nothing on, no bookmark either; what isn't a watch gets no answer."""
        return cls(kind=Kind.HANG)

    @property
    def label(self) -> str:
        """The name under which it is counted."""
        return f"{self.kind} {self.code}" if self.kind is Kind.STATUS else str(self.kind)

    @property
    def body(self) -> bytes:
        """The metav1.Status that the API server would send with it."""
        return json.dumps(_status_of(self.code, self.retry_after)).encode()


def gone_event() -> bytes:
    """The line that ends a watch whose resource version is too old."""
    return json.dumps({"type": "ERROR", "object": _status_of(410, None)}).encode() + b"\n"


def _status_of(code: int, retry_after: int | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f"injected: {_REASONS.get(code, 'Unknown')}",
        "reason": _REASONS.get(code, "Unknown"),
        "code": code,
    }
    return document if retry_after is None else {**document, "details": {"retryAfterSeconds": retry_after}}


@dataclass(eq=False)
class Rule:
    """A fault waiting for its call: where ``when`` holds, ``skip`` calls pass, then ``times`` are struck.

    Faults of watches never strike other calls, nor do those that need a whole answer strike watches.
    """

    fault: Fault
    when: When
    skip: int
    times: int
    struck: list[Call] = field(default_factory=list)

    @property
    def fired(self) -> bool:
        """Whether it has struck at all."""
        return bool(self.struck)

    def strikes(self, call: Call) -> bool:
        """Whether this call is its own; counts it."""
        if len(self.struck) >= self.times or not self._fits(call):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.struck.append(call)
        return True

    def _fits(self, call: Call) -> bool:
        others = _ANSWERED_ONLY if call.verb == "watch" else WATCHES_ONLY
        return self.fault.kind not in others and self.when(call)


def rule_at(fault: Fault, where: Address | When, *, skip: int, times: int) -> Rule:
    """A rule for an address of an earlier run, counted from now on, or for a predicate."""
    if isinstance(where, Address):
        return Rule(fault, where.alike, skip + where.index, times)
    return Rule(fault, where, skip, times)


class Gate:
    """Keeps calls waiting before the API server until ``release``; a client that leaves doesn't recall its write."""

    def __init__(self, when: When, ledger: Ledger, opened: Callable[[], None]) -> None:
        self.when = when
        self._ledger = ledger
        self._opened = opened
        self._held: list[Call] = []
        self.is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> list[Call]:
        """The calls that came to it, in order."""
        with self._ledger.news:
            return list(self._held)

    def admit(self, call: Call) -> None:
        """Enter a call that has come to it."""
        with self._ledger.news:
            self._held.append(call)
            self._ledger.news.notify_all()

    def release(self) -> None:
        """Let every call on, the later ones too."""
        self.is_open = True
        self._opened()

    def wait_for_held(self, count: int = 1, *, seconds: float = 30.0) -> list[Call]:
        """Wait until ``count`` calls have come to it; TimeoutError after ``seconds``."""
        with self._ledger.news:
            if not self._ledger.news.wait_for(lambda: len(self._held) >= count, seconds):
                raise TimeoutError(f"{len(self._held)} of {count} calls came to the gate within {seconds} s")
        return self.held


class Rules:
    """The rules in force; the first that strikes a call is the only one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> None:
        """Put ``rule`` behind the others."""
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        """Forget every rule."""
        with self._lock:
            self._rules.clear()

    def choose(self, call: Call) -> Fault | None:
        """The fault for ``call``, whose rule counts it as struck."""
        with self._lock:
            return next((rule.fault for rule in self._rules if rule.strikes(call)), None)
