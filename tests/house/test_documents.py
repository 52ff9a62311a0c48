from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import jsonschema_rs
import pytest

import named_things
from crd import schema, strict
from documents import JSON, ROOT, Block, Document, commands, documents, files, resources, unchecked
from pagedserve_operator.parsing import parse

PAGES = documents()
GUIDE = [page for page in PAGES if page.path.parent.name == "guide"]
BLOCKS = [block for page in PAGES for block in page.blocks]
COMMANDS = [(block.place, command, printed) for block in BLOCKS for command, printed in commands(block)]
RESOURCES = [(block.place, resource) for block in BLOCKS for resource in resources(block)]
SIZED = [row for row in COMMANDS if "pagedserve-operator size" in row[1] and row[2]]
VALIDATOR = jsonschema_rs.validator_for(strict(schema()))
VALUED = {"-n", "-l", "-o", "-f", "-k", "-p", "-c", "--container", "--tail", "--namespace", "--image", "--raw"}
"""Options of kubectl whose value stands apart."""


def name(page: Document) -> str:
    return str(page.path.relative_to(ROOT))


def first(row: tuple[str, object]) -> str:
    return row[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Document) -> None:
    for link in page.links:
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        place = (page.path.parent / target).resolve() if target else page.path
        assert place.exists(), link
        assert not anchor or anchor in Document(place).anchors, link


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in Document(index).links if "://" not in link}
    assert {page.path for page in PAGES if index.parent in page.path.parents} - {index} <= linked


def test_every_sample_is_shown_somewhere() -> None:
    shown = {(page.path.parent / link).resolve() for page in PAGES for link in page.links if link.endswith(".yaml")}
    assert set((ROOT / "manifests" / "samples").glob("*.yaml")) <= shown


def test_targets_of_make_are_there() -> None:
    named = [(place, word) for place, command, _ in COMMANDS for word in made(command)]
    named += [(name(page), word) for page in PAGES for text in page.words for word in made(text)]
    assert len(named) > 10
    known = named_things.targets()
    assert [row for row in named if row[1] not in known] == []


def made(command: str) -> list[str]:
    """The targets that a command asks make for."""
    if not re.match(r"(make|\S+=\S+ make) ", command):
        return []
    words = shlex.split(re.split(r"[|;&]", command)[0])
    return [word for word in words[words.index("make") + 1 :] if "=" not in word and not word.startswith("-")]


def kubectl(command: str) -> Iterator[list[str]]:
    """The words of each call of kubectl in a line of shell."""
    for call in re.findall(r"\bkubectl ((?:'[^']*'|\"[^\"]*\"|[^|;&)'\"])*)", command):
        yield shlex.split(call)


CALLS = [(place, words) for place, command, _ in COMMANDS for words in kubectl(command)]


def plain(words: list[str]) -> list[str]:
    """Verb, kinds and names, without options."""
    before = ["", *words]
    return [word for last, word in zip(before, words, strict=False) if not word.startswith("-") and last not in VALUED]


def test_calls_of_kubectl_name_what_there_is() -> None:
    assert len(CALLS) > 40
    for place, words in CALLS:
        verb, *asked = plain(words)
        assert verb in named_things.KUBECTL_VERBS, place
        if verb in ("rollout", "set"):
            asked = asked[1:]
        if asked and verb not in ("apply", "cp", "explain", "port-forward", "logs", "run"):
            kinds = asked[0].partition("/")[0].split(",")
            assert set(kinds) <= named_things.kubectl_kinds(), (place, kinds)


def test_files_that_kubectl_is_given_are_there() -> None:
    given = [
        (place, value)
        for place, words in CALLS
        for option, value in pairwise(words)
        if option in ("-f", "-k") and value not in ("-", "FOLDER")
    ]
    assert len(given) > 5
    known = files()
    assert [row for row in given if row[1] not in known and not (ROOT / row[1]).exists()] == []


