"""Which attention backend serves a device: the named one, or the first of a measured order that is there.

A backend that is named and can't be had is an error; one that is merely preferred gives way, with a line in the log.
"""

from __future__ import annotations

import logging

import torch

from pagedserve_engine.attention import probe
from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.attention.native import NativeBackend
from pagedserve_engine.attention.reference import ReferenceBackend
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.native.library import MissingLibraryError, load_library

logger = logging.getLogger(__name__)


def choose_backend(setting: str, device: str = "cpu") -> AttentionBackend:
    """The backend that ATTENTION names, on ``device``; raises ConfigError for one that is not there."""
    if setting == "triton" or (setting == "auto" and device.startswith("cuda")):
        return _triton(device, preferred=setting == "auto")
    if setting == "native" or (setting == "auto" and device == "cpu"):
        return _native(device, preferred=setting == "auto")
    if setting in ("auto", ReferenceBackend.name):
        return ReferenceBackend()
    raise ConfigError(f"ATTENTION is {setting!r}: give auto, reference, triton or native", param="attention")


def _native(device: str, *, preferred: bool) -> AttentionBackend:
    if device != "cpu":
        raise ConfigError("ATTENTION is 'native', whose kernels need a CPU: give auto or reference", param="attention")
    try:
        return NativeBackend(load_library())
    except MissingLibraryError as error:
        if not preferred:
            raise ConfigError(f"ATTENTION is 'native', and {error}", param="attention") from error
        logger.warning("attention runs in torch, 2 to 8 times slower while decoding: %s", error)
        return ReferenceBackend()


def _triton(device: str, *, preferred: bool) -> AttentionBackend:
    if not device.startswith("cuda"):
        raise ConfigError("ATTENTION is 'triton', whose kernels need CUDA: give auto or reference", param="attention")
    capability = torch.cuda.get_device_capability(device)
    candidates = probe.probe(capability)
    chosen = probe.preferred(capability, candidates) if preferred else "triton"
    if chosen == "triton" and candidates[0].obstacle is None:
        # Builds of torch without CUDA come without Triton.
        from pagedserve_engine.attention.triton import TritonBackend

        logger.info(probe.report(capability, candidates, chosen))
        return TritonBackend(device)
    if not preferred:
        raise ConfigError(f"ATTENTION is {candidates[0]}: give auto or reference", param="attention")
    logger.warning(probe.report(capability, candidates, ReferenceBackend.name))
    return ReferenceBackend()
