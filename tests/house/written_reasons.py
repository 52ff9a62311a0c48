"""Which reasons the operator can write into conditions and events, read from its code.

Errors are asked for theirs. In ``status/`` every capitalised word counts as a reason unless something is compared with
it, it is a condition's type or status, or one of READ. So a new reason can't be overlooked, at the price of a word in
READ where the operator learns another one of Kubernetes'.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

from pagedserve_operator import status
from pagedserve_operator.errors import ConditionType, UserError
from pagedserve_operator.status.conditions import ConditionStatus
from pagedserve_operator.status.containers import CONFIG_REASONS, IMAGE_REASONS

FOLDER: Final = Path(status.__file__).parent
READ: Final = frozenset(
    {
        "AbleToScale",
        "Completed",
        "CrashLoopBackOff",
        "Error",
        "Failed",
        "FailedGetExternalMetric",
        "FailedGetPodsMetric",
        "FoundNewReplicaSet",
        "NewReplicaSetCreated",
        "PodScheduled",
        "ProgressDeadlineExceeded",
        "ReplicaFailure",
        "ReplicaSetUpdated",
        "RunContainerError",
        "Succeeded",
    }
)
"""Words of Kubernetes that ``status/`` looks for and never writes."""

_WORD: Final = re.compile(r"[A-Z][A-Za-z]+")
_NO_REASONS: Final = {*get_args(ConditionType), *get_args(ConditionStatus), "Normal", "Warning"}


def error_reasons() -> set[str]:
    """Of every error that becomes a condition."""
    return {leaf.reason for leaf in _leaves(UserError)}


def retry_seconds() -> dict[str, float | None]:
    """By reason of an error, until the next look; None: after a change."""
    return {leaf.reason: leaf.retry_seconds for leaf in _leaves(UserError)}


def status_reasons() -> set[str]:
    """Of everything in ``status/``, the names of events included."""
    return _words() - _NO_REASONS - READ - IMAGE_REASONS - CONFIG_REASONS


def event_names() -> set[str]:
    """Events whose name stands in the code, rather than a condition's reason."""
    calls = (node for tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.Call))
    notes = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "EventNote")
    names = (note.args[1] for note in notes if len(note.args) > 1)
    return {name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)}


def words_of_kubernetes() -> set[str]:
    """Those of READ that the code still looks for."""
    return READ & {constant.value for tree in _trees() for constant in _constants(tree, compared=True)}


def _leaves(error: type[UserError]) -> Iterator[type[UserError]]:
    yield error
    for below in error.__subclasses__():
        yield from _leaves(below)


def _words() -> set[str]:
    found = (constant.value for tree in _trees() for constant in _constants(tree, compared=False))
    return {word for word in found if _WORD.fullmatch(word)}


def _trees() -> Iterator[ast.AST]:
    for file in sorted(FOLDER.glob("*.py")):
        yield ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _constants(node: ast.AST, *, compared: bool) -> Iterator[ast.Constant]:
    """The strings of a tree that do something, with or without those that something is compared with."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for below in ast.iter_child_nodes(node):
        is_read = isinstance(below, ast.Compare) and not compared
        if not is_read and not _says_nothing(below) and not _is_annotation(node, below):
            yield from _constants(below, compared=compared)


def _says_nothing(node: ast.AST) -> bool:
    """Whether it is a docstring, or the list of a package's names."""
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_annotation(node: ast.AST, below: ast.AST) -> bool:
    """Whether ``below`` is no value but a type, such as the words of a Literal."""
    if isinstance(node, ast.Subscript) and below is node.slice:
        return isinstance(node.value, ast.Name) and node.value.id == "Literal"
    return below is getattr(node, "annotation", None)
