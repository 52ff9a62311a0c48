from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from budgets import FILE_LINES, FILE_LINES_HARD, check_file, check_folders, check_tree


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source))
    return path


def messages(path: Path, *, may_read_environment: bool = True) -> list[str]:
    return [finding.message for finding in check_file(path, may_read_environment=may_read_environment)]


def test_a_long_file_is_a_remark_and_a_very_long_one_fails(tmp_path: Path) -> None:
    def fails(lines: int) -> list[bool]:
        return [finding.fails for finding in check_file(write(tmp_path / "a.py", "x = 1\n" * lines))]

    assert fails(FILE_LINES) == []
    assert fails(FILE_LINES + 1) == [False]
    assert fails(FILE_LINES_HARD) == [False]
    assert fails(FILE_LINES_HARD + 1) == [True]


@pytest.mark.parametrize("head", ["def f():", "async def f():"])
def test_a_function_beyond_sixty_lines_fails(tmp_path: Path, head: str) -> None:
    assert messages(write(tmp_path / "a.py", head + "\n" + "    x = 1\n" * 59)) == []
    assert messages(write(tmp_path / "a.py", head + "\n" + "    x = 1\n" * 60)) == ["f has 61 lines: at most 60"]


def test_a_method_is_measured_too(tmp_path: Path) -> None:
    assert len(messages(write(tmp_path / "a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 60))) == 1


THREE_DEEP = {
    "blocks in blocks": """
        def f():
            for a in b:
                with a:
                    if a:
                        pass
    """,
    "an elif goes no deeper than its if": """
        def f():
            for a in b:
                with a:
                    if a:
                        pass
                    elif b:
                        pass
                    elif c:
                        pass
                    else:
                        pass
    """,
    "a function inside starts anew": """
        def f():
            for a in b:
                with a:
                    if a:
                        def g():
                            for x in y:
                                pass
    """,
}
FOUR_DEEP = {
    "blocks in blocks": """
        def f():
            for a in b:
                with a:
                    if a:
                        while a:
                            pass
    """,
    "an else": """
        def f():
            for a in b:
                with a:
                    if a:
                        pass
                    else:
                        x = 1
                        if b:
                            pass
    """,
    "an exception's handler": """
        async def f():
            async for a in b:
                async with a:
                    try:
                        pass
                    except ValueError:
                        if a:
                            pass
    """,
    "a finally": """
        def f():
            for a in b:
                for c in d:
                    try:
                        pass
                    finally:
                        if a:
                            pass
    """,
    "a case": """
        def f():
            for a in b:
                for c in d:
                    match c:
                        case 1:
                            if a:
                                pass
    """,
    "a block in an elif": """
        def f():
            for a in b:
                with a:
                    if a:
                        pass
                    elif b:
                        while c:
                            pass
    """,
}


@pytest.mark.parametrize("source", THREE_DEEP.values(), ids=THREE_DEEP)
def test_three_blocks_deep_is_fine(tmp_path: Path, source: str) -> None:
    assert messages(write(tmp_path / "a.py", source)) == []


@pytest.mark.parametrize("source", FOUR_DEEP.values(), ids=FOUR_DEEP)
def test_four_blocks_deep_fails(tmp_path: Path, source: str) -> None:
    assert messages(write(tmp_path / "a.py", source)) == ["f nests 4 deep: at most 3"]


def test_a_sixth_positional_parameter_fails_and_self_and_keywords_are_free(tmp_path: Path) -> None:
    fine = "class A:\n    def f(self, a, b, c, /, d, e, *, g, h): ...\n"
    assert messages(write(tmp_path / "a.py", fine)) == []
    assert messages(write(tmp_path / "a.py", "def f(a, b, c, /, d, e, g): ...\n")) == [
        "f takes 6 positional parameters: at most 5"
    ]


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_reading_the_environment_fails_where_it_may_not(tmp_path: Path, source: str) -> None:
    path = write(tmp_path / "a.py", source)
    assert messages(path) == []
    assert messages(path, may_read_environment=False) == ["only config.py reads the environment"]


def test_other_uses_of_os_are_free(tmp_path: Path) -> None:
    path = write(tmp_path / "a.py", "import os\nfrom os import path\nos.urandom(8)\nself.environ = 1\n")
    assert messages(path, may_read_environment=False) == []


@pytest.mark.parametrize("folder", ["operator", "engine", "tests", "tests/engine", "tests/support"])
def test_an_init_where_no_package_is_fails(tmp_path: Path, folder: str) -> None:
    assert list(check_folders(tmp_path)) == []
    write(tmp_path / folder / "__init__.py", "")
    assert [finding.path for finding in check_folders(tmp_path)] == [tmp_path / folder / "__init__.py"]


def test_the_whole_tree_is_checked_but_for_hidden_folders(tmp_path: Path) -> None:
    bad = "import os\nx = os.environ\n"
    for name in ("engine/p/a.py", "engine/p/config.py", "engine/.venv/a.py", "benchmarks/a.py"):
        write(tmp_path / name, bad)
    write(tmp_path / "tests/support/a.py", "def f(a, b, c, d, e, g): ...\n")
    found = {str(finding.path.relative_to(tmp_path)) for finding in check_tree(tmp_path)}
    assert found == {"engine/p/a.py", "tests/support/a.py"}
