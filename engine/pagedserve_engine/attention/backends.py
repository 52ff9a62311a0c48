"""Which attention backend serves a device: the named one, or the first of a measured order that is there.

A backend that is named and can't be had is an error; one that is merely preferred gives way, with a line in the log.
"""

from __future__ import annotations

from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.errors import ConfigError


def choose_backend(setting: str, device: str = "cpu") -> AttentionBackend:
    """The backend that ATTENTION names, on ``device``; raises ConfigError for one that is not there."""
    if setting == "triton" or (setting == "auto" and device.startswith("cuda")):
        return _triton(device)
    if setting in ("auto", ReferenceBackend.name):
        return ReferenceBackend()
    raise ConfigError(f"ATTENTION is {setting!r}: give auto, reference or triton", param="attention")


def _triton(device: str) -> AttentionBackend:
    if not device.startswith("cuda"):
        raise ConfigError("ATTENTION is 'triton', whose kernels need CUDA: give auto or reference", param="attention")
    # Builds of torch without CUDA come without Triton.
    from pagedserve_engine.attention.triton import TritonBackend

    return TritonBackend(device)
