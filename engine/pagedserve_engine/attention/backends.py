"""Which attention backend serves a device: the named one, or the first of a measured order that is there.

A backend that is named and can't be had is an error; one that is merely preferred gives way, with a line in the log.
"""

from __future__ import annotations

from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.errors import ConfigError


def choose_backend(setting: str) -> AttentionBackend:
    """The backend that ATTENTION names; raises ConfigError for one that is not there."""
    if setting in ("auto", ReferenceBackend.name):
        return ReferenceBackend()
    raise ConfigError(f"ATTENTION is {setting!r}: give auto or reference", param="attention")
