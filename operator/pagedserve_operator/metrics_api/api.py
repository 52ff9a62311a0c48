"""The custom metrics API of one replica: it keeps itself served and registered, and says why where it isn't."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import ApiError, NotLeading, Rejected
from pagedserve_operator.metrics_api.application import Parts, application
from pagedserve_operator.metrics_api.authentication import (
    CONFIG_MAP,
    NAMESPACE,
    FrontProxy,
    NoFrontProxy,
    read_front_proxy,
)
from pagedserve_operator.metrics_api.authorization import Authorizer, Reviews
from pagedserve_operator.metrics_api.documents import GROUP
from pagedserve_operator.metrics_api.listener import CannotListen, Identity, Listener
from pagedserve_operator.metrics_api.publishing import Objects, Publisher
from pagedserve_operator.metrics_api.rates import Rates
from pagedserve_operator.metrics_api.reader import Pods, Reader
from pagedserve_operator.metrics_api.scraping import Scraper

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 10.0
"""Between two looks at what is published: a renewal reaches every replica within this time."""
STARTING_SECONDS: Final = 1.0
"""The same until there is something to serve with."""

BORNE: Final = timedelta(seconds=60)
"""How long an API server that fails is no trouble: it restarts, or is overloaded for a moment."""

State = Literal["off", "starting", "serving", "foreign", "troubled"]
"""As metrics.METRICS_API_STATES lists them."""


class Server(Objects, Pods, Reviews, Protocol):
    """What is asked of the API server."""


class Leading(Protocol):
    """Whether this replica writes."""

    @property
    def leading(self) -> bool:
        """Whether a write may begin now."""


class Counters(Protocol):
    """Where requests and reads are counted."""

    def metrics_api_answered(self, code: int) -> None:
        """A request was answered with this status code."""

    def engine_read(self, result: str) -> None:
        """An engine was read, or could not be: read, failed."""


class MetricsApi:
    """``run`` until cancelled; ``state`` and ``trouble`` say how it stands, in words that stay while it stays so.

    ``on_change`` is called when the trouble is another, or over.
    """

    def __init__(
        self,
        server: Server,
        leader: Leading,
        config: OperatorConfig,
        *,
        counters: Counters,
        now: Callable[[], datetime],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._leader = leader
        self._config = config
        self._publisher = Publisher(server, namespace=config.operator_namespace, now=now)
        self._authorizer = Authorizer(server)
        self._reader = Reader(server, Scraper(count=counters.engine_read))
        parts = Parts(
            trusts=self,
            rates=Rates(config.metrics_api_requests_per_second),
            authorizer=self._authorizer,
            reader=self._reader,
            count=counters.metrics_api_answered,
        )
        self._listener = Listener(application(parts), host=config.metrics_api_host, port=config.metrics_api_port)
        self._front_proxy: FrontProxy | None = None
        self._now = now
        self._on_change = on_change
        self._withdrew = False
        self._failing_since: datetime | None = None
        self.state: State = "starting" if config.serves_metrics_api else "off"
        self.trouble = _why_off(config)

    @property
    def front_proxy(self) -> FrontProxy | None:
        """Whose word is taken for who asks; None: not known yet."""
        return self._front_proxy

    @property
    def port(self) -> int:
        """Where it is served; 0 while it isn't."""
        return self._listener.port

    @property
    def identity(self) -> Identity | None:
        """As what it is served; None while it isn't."""
        return self._listener.identity

    async def run(self) -> None:
        """Look again and again; cancelled, it stops serving."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(STARTING_SECONDS if self.state == "starting" else LOOK_SECONDS)
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop serving; requests under way have a few seconds."""
        await self._listener.close()
        await self._reader.close()
        await self._authorizer.close()

    async def look(self) -> None:
        """Serve, renew and register as is due, or see that nothing of ours is registered."""
        try:
            if self._config.serves_metrics_api:
                await self._serve()
            else:
                await self._stay_off()
        except NotLeading:
            # Whoever leads now goes on.
            return
        except NoFrontProxy as error:
            self._say("troubled", str(error))
        except Rejected as error:
            self._say("troubled", f"the API server refuses what the operator needs for it: {error}")
        except ApiError as error:
            self._bear(error)
            return
        except CannotListen as error:
            port = self._config.metrics_api_port
            self._say("troubled", f"it can't be served on METRICS_API_PORT {port}: {error.strerror or error}")
        except ssl.SSLError as error:
            place = f"ConfigMap {NAMESPACE}/{CONFIG_MAP}"
            self._say("troubled", f"the API server's authority in {place} can't be used: {error.reason or error}")
        except OSError as error:
            self._say("troubled", f"it can't be served: {error.strerror or error}")
        except Exception:
            # A bug of ours here must not end the reconciling of resources.
            logger.exception("looking after the metrics API failed")
            self._say("troubled", "the operator's log says why")
        self._failing_since = None

    async def _stay_off(self) -> None:
        """Once in each term as leader; an operator of one namespace has no say in it."""
        if self._config.watch_namespace or not self._leader.leading:
            self._withdrew = False
        elif not self._withdrew:
            # Installed without the rights to register, there is nothing of ours.
            with suppress(Rejected):
                await self._publisher.withdraw()
            self._withdrew = True
        self._say("off", _why_off(self._config))

    async def _serve(self) -> None:
        front_proxy = read_front_proxy(await self._server.get("ConfigMap", NAMESPACE, CONFIG_MAP))
        published = await self._publisher.look(leading=self._leader.leading)
        if published.certificates is not None:
            await self._listener.use(Identity(published.certificates.serving, front_proxy.authority))
            # Only now: a caller is judged by the authority that its connection was verified with.
            self._front_proxy = front_proxy
        if published.foreign:
            cure = "give it the rules of manifests/prometheus-adapter, or set spec.autoscaling.backend to KEDA"
            self._say("foreign", f"{GROUP} is served by {published.foreign}: {cure}")
        elif self._listener.identity is None:
            self._say("starting", "the operator that leads has published no certificates yet")
        else:
            self._say("troubled" if published.trouble else "serving", published.trouble)

    def _bear(self, error: ApiError) -> None:
        """It may pass by itself, and its words change from try to try."""
        if self._failing_since is None:
            self._failing_since = self._now()
            logger.info("the metrics API is looked at again later: %s", error)
        if self._now() - self._failing_since >= BORNE:
            answer = f"answers with status {error.status}" if error.status else "doesn't answer"
            self._say("troubled", f"the API server {answer} when it is asked for what the operator needs for it")

    def _say(self, state: State, trouble: str) -> None:
        if (state, trouble) != (self.state, self.trouble):
            level = logging.WARNING if state in ("foreign", "troubled") else logging.INFO
            logger.log(level, "metrics API: %s", f"{state}: {trouble}" if trouble else state)
        other = trouble != self.trouble
        self.state, self.trouble = state, trouble
        if other:
            self._on_change()


def _why_off(config: OperatorConfig) -> str:
    if config.serves_metrics_api:
        return ""
    if config.watch_namespace:
        return f"an operator of one namespace doesn't serve {GROUP}: install an adapter, or scale by cpu and memory"
    return f"the operator doesn't serve {GROUP} (METRICS_API is false): let it, or install an adapter"
