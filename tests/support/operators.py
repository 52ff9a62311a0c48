"""Operators to test: one in a thread of the test, which can die between two calls, and one as a real process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from control_processes import free_port
from pagedserve_operator.assembly import Operator
from pagedserve_operator.cluster import load_configuration
from pagedserve_operator.config import OperatorConfig

STARTING_SECONDS = 60.0
ENDING_SECONDS = 30.0

QUICK = OperatorConfig(
    operator_namespace="default",
    identity="the-same",
    lease_seconds=3.0,
    renew_deadline_seconds=2.0,
    renew_seconds=0.5,
    metrics_host="127.0.0.1",
    metrics_port=0,
    fetch_model_config=False,
    # A cluster has one metrics API: those that test it ask for it.
    metrics_api="false",
)
"""Settings for tests: an operator that starts again under the same name leads at once."""


class OperatorThread:
    """An operator on an event loop of its own; ``die`` abandons it between two steps, as SIGKILL would."""

    def __init__(self, kubeconfig: Path, config: OperatorConfig = QUICK) -> None:
        self.config = replace(config, kubeconfig=str(kubeconfig))
        self.operator: Operator | None = None
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._started: Future[Operator] = Future()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)
        self._dead = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self.operator = self._started.result(STARTING_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self.failure is not None and error is None:
            raise self.failure

    @property
    def alive(self) -> bool:
        """Whether it has not ended, in whichever way."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End in good order; does nothing where it is over already."""
        if self._thread.is_alive() and not self._dead.is_set() and self.operator is not None:
            self._loop.call_soon_threadsafe(self.operator.stop)
        self._thread.join(ENDING_SECONDS)
        assert not self._thread.is_alive(), "the operator did not end"

    def die(self) -> None:
        """End at once, between two steps of the loop, leaving the server as it is; any thread may call it."""
        self._dead.set()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def join(self) -> None:
        """Wait until it is dead."""
        self._thread.join(ENDING_SECONDS)
        assert not self._thread.is_alive(), "the operator did not die"
        # It has closed nothing, as befits the dead; that is no test's mistake.
        self.operator = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    def call(self, work: Any) -> Any:
        """Run the coroutine on the operator's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(STARTING_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        main = self._loop.create_task(self._main())
        try:
            self._loop.run_until_complete(main)
        except RuntimeError as error:
            if not self._dead.is_set():
                self.failure = error
        except Exception as error:
            self.failure = error
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            self._bury()

    async def _main(self) -> None:
        configuration = await load_configuration(self.config.kubeconfig)
        # Where a test holds calls, each keeps a connection.
        configuration.connection_pool_maxsize = max(configuration.connection_pool_maxsize, 2 * self.config.workers)
        operator = Operator(self.config, configuration)
        self._started.set_result(operator)
        await operator.run()

    def _bury(self) -> None:
        # Sockets are cut first, so that nothing that a cancelled task does in its last moments reaches the server.
        if self._dead.is_set():
            self._cut_connections()
        # One whose call fails as its cancellation comes takes the failure for the call's end, and goes on.
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(_settled(tasks))
        # A connection that was closed in good order still says goodbye when the loop ends.
        self._cut_connections()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _cut_connections(self) -> None:
        for transport in list(getattr(self._loop, "_transports", {}).values()):
            transport.abort()


async def _settled(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait a little for the tasks, and take note of what they ended with."""
    # Kopf, on its way out, cancels every task that it finds: this one, too.
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait(tasks, timeout=0.5)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()


class RestartedOperator:
    """An operator in a thread that is started again whenever it ends by itself, as its container would be."""

    def __init__(self, kubeconfig: Path, config: OperatorConfig = QUICK) -> None:
        self._new = lambda: OperatorThread(kubeconfig, config)
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self.thread = self._new()

    def __enter__(self) -> Self:
        self.thread.__enter__()
        self._supervisor.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._supervisor.join(STARTING_SECONDS)
        self.thread.stop()

    def start_again(self) -> None:
        """End it in good order; the next one has started on return."""
        ended = self.thread
        ended.stop()
        deadline = time.monotonic() + STARTING_SECONDS
        while self.thread is ended or self.thread.operator is None:
            assert time.monotonic() < deadline, "the operator was not started again"
            time.sleep(0.05)

    def _supervise(self) -> None:
        while not self._over.wait(0.2):
            if not self.thread.alive:
                self.thread = self._new()
                self.thread.__enter__()


class OperatorProcess:
    """``pagedserve-operator run`` as a process; settings are variables."""

    def __init__(self, kubeconfig: Path, folder: Path, **settings: str) -> None:
        self._settings = {
            "OPERATOR_NAMESPACE": "default",
            "LEASE_SECONDS": "3",
            "RENEW_DEADLINE_SECONDS": "2",
            "RENEW_SECONDS": "0.5",
            "METRICS_HOST": "127.0.0.1",
            "METRICS_PORT": str(free_port()),
            "FETCH_MODEL_CONFIG": "false",
            "METRICS_API": "false",
            "LOG_FORMAT": "json",
            **settings,
            "KUBECONFIG": str(kubeconfig),
        }
        self.log = folder / f"operator-{time.monotonic_ns()}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        self.await_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.running:
            self.kill()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._settings['METRICS_PORT']}"

    def start(self) -> None:
        """Start, also again after an end."""
        command = [sys.executable, "-m", "pagedserve_operator", "run"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **self._settings}, stderr=log, stdout=log)

    def await_ready(self) -> None:
        """Until /readyz answers 200."""
        deadline = time.monotonic() + STARTING_SECONDS
        while self.get("/readyz")[0] != 200:
            assert self.running, f"the operator ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"the operator isn't ready: {self.log.read_text()}"
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Samples by (name, sorted labels)."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        self.signal(signal.SIGTERM)
        assert self._process is not None
        return self._process.wait(ENDING_SECONDS)

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(ENDING_SECONDS)
