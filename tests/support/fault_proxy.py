"""A proxy before the API server that records every call, and breaks the ones that a test names.

It speaks plain HTTP on loopback, as ``kubectl proxy`` does, with a port for each client, so that two operators
with one identity are told apart. It runs in a thread of its own: clients may live in this process or in others.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from fault_calls import Address, Call, Ledger
from fault_rules import OPEN_WATCHES, Fault, Gate, Rule, When, rule_at
from fault_server import FaultServer

T = TypeVar("T")
CONTROL_SECONDS = 30.0
"""Bound of everything that the proxy's own thread is asked for."""


class FaultProxy:
    """Forwards to the API server at ``upstream``, verified by ``ca``; entered, it listens, and left, it is gone.

    A call without a token gets ``token`` (kubectl sends none over plain HTTP). Leaving raises a callback's error.
    """

    def __init__(
        self, upstream: str, *, ca: Path | None = None, token: str | None = None, most_calls: int = 100_000
    ) -> None:
        tls = ssl.create_default_context(cafile=str(ca)) if ca else None
        self._ledger = Ledger(most_calls)
        self._server = FaultServer(upstream, tls=tls, token=token, ledger=self._ledger)

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="fault-proxy-")
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.result(CONTROL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.loop.call_soon_threadsafe(self._server.over.set)
        self._thread.join(CONTROL_SECONDS)
        self._folder.cleanup()
        if self._server.errors:
            raise self._server.errors[0]

    def url(self, client: str = "client") -> str:
        """The address for the client of that name; opened when first asked for."""
        return f"http://127.0.0.1:{self._ask(self._server.port_of(client))}"

    def kubeconfig(self, token: str | None = None, *, client: str = "client") -> Path:
        """A kubeconfig for the client of that name, which goes when the proxy goes."""
        name = {"name": "proxy"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{**name, "cluster": {"server": self.url(client)}}],
            "users": [{**name, "user": {"token": token} if token else {}}],
            "contexts": [{**name, "context": {"cluster": "proxy", "user": "proxy"}}],
            "current-context": "proxy",
        }
        path = Path(self._folder.name) / f"{client}.kubeconfig"
        path.write_text(json.dumps(document))
        return path

    @property
    def calls(self) -> list[Call]:
        """Every call that is kept, in the order of arrival."""
        return self._ledger.since(max(0, self.mark() - self._ledger.most))

    def mark(self) -> int:
        """The number of the next call."""
        return self._ledger.next_number

    def since(self, mark: int, when: When = lambda _: True) -> list[Call]:
        """The calls from ``mark`` on for which ``when`` holds."""
        return [call for call in self._ledger.since(mark) if when(call)]

    def wait_for(self, when: When, *, since: int = 0, seconds: float = 30.0) -> Call:
        """The first call for which ``when`` holds, asked again once it is answered; TimeoutError after ``seconds``."""
        return self._ledger.wait_for(when, since=since, seconds=seconds)

    def inject(self, fault: Fault, where: Address | When, *, skip: int = 0, times: int = 1) -> Rule:
        """Strike ``times`` calls at ``where``, counted from now on, after ``skip`` of them."""
        rule = rule_at(fault, where, skip=skip, times=times)
        self._server.rules.add(rule)
        return rule

    def heal(self) -> None:
        """Forget every rule and open every gate; what is struck stays struck."""
        self._server.rules.clear()
        for gate, _ in self._server.gates:
            gate.release()

    def hold(self, when: When) -> Gate:
        """Keep back every call for which ``when`` holds until the gate is released."""
        opened = asyncio.Event()
        gate = Gate(when, self._ledger, lambda: self._in_loop(opened.set))
        self._in_loop(lambda: self._server.gates.append((gate, opened)))
        return gate

    @property
    def watches(self) -> list[Call]:
        """The watches that are open and pass events on."""
        return self._in_loop(self._server.watches)

    def disturb(self, fault: Fault, when: When = lambda _: True) -> int:
        """Strike the open watches for which ``when`` holds (gone, cut, hang, reset); how many there were."""
        if fault.kind not in OPEN_WATCHES:
            raise ValueError(f"a watch that is open can't meet {fault.label!r}; use gone, cut, hang or reset")
        return self._in_loop(lambda: self._server.disturb(fault, when))

    @property
    def counts(self) -> Counter[str]:
        """The injected faults by kind, so far."""
        return self._server.counts.copy()

    def table(self) -> str:
        """The injected faults by kind, a line each and their sum."""
        rows = [*sorted(self.counts.items()), ("all", self.counts.total())]
        return "\n".join(f"{kind:<24}{count:>8}" for kind, count in rows)

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._server.serve(started))
        except Exception as error:
            self._server.errors.append(error)
            if not started.done():
                started.set_exception(error)

    def _in_loop(self, act: Callable[[], T]) -> T:
        async def acted() -> T:
            return act()

        return self._ask(acted())

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._server.loop).result(CONTROL_SECONDS)