def test_fields_that_pages_name_are_in_the_schema() -> None:
    # What is made from the schema lists fields of pods, too.
    written = [page for page in PAGES if page.path.name != "fields.md"]
    named = [(name(page), word) for page in written for word in page.words]
    named += [(place, path) for place, command, _ in COMMANDS for path in re.findall(r"\{\.([\w.]+)\}", command)]
    named += [(place, word.removeprefix("psvc.")) for place, words in CALLS for word in words if "psvc." in word]
    asked = [(place, word.partition(":")[0]) for place, word in named if re.match(r"(spec|status)\.[a-z]", word)]
    assert len(asked) > 60
    known = named_things.fields()
    assert [row for row in asked if row[1] not in known] == []


def test_metrics_that_pages_name_are_exported() -> None:
    known = named_things.metrics() | {"pagedserve_engine", "pagedserve_operator"}
    named = [(name(page), word) for page in PAGES for word in re.findall(r"\bpagedserve_[a-z_]+[a-z]\b", page.text)]
    assert len(named) > 60
    assert [row for row in named if row[1] not in known and not row[1].startswith("pagedserve_cb")] == []


def test_variables_that_pages_name_are_settings() -> None:
    words = [(name(page), re.match(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+(?==|$)", word)) for page in PAGES for word in page.words]
    named = [(place, match[0]) for place, match in words if match]
    assert len(named) > 60
    known = named_things.variables()
    assert [row for row in named if row[1] not in known] == []


def test_a_variable_is_what_is_read_and_not_what_is_written_large() -> None:
    read = 'x = os.environ.get("A_B")\nARG C_D=1\ne = given["E_F"]\nSECRETS = {"a": "G_H"}\nrun: $(I_J)\n'
    assert named_things.read_in(read) == {"A_B", "C_D", "E_F", "G_H", "I_J"}
    assert named_things.read_in('K_L = 1\n# M_N\nraise Failed("O_P is bad")\n') == set()


def test_words_of_the_guide_are_ones_that_the_operator_says() -> None:
    named = [(name(page), word) for page in GUIDE for word in page.words if re.fullmatch(r"[A-Z][a-z]+[A-Z]\w+", word)]
    assert len(named) > 15
    known = named_things.words()
    assert [row for row in named if row[1] not in known] == []


@pytest.mark.parametrize("row", RESOURCES, ids=first)
def test_a_resource_in_a_page_has_no_field_that_the_schema_lacks(row: tuple[str, JSON]) -> None:
    VALIDATOR.validate(row[1])
    parse(row[1])


def test_no_part_of_a_resource_escapes_the_schema() -> None:
    assert [(block.place, unchecked(block)) for block in BLOCKS if unchecked(block)] == []
    part = Block(ROOT / "README.md", 3, "yaml", "autoscaling:\n  novel: 1\n")
    assert unchecked(part) == [{"autoscaling": {"novel": 1}}]
    assert unchecked(Block(ROOT / "README.md", 3, "yaml", "apiVersion: v1\nkind: Secret\n")) == []


@pytest.mark.parametrize("row", SIZED, ids=first)
def test_sizing_prints_what_the_page_shows(row: tuple[str, str, str], tmp_path: Path) -> None:
    _, command, printed = row
    for file, text in files().items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "FETCH_MODEL_CONFIG": "false"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    pattern = re.escape(printed.strip()).replace(re.escape("..."), "(?s:.*)")
    assert re.fullmatch(pattern, (done.stdout + done.stderr).strip()), done.stdout + done.stderr


def test_blocks_say_what_they_are() -> None:
    known = {"", "console", "json", "python", "sh", "text", "yaml"}
    assert [block.place for block in BLOCKS if block.language not in known] == []


def test_a_block_is_found_with_its_file_and_its_commands() -> None:
    block = Block(ROOT / "README.md", 3, "console", "$ make \\\n  lint  # all\nfine\n$ true\n")
    assert list(commands(block)) == [("make    lint", "fine\n"), ("true", "")]
    assert Block(ROOT / "README.md", 3, "yaml", "# a.yaml\nspec: {}\n").file == "a.yaml"
    (part,) = resources(Block(ROOT / "README.md", 3, "yaml", "spec:\n  replicas: 2\n"))
    assert part["spec"] == {"replicas": 2, "model": {"uri": "hf://a/b-8B"}}
