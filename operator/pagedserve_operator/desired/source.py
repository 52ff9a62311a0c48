"""What ``spec.model.uri`` means in a pod: the engine's MODEL, and the claim that holds it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.errors import SpecError, UnsupportedModelURI

_FIELD: Final = "spec.model.uri"
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CLAIM: Final = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """``model`` as the engine reads it; ``claim`` is mounted at /models where it isn't None."""

    model: str
    claim: str | None = None


def model_source(uri: str) -> ModelSource:
    """Where the engine finds the model.

    Raises UnsupportedModelURI for a scheme that nothing reads, and SpecError for a path that leaves its claim.
    """
    scheme = _SCHEME.fullmatch(uri)
    if scheme is None or scheme[1] in ("hf", "random"):
        return ModelSource(uri)
    if scheme[1] != "pvc":
        raise UnsupportedModelURI(
            _FIELD,
            f"{scheme[1]}:// isn't supported: write hf://organisation/name, pvc://claim/path for a folder on a "
            "PersistentVolumeClaim, or random:///path/config.json",
        )
    claim = _CLAIM.fullmatch(scheme[2])
    if claim is None:
        raise SpecError(_FIELD, f"{uri!r} names no claim: write pvc://claim/path")
    steps = [step for step in (claim[3] or "").split("/") if step not in ("", ".")]
    if ".." in steps:
        raise SpecError(_FIELD, f"{uri!r} leaves the claim: write pvc://claim/path without '..'")
    return ModelSource("/".join(["/models", *steps]), claim[1])
