"""docs/fields.md: every field of the resource, from the CRD's schema, with its bounds and rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tables import code, table

CRD = Path(__file__).parents[2] / "crds" / "inferenceservices.yaml"

JSON = Mapping[str, Any]

_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
_HEAD = ("field", "allowed", "default", "meaning")


def version() -> JSON:
    """The one version of the CRD."""
    (only,) = yaml.safe_load(CRD.read_text(encoding="utf-8"))["spec"]["versions"]
    found: JSON = only
    return found


def schema() -> JSON:
    """Of a whole resource."""
    found: JSON = version()["schema"]["openAPIV3Schema"]
    return found


def fields_below(node: JSON, path: str = "") -> Iterator[tuple[str, JSON]]:
    """Every field below a node with its path: ``gpu.type``, ``env[].name``, ``gpu.nodeSelector{}`` for any key."""
    for name, below in node.get("properties", {}).items():
        place = f"{path}.{name}" if path else name
        yield place, below
        yield from fields_below(below, place)
    if "items" in node:
        yield from fields_below(node["items"], f"{path}[]")
    if "properties" in (values := node.get("additionalProperties") or {}):
        yield from fields_below(values, f"{path}{{}}")


def spec_sections() -> str:
    """A section for each field of ``spec``."""
    spec = schema()["properties"]["spec"]
    sections = [_section("spec", spec, deep=False)]
    sections += [_section(f"spec.{name}", below) for name, below in spec["properties"].items() if _has_fields(below)]
    return "\n\n".join(sections)


def status_section() -> str:
    """One table of ``status``."""
    status = schema()["properties"]["status"]
    rows = [(code(path), _allowed(node), node["description"]) for path, node in fields_below(status)]
    return table(("field", "kind", "meaning"), rows)


def name_rules() -> str:
    """What names are allowed, in the schema's words."""
    return _rules([("", schema())])


def columns() -> str:
    """What ``kubectl get`` shows."""
    rows = [
        (column["name"], code(column["jsonPath"]), "`-o wide`" if column.get("priority") else "always")
        for column in version()["additionalPrinterColumns"]
    ]
    return table(("column", "field", "shown"), rows)


def _section(title: str, node: JSON, *, deep: bool = True) -> str:
    found = list(fields_below(node)) if deep else list(node["properties"].items())
    rows = [(code(path), _allowed(below), _default(below), below["description"]) for path, below in found]
    head = f"### {title}\n\n{_lines(node)}"
    rules = _rules([("", node), *(found if deep else ())])
    return "\n\n".join(part for part in (head, table(_HEAD, rows), rules) if part)


def _lines(node: JSON) -> str:
    required = node.get("required", ())
    return node["description"] + (f" Required: {', '.join(map(code, required))}." if required else "")


def _has_fields(node: JSON) -> bool:
    return any(True for _ in fields_below(node))


def _rules(nodes: list[tuple[str, JSON]]) -> str:
    said = dict.fromkeys(
        rule["message"] for _, node in nodes for holder in _with_values(node) for rule in _validations(holder)
    )
    return (
        "\n".join(["What is refused, in the words of the answer:\n", *(f"* {text}" for text in said)]) if said else ""
    )


def _with_values(node: JSON) -> Iterator[JSON]:
    yield node
    if "items" in node:
        yield node["items"]


def _validations(node: JSON) -> list[JSON]:
    found: list[JSON] = node.get("x-kubernetes-validations", [])
    return found


def _allowed(node: JSON) -> str:
    if "enum" in node:
        return ", ".join(code(choice or '""') for choice in node["enum"])
    if node.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind = node.get("type")
    if kind == "array":
        return f"list of {_plural(node['items'])}" + (f", at most {node['maxItems']}" if "maxItems" in node else "")
    if kind == "object":
        return "object" if "properties" in node or "additionalProperties" not in node else "text by key"
    return _KINDS[str(kind)] + _bounds(node)


def _plural(items: JSON) -> str:
    if "enum" in items:
        return ", ".join(map(code, items["enum"]))
    return {"string": "texts", "object": "objects"}[items["type"]]


def _bounds(node: JSON) -> str:
    if "minimum" in node and "maximum" in node:
        return f", {node['minimum']} to {node['maximum']}"
    return f" of at most {node['maxLength']} characters" if "maxLength" in node else ""


def _default(node: JSON) -> str:
    return code(node["default"]) if "default" in node else ""
