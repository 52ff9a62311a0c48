"""A server process around a fake engine: its arguments are the engine's as JSON, then flags of the real one."""

from __future__ import annotations

import asyncio
import json
import sys

from prometheus_client import CollectorRegistry

from fake_engine import FakeEngine
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import EngineDeadError, ModelLoadError
from pagedserve_engine.logs import configure_logging
from pagedserve_engine.server.app import serve


class DyingEngine(FakeEngine):
    """Dies as soon as a request has come."""

    async def start(self) -> None:
        await super().start()
        self._dying = asyncio.create_task(self._die())

    async def _die(self) -> None:
        await self.submitted.wait()
        death = EngineDeadError("the device failed")
        self.fail_after, self.alive = (0, death), False
        self.released.set()
        assert self.died is not None
        self.died.set_result(death)


def main() -> None:
    """Serve; errors that end the process become its status."""
    options = json.loads(sys.argv[1])
    kind = DyingEngine if options.pop("dies", False) else FakeEngine
    if "load_error" in options:
        options["load_error"] = ModelLoadError(options["load_error"])
    config = EngineConfig.read([*sys.argv[2:], "--host", "127.0.0.1", "--port", "0"], {})
    configure_logging("json", "info")
    try:
        serve(config, kind(config, **options), CollectorRegistry())  # type: ignore[arg-type]
    except ModelLoadError as error:
        sys.exit(f"load: {error}")
    except EngineDeadError as error:
        sys.exit(f"dead: {error}")


if __name__ == "__main__":
    main()
