"""Which provider the scenarios run on: E2E_PROVIDER says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from e2e.providers.existing import Existing
from e2e.providers.kind import Kind
from e2e.providers.local import Local
from e2e.providers.provider import Provider, Unavailable

DEFAULT = "kind"
PROVIDERS: Mapping[str, Callable[[], Provider]] = {"kind": Kind, "existing": Existing, "local": Local}


def chosen(environment: Mapping[str, str] = os.environ) -> str:
    """The name that E2E_PROVIDER gives; raises Unavailable for one that there isn't."""
    name = environment.get("E2E_PROVIDER") or DEFAULT
    if name not in PROVIDERS:
        raise Unavailable(f"E2E_PROVIDER must be one of {', '.join(PROVIDERS)}, not {name!r}")
    return name


def choose(environment: Mapping[str, str] = os.environ) -> Provider:
    """The provider, not entered yet."""
    return PROVIDERS[chosen(environment)]()
