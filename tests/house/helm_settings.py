"""The operator's settings as values of the chart: each from OperatorConfig, with what that refuses in the schema."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any, get_type_hints

from pagedserve_operator.config import ConfigError, OperatorConfig
from reference_operator import field_sentences

JSON = dict[str, Any]

SET_ELSEWHERE: dict[str, str] = {
    "operator_namespace": "the release's namespace",
    "watch_namespace": "the value watchNamespace, which roles depend on, too",
    "engine_image": "the value engineImage",
    "identity": "every pod needs its own",
    "kubeconfig": "the pod's service account",
}
"""Settings that aren't among ``settings``, and what they come from."""

_QUANTITY: JSON = {
    # Helm's --set takes 4 for a number.
    "type": ["string", "number"],
    "pattern": r"^([1-9]\d{0,5}(\.\d{1,3})?|0\.\d{0,2}[1-9]|[1-9]\d{0,8}m)$",
    "exclusiveMinimum": 0,
}

TEXTS: dict[str, JSON] = {
    "engine_min_compute_capability": {"type": "string", "pattern": r"^\d+\.\d+$"},
    "log_format": {"enum": ["text", "json"]},
    "log_level": {"enum": ["debug", "info", "warning", "error"]},
    "metrics_api": {"enum": ["auto", True, False, "true", "false"]},
    "prometheus_url": {"type": "string", "pattern": "^(https?://.+)?$"},
    "target_cache_use": _QUANTITY,
    "target_queue_wait_seconds": _QUANTITY,
    "target_running_requests": _QUANTITY,
    "target_waiting_requests": _QUANTITY,
}
"""Schemas of texts that the operator doesn't take just as they come; a test asks it."""

# Helm's --set takes 0.5 for a text.
_NUMBER = r"^\d+(\.\d+)?$"
# Go's patterns know no look-ahead.
_NUMBER_ABOVE_ZERO = r"^(0*[1-9]\d*(\.\d+)?|0+\.0*[1-9]\d*)$"
_HIGHEST_PORT = 65535
_WIDTH = 118


def names() -> dict[str, str]:
    """The value's name of each setting that is among ``settings``: maxItems for max_items."""
    listed = [field.name for field in dataclasses.fields(OperatorConfig) if field.name not in SET_ELSEWHERE]
    return {name: _camel(name) for name in listed}


def values_text(given: dict[str, str]) -> str:
    """The part ``settings`` of values.yaml, in which ``given`` (by variable, as YAML) are set and others are shown."""
    meanings = field_sentences()
    lines = [
        "# Settings of the operator: each is a variable of its container, resyncSeconds being RESYNC_SECONDS. Those in",
        "# comments show the operator's own default. Made by `make chart` from OperatorConfig.",
        "settings:",
    ]
    for name, value in names().items():
        meaning = meanings[name].replace("``", "`")
        lines += textwrap.wrap(meaning, _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        set_here = given.get(name.upper())
        default = _yaml(getattr(OperatorConfig(), name))
        lines.append(f"  # {value}: {default}" if set_here is None else f"  {value}: {set_here}")
    return "\n".join(lines) + "\n"


def settings_schema() -> JSON:
    """The schema of ``settings``: whatever the operator would refuse on its own is refused here by name."""
    types = get_type_hints(OperatorConfig)
    properties = {value: _schema(name, types[name]) for name, value in names().items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def variables() -> list[str]:
    """All variables that the operator reads: none of them may be given a second time under ``env``."""
    return [field.name.upper() for field in dataclasses.fields(OperatorConfig)]


def _schema(name: str, kind: Any) -> JSON:
    if kind is bool:
        return {"type": "boolean"}
    if kind is str:
        return TEXTS.get(name, {"type": "string"})
    if name.endswith("_port"):
        # The operator's 0 takes a free one, which no probe would find.
        return {"type": "integer", "minimum": 1, "maximum": _HIGHEST_PORT}
    low = {"exclusiveMinimum": 0} if refuses(name, kind(0)) else {"minimum": 0} if refuses(name, kind(-1)) else {}
    if kind is int:
        return {"type": "integer", **low}
    pattern = _NUMBER_ABOVE_ZERO if "exclusiveMinimum" in low else _NUMBER
    return {"type": ["number", "string"], "pattern": pattern, **low}


def refuses(name: str, value: object) -> bool:
    """Whether the operator itself refuses the value, all else being as it is by default."""
    try:
        OperatorConfig(**{name: value})  # type: ignore[arg-type]
    except ConfigError:
        return True
    return False


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def _yaml(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
