"""What documents may name: fields, metrics, variables, reasons, make's targets, kinds. All read from the code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Final

from documents import ROOT
from pagedserve_engine.config import EngineConfig
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.kinds import KINDS
from reasons import CONDITIONS, EVENTS, GROUPS
from reference_engine import engine_registry, full_name
from reference_fields import fields_below, schema
from reference_operator import operator_registry

MAKEFILE: Final = (ROOT / "Makefile").read_text(encoding="utf-8")
LIBRARIES: Final = frozenset(
    {"CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "OMP_WAIT_POLICY"}
)
"""Variables of others that the documents name."""
TOOLS: Final = ("Makefile", "Dockerfile.*", ".ci/**/*", "e2e/**/*.py", "benchmarks/**/*.py")
"""Where variables of building, testing and measuring stand."""
READ: Final = (
    r'\b_?(?:environ|environment|given)(?:\.get\(|\[)"([A-Z][A-Z0-9_]+)"',
    r"^ARG ([A-Z][A-Z0-9_]+)",
    r"\$\(([A-Z][A-Z0-9_]+)\)",
)
"""Where Python, a Dockerfile and make read one."""
LISTED: Final = re.compile(r"^(?:SECRETS|PROXIES) = (.+)$", re.MULTILINE)
"""Of build.py: those that it reads by a list."""
KUBERNETES: Final = frozenset({"OOMKilled"})
"""Words of Kubernetes that guides name beside kinds and values of fields."""
KUBECTL_VERBS: Final = frozenset(
    {
        "apply",
        "create",
        "cp",
        "delete",
        "describe",
        "explain",
        "get",
        "label",
        "logs",
        "patch",
        "port-forward",
        "rollout",
        "run",
        "scale",
        "set",
        "taint",
        "wait",
    }
)
_PLAIN_KINDS: Final = frozenset(
    {
        "all",
        "apiservice",
        "apiservices",
        "clusterrole",
        "clusterrolebinding",
        "cm",
        "configmap",
        "crd",
        "deploy",
        "deployment",
        "endpointslices",
        "hpa",
        "namespace",
        "node",
        "pdb",
        "pod",
        "pvc",
        "replicasets",
        "rolebinding",
        "secret",
        "service",
        "statefulset",
        "svc",
    }
)
"""Names of kinds that kubectl takes beside those that the operator knows."""


def fields() -> set[str]:
    """``spec.gpu.type`` and so on, without the marks of lists and keys."""
    return {"spec", "status"} | {re.sub(r"\[\]|\{\}", "", path) for path, _ in fields_below(schema())}


def metrics() -> set[str]:
    """Of engine and operator, as a query names them."""
    families = [*engine_registry().collect(), *operator_registry().collect()]
    names = {full_name(family) for family in families}
    return names | {f"{full_name(family)}_{part}" for family in families for part in ("bucket", "sum", "count")}


def variables() -> set[str]:
    """Of engine, operator, libraries and tools."""
    settings = {field.name.upper() for config in (EngineConfig, OperatorConfig) for field in dataclasses.fields(config)}
    tools = [path for pattern in TOOLS for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"]
    read = {word for path in tools for word in read_in(path.read_text(encoding="utf-8", errors="ignore"))}
    return settings | LIBRARIES | read


def read_in(text: str) -> set[str]:
    """The variables that a file of the tools reads."""
    lists = (re.findall(r'"([A-Z][A-Z0-9_]+)"', row) for row in LISTED.findall(text))
    found = (re.findall(pattern, text, re.MULTILINE) for pattern in READ)
    return {word for words in (*found, *lists) for word in words}


def words() -> set[str]:
    """Capitalised words: reasons, events, conditions, kinds, values of fields."""
    reasons = {reason for group in GROUPS for reason in group.reasons}
    values = {value for _, node in fields_below(schema()) for value in _values(node)}
    return reasons | set(EVENTS) | set(CONDITIONS) | set(KINDS) | values | KUBERNETES


def targets() -> set[str]:
    """Of make."""
    return set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))


def kubectl_kinds() -> set[str]:
    """As kubectl takes them."""
    known = {name for kind in KINDS.values() for name in (kind.plural, kind.name.lower())}
    return known | {"psvc", "llm", *_PLAIN_KINDS}


def _values(node: Any) -> Iterator[str]:
    for holder in (node, node.get("items", {})):
        yield from (value for value in holder.get("enum", ()) if isinstance(value, str))
