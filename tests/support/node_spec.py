"""What a container's spec asks of a node: command, environment, mounts and probes, as plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]
Images = Mapping[str, Sequence[str] | None]
"""What stands for each image's entrypoint; None for an image that can't be pulled."""
Lookup = Callable[[str, str], Mapping[str, bytes] | None]
"""The data of a Secret or ConfigMap by kind and name; None where there is none."""
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class NotYet(Exception):
    """The container can't be made now; ``reason`` is the one that a kubelet would give."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """An HTTP (or TCP) question; times in seconds."""

    path: str | None
    port: int
    initial_delay: float
    period: float
    timeout: float
    failures: int
    successes: int


def probe_of(container: JSON, name: str, *, hurry: float = 1.0) -> Probe | None:
    """The probe of that name (``startupProbe``…) with the API's defaults; its delay and period divided by ``hurry``."""
    spec = container.get(name)
    if spec is None:
        return None
    action = spec.get("httpGet") or spec["tcpSocket"]
    port = action["port"]
    if isinstance(port, str):
        port = next(each["containerPort"] for each in container["ports"] if each.get("name") == port)
    return Probe(
        path=action.get("path", "/") if "httpGet" in spec else None,
        port=port,
        initial_delay=spec.get("initialDelaySeconds", 0) / hurry,
        period=spec.get("periodSeconds", 10) / hurry,
        timeout=spec.get("timeoutSeconds", 1),
        failures=spec.get("failureThreshold", 3),
        successes=spec.get("successThreshold", 1),
    )


def expand(text: str, environment: Mapping[str, str]) -> str:
    """``$(NAME)`` by its value, left as it is where there is none; ``$$`` is a dollar."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] is None else environment.get(match[1], match[0])

    return _REFERENCE.sub(value, text)


def relocate(text: str, mounts: Mapping[str, str]) -> str:
    """``text`` with every mount path in it, whole or as a folder of a longer path, by where it lies on this machine."""
    if not mounts:
        return text
    longest_first = sorted(map(re.escape, mounts), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(longest_first)})(?![\w.-])")
    return pattern.sub(lambda match: mounts[match[1]], text)


def environment_of(container: JSON, pod: JSON, look_up: Lookup) -> dict[str, str]:
    """The variables of a container, in order, each expanded by those before; NotYet where a key is missing."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        kind, key = ("Secret", "secretRef") if "secretRef" in source else ("ConfigMap", "configMapRef")
        reference = source[key]
        for name, content in _data(kind, reference, look_up).items():
            found[source.get("prefix", "") + name] = content.decode()
    for variable in container.get("env", ()):
        value = _value(variable, pod, look_up)
        if value is not None:
            found[variable["name"]] = expand(value, found) if "value" in variable else value
    return found


def command_of(container: JSON, images: Images, environment: Mapping[str, str]) -> list[str]:
    """What to run: the image's stand-in where there is one, else the container's own command, then its arguments."""
    image = container["image"]
    entrypoint = images.get(image, container.get("command"))
    if entrypoint is None:
        raise NotYet("ImagePullBackOff", f'Back-off pulling image "{image}"')
    return [*entrypoint, *(expand(argument, environment) for argument in container.get("args", ()))]


def _value(variable: JSON, pod: JSON, look_up: Lookup) -> str | None:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable.get("value", ""))
    if "fieldRef" in source:
        return field_of(source["fieldRef"]["fieldPath"], pod)
    kind, key = ("Secret", "secretKeyRef") if "secretKeyRef" in source else ("ConfigMap", "configMapKeyRef")
    reference = source[key]
    data = _data(kind, reference, look_up)
    if reference["key"] in data:
        return data[reference["key"]].decode()
    if reference.get("optional"):
        return None
    raise NotYet("CreateContainerConfigError", f"couldn't find key {reference['key']} in {kind} {reference['name']}")


def _data(kind: str, reference: JSON, look_up: Lookup) -> Mapping[str, bytes]:
    data = look_up(kind, reference["name"])
    if data is None and not reference.get("optional"):
        raise NotYet("CreateContainerConfigError", f'{kind.lower()} "{reference["name"]}" not found')
    return data or {}


def field_of(path: str, pod: JSON) -> str:
    """The field of a pod that ``path`` names, as the downward API gives it."""
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str(pod["metadata"].get(keyed[1], {}).get(keyed[2], ""))
    value: Any = pod
    for step in path.split("."):
        value = value.get(step, {})
    return str(value or "")
