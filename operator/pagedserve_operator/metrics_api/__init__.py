"""The custom metrics API, served by every replica from the engines' own numbers: what an autoscaler scales on.

Nothing else need be installed: autoscalers ask the API server, which asks us (api.py registers and keeps certificates,
application.py answers), and we ask the engines (reader.py lists the live ones, scraping.py reads them).
"""

from __future__ import annotations

from pagedserve_operator.metrics_api.api import MetricsApi

__all__ = ["MetricsApi"]
