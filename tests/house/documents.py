"""The documents of the repository as tests read them: links, headings, blocks of code, commands, resources.

A block of YAML that opens with ``# name.yaml`` is that file, for the commands of all pages. A block of YAML that has
``spec`` alone is a part of an InferenceService. Any other is an object of Kubernetes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs", "e2e", "engine", "manifests", "operator", "tests")

JSON = dict[str, Any]

_FILE = re.compile(r"# ([\w.-]+\.yaml)\n")
_COMMENT = re.compile(r"(^|\s)#\s.*$")
_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """To print."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The name that it bears as a file, or ""."""
        found = _FILE.match(self.text)
        return found[1] if found else ""


@dataclass(frozen=True)
class Document:
    """One file of markdown."""

    path: Path

    @cached_property
    def text(self) -> str:
        """As it is written."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def _tokens(self) -> list[Token]:
        return _PARSER.parse(self.text)

    @property
    def blocks(self) -> Iterator[Block]:
        """Fenced blocks, in order."""
        for token in self._tokens:
            if token.type == "fence":
                yield Block(self.path, (token.map or [0])[0] + 1, token.info.strip(), token.content)

    @property
    def links(self) -> Iterator[str]:
        """Targets of links and images."""
        for token in self._inline():
            target = token.attrs.get("href") or token.attrs.get("src")
            if target:
                yield str(target)

    @property
    def words(self) -> Iterator[str]:
        """What stands between backticks."""
        for token in self._inline():
            if token.type == "code_inline":
                yield token.content

    @property
    def anchors(self) -> set[str]:
        """What a link into the page may name."""
        following = zip(self._tokens, self._tokens[1:], strict=False)
        titles = (below.content for token, below in following if token.type == "heading_open")
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()


def documents() -> list[Document]:
    """Every page of the repository."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    return [Document(path) for path in sorted(found) if not any(part.startswith(".") for part in path.parts[1:])]


def files() -> dict[str, str]:
    """By name, the files that pages show."""
    return {block.file: block.text for page in documents() for block in page.blocks if block.file}


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a block of shell, on one line, and (of a console) what it prints."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console" or text.startswith("$ "):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield _COMMENT.sub("", command).strip(), printed
    elif block.language in ("", "sh"):
        for line in text.splitlines():
            if command := _COMMENT.sub("", line).strip():
                yield command, ""


def resources(block: Block) -> Iterator[JSON]:
    """The InferenceServices of a block of YAML; a part of one gets what it lacks."""
    if block.language != "yaml":
        return
    for found in yaml.safe_load_all(block.text):
        if isinstance(found, dict) and found.get("kind") == "InferenceService":
            yield found
        elif isinstance(found, dict) and set(found) == {"spec"}:
            yield _completed(found["spec"])


def unchecked(block: Block) -> list[JSON]:
    """What a block of YAML holds that is no file, no (part of a) resource, and no object of another kind."""
    if block.language != "yaml" or block.file:
        return []
    found = list(yaml.safe_load_all(block.text))
    return [each for each in found if not isinstance(each, dict) or not (set(each) == {"spec"} or "apiVersion" in each)]


def _completed(spec: JSON) -> JSON:
    model = {"uri": "hf://a/b-8B", **spec.get("model", {})}
    head = {"apiVersion": "pagedserve.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "part"}}
    return {**head, "spec": {**spec, "model": model}}
