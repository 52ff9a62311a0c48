"""What is going on with a resource, told truthfully: from the world as it was read to conditions and events."""

from __future__ import annotations

from pagedserve_operator.status.compute import Observation, Outcome, compute, differs
from pagedserve_operator.status.events import EventNote
from pagedserve_operator.status.scaling import Means

__all__ = ["EventNote", "Means", "Observation", "Outcome", "compute", "differs"]
