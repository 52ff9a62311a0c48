"""Size budgets and house rules that no linter knows; `make lint` runs this file, test_budgets.py proves it.

Ruff bounds lines and positional parameters; import-linter bounds imports. What is left is how long files and functions
may be, how deep they may nest, who may read the environment, and where an ``__init__.py`` would do harm.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKED = ("engine", "operator", "e2e", "benchmarks", "tests/support", "tests/house")
FILE_LINES = 250
"""A file beyond this is named; beyond FILE_LINES_HARD it fails."""
FILE_LINES_HARD = 400
FUNCTION_LINES = 60
NESTING = 3
POSITIONAL = 5

_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True)
class Finding:
    """A place and what is wrong there; ``fails`` tells a violation from a remark."""

    path: Path
    line: int
    message: str
    fails: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def check_tree(root: Path) -> list[Finding]:
    """Every finding below ``root``, the repository's top folder."""
    findings = list(check_folders(root))
    for folder in CHECKED:
        for path in _sources(root / folder):
            is_product = folder in ("engine", "operator")
            findings += check_file(path, may_read_environment=not is_product or path.name == "config.py")
    return findings


def check_folders(root: Path) -> Iterator[Finding]:
    """Packages where none may be: ``operator/`` would hide the standard module, and pytest needs none in tests/."""
    for path in [*_sources(root / "tests"), root / "operator/__init__.py", root / "engine/__init__.py"]:
        if path.name == "__init__.py" and path.exists():
            yield Finding(path, 1, "no __init__.py here: this folder is no package")


def check_file(path: Path, *, may_read_environment: bool = True) -> Iterator[Finding]:
    """Findings of one Python file."""
    source = path.read_text(encoding="utf-8")
    yield from _check_length(path, len(source.splitlines()))
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, _FUNCTIONS):
            yield from _check_function(path, node)
        if not may_read_environment and _touches_environment(node):
            yield Finding(path, node.lineno, "only config.py reads the environment")  # type: ignore[attr-defined]


def nesting(body: list[ast.stmt]) -> int:
    """How deep blocks stand in each other; ``elif`` goes no deeper, and a function inside starts anew."""
    return max((_depth(statement) for statement in body), default=0)


def _depth(statement: ast.stmt) -> int:
    if not isinstance(statement, _BLOCKS):
        return 0
    if isinstance(statement, ast.Match):
        return 1 + max(nesting(case.body) for case in statement.cases)
    inner = nesting(statement.body)
    for handler in getattr(statement, "handlers", []):
        inner = max(inner, nesting(handler.body))
    rest = getattr(statement, "orelse", [])
    is_elif = isinstance(statement, ast.If) and len(rest) == 1 and isinstance(rest[0], ast.If)
    inner = max(inner, nesting(rest) - is_elif, nesting(getattr(statement, "finalbody", [])))
    return 1 + inner


def _check_length(path: Path, lines: int) -> Iterator[Finding]:
    if lines > FILE_LINES:
        fails = lines > FILE_LINES_HARD
        bound = FILE_LINES_HARD if fails else FILE_LINES
        yield Finding(path, 1, f"{lines} lines: at most {bound}", fails=fails)


def _check_function(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Finding]:
    kernel = any(_decorates(decorator, "jit") for decorator in node.decorator_list)
    # Triton passes every argument by position, so that a kernel's list of them is long and says nothing of its body.
    first = node.body[0].lineno if kernel else node.lineno
    lines = (node.end_lineno or node.lineno) - first + 1
    if lines > FUNCTION_LINES:
        yield Finding(path, node.lineno, f"{node.name} has {lines} lines: at most {FUNCTION_LINES}")
    deep = nesting(node.body)
    if deep > NESTING:
        yield Finding(path, node.lineno, f"{node.name} nests {deep} deep: at most {NESTING}")
    names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
    positional = len(names) - (names[:1] in (["self"], ["cls"]))
    if positional > POSITIONAL and not kernel:
        yield Finding(path, node.lineno, f"{node.name} takes {positional} positional parameters: at most {POSITIONAL}")


def _decorates(decorator: ast.expr, name: str) -> bool:
    """Whether it is ``@module.name`` or ``@module.name(...)``."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Attribute) and called.attr == name


def _touches_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in _ENVIRONMENT
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in _ENVIRONMENT for alias in node.names)
    return False


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def main() -> int:
    """Print what was found; 1 where something fails."""
    findings = check_tree(Path())
    for finding in findings:
        print(finding if finding.fails else f"{finding} (a remark: it fails beyond {FILE_LINES_HARD})")
    failures = sum(finding.fails for finding in findings)
    print(f"Budgets: {failures} broken, {len(findings) - failures} files are long")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
