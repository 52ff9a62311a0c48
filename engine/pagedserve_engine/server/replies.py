"""What the two kinds of completion have in common around their choices."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from pagedserve_engine.server.common import Generation
from pagedserve_engine.server.keys import ENGINE, FINGERPRINT, RECORD


def head(request: web.Request, response_id: str, kind: str) -> dict[str, Any]:
    """The fields before ``choices``."""
    return {
        "id": response_id,
        "object": kind,
        "created": int(time.time()),
        "model": request.app[ENGINE].name,
        "system_fingerprint": request.app[FINGERPRINT],
    }


def trace_request(request: web.Request, operation: str, generation: Generation, response_id: str) -> None:
    """Add what was asked to the request's span."""
    params = generation.params
    RECORD.get().span.set(
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pagedserve",
            "gen_ai.request.model": request.app[ENGINE].name,
            "gen_ai.response.model": request.app[ENGINE].name,
            "gen_ai.response.id": response_id,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.seed": None if params.seed is None else str(params.seed),
            "gen_ai.request.choice.count": generation.n if generation.n > 1 else None,
        }
    )
