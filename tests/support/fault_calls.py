"""What a call to the API server is, read from its HTTP request, and the list of those that went by."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

WRITES = frozenset({"create", "apply", "patch", "update", "delete", "deletecollection"})
_APPLY = "application/apply-patch"
_ONE = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_MANY = {**_ONE, "GET": "list", "DELETE": "deletecollection"}


@dataclass(slots=True, kw_only=True)
class Call:
    """One request, in Kubernetes' words; what isn't about a resource has its path as ``resource``."""

    number: int
    client: str
    method: str
    path: str
    query: Mapping[str, str]
    verb: str
    resource: str
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    user_agent: str = ""
    code: int | None = None
    """The answer's status as the client got it; None until then, and for ever where it got none."""
    fault: str = ""
    """The kind of the fault that struck it, or empty."""

    @property
    def writes(self) -> bool:
        return self.verb in WRITES


@dataclass(frozen=True, slots=True)
class Address:
    """A call of a run that repeats, whatever order its calls came in: the ``index``-th of its sort, from 0."""

    verb: str
    resource: str
    subresource: str
    index: int

    def __str__(self) -> str:
        return f"{self.verb} {'/'.join(filter(None, (self.resource, self.subresource)))} #{self.index}"

    def alike(self, call: Call) -> bool:
        """Whether ``call`` is of this sort, whatever its index."""
        return (call.verb, call.resource, call.subresource) == (self.verb, self.resource, self.subresource)


def each_call(calls: Iterable[Call]) -> list[Address]:
    """The addresses of ``calls``, watches and Leases left out: those have no place of their own in a run."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for call in calls:
        if call.verb == "watch" or call.resource == "leases":
            continue
        sort = (call.verb, call.resource, call.subresource)
        found.append(Address(*sort, seen[sort]))
        seen[sort] += 1
    return found


def read_call(number: int, client: str, method: str, target: str, headers: Mapping[str, str]) -> Call:
    """Read a request line and headers as the API server would."""
    parts = urlsplit(target)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    pieces = [unquote(piece) for piece in parts.path.split("/") if piece]
    # /api/v1/… has two words before the resource, /apis/group/version/… three.
    rest = pieces[{"api": 2, "apis": 3}.get(pieces[0], len(pieces)) :] if pieces else []
    namespace, resource, name, subresource = _place(rest) if rest else ("", parts.path, parts.path, "")
    return Call(
        number=number,
        client=client,
        method=method,
        path=parts.path,
        query=query,
        verb=_verb(method, query, headers.get("Content-Type", ""), named=bool(name)),
        resource=resource,
        subresource=subresource,
        namespace=namespace,
        name=name if rest else "",
        user_agent=headers.get("User-Agent", ""),
    )


def _place(rest: list[str]) -> tuple[str, str, str, str]:
    """Namespace, resource, name and subresource of a path behind its group and version."""
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        namespace = rest[1]
        # A namespace has two subresources of its own; any third word else is a resource inside it.
        if len(rest) > 2 and rest[2] not in ("status", "finalize"):
            rest = rest[2:]
    resource, name, subresource = [*rest, "", ""][:3]
    return namespace, resource, name, subresource


def _verb(method: str, query: Mapping[str, str], content_type: str, *, named: bool) -> str:
    if method == "GET" and query.get("watch") in ("true", "1"):
        return "watch"
    if method == "PATCH" and content_type.startswith(_APPLY):
        return "apply"
    return (_ONE if named else _MANY).get(method, method.lower())


@dataclass
class Ledger:
    """The calls that went by, the newest ``most`` of them; any thread may read it while another writes."""

    most: int
    news: threading.Condition = field(default_factory=threading.Condition)
    """Notified at every change of a call."""

    def __post_init__(self) -> None:
        self._calls: deque[Call] = deque(maxlen=self.most)
        self.next_number = 0

    def open(self, client: str, method: str, target: str, headers: Mapping[str, str]) -> Call:
        """Enter a call that has just arrived."""
        with self.news:
            call = read_call(self.next_number, client, method, target, headers)
            self.next_number += 1
            self._calls.append(call)
            self.news.notify_all()
        return call

    def close(self, call: Call, code: int) -> None:
        """Enter the status of its answer."""
        with self.news:
            call.code = code
            self.news.notify_all()

    def since(self, mark: int) -> list[Call]:
        """The calls from number ``mark`` on; RuntimeError where some of them have been dropped already."""
        with self.news:
            if self.next_number - mark > self.most:
                raise RuntimeError(f"{self.next_number - mark} calls since the mark, but only {self.most} are kept")
            return [call for call in self._calls if call.number >= mark]

    def wait_for(self, when: Callable[[Call], bool], *, since: int, seconds: float) -> Call:
        """The first call for which ``when`` holds, now or soon; TimeoutError after ``seconds``."""
        with self.news:
            hit = self.news.wait_for(lambda: next(filter(when, self.since(since)), None), seconds)
        if hit is None:
            last = [f"{call.verb} {call.resource} {call.code}" for call in self.since(since)[-5:]]
            raise TimeoutError(f"no such call within {seconds} s; the last ones: {last}")
        return hit
