"""Kinds of JSON values: each checks a value, says in words what it takes, and describes itself as a JSON schema.

One declaration therefore gives the validation, its error messages, the OpenAPI document and the table in docs/http.md.
JSON's null means that a field is absent. No message ever dumps a nested value: it may be as deep as the parser allows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from pagedserve_engine.errors import InvalidParameterError

JsonSchema = dict[str, Any]


class Kind(Protocol):
    """A set of JSON values."""

    @property
    def words(self) -> str:
        """What is taken, to follow "give "."""

    def accepts(self, value: object) -> bool:
        """Whether the JSON type fits; bounds are looked at by ``check``."""

    def check(self, value: Any, path: str) -> Any:
        """The value as the engine uses it. Raises InvalidParameterError naming ``path``."""

    def schema(self) -> JsonSchema:
        """The same as a JSON schema."""


def refuse(path: str, value: object, words: str) -> InvalidParameterError:
    """The error for a value that isn't what ``words`` say."""
    return InvalidParameterError(f"{path} is {show(value)}: give {words}", param=path)


def show(value: object) -> str:
    """A value in a few characters, containers by their size."""
    if isinstance(value, str):
        return orjson.dumps(value if len(value) <= 40 else value[:40] + "…").decode()
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return orjson.dumps(value).decode()


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number; 2.0 is one, as in JSON schema."""

    low: int
    high: int

    @property
    def words(self) -> str:
        """Bounds included."""
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        """Booleans aren't numbers here."""
        return type(value) is int or (type(value) is float and value.is_integer())

    def check(self, value: Any, path: str) -> int:
        """The number as an int."""
        if not self.accepts(value) or not self.low <= value <= self.high:
            raise refuse(path, value, self.words)
        return int(value)

    def schema(self) -> JsonSchema:
        """Bounds included."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Number:
    """A number; ``above`` excludes the lower bound itself."""

    low: float
    high: float
    above: bool = False

    @property
    def words(self) -> str:
        """Bounds included."""
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"

    def accepts(self, value: object) -> bool:
        """Booleans aren't numbers here."""
        return type(value) in (int, float)

    def check(self, value: Any, path: str) -> float:
        """The number as a float."""
        if not self.accepts(value) or not self.low <= value <= self.high or (self.above and value == self.low):
            raise refuse(path, value, self.words)
        return float(value)

    def schema(self) -> JsonSchema:
        """Bounds included."""
        return {"type": "number", "exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    words: str = "true or false"

    def accepts(self, value: object) -> bool:
        """Numbers aren't booleans."""
        return isinstance(value, bool)

    def check(self, value: Any, path: str) -> bool:
        """The boolean."""
        if not isinstance(value, bool):
            raise refuse(path, value, self.words)
        return value

    def schema(self) -> JsonSchema:
        """Without bounds."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    """A string of ``low`` to ``high`` characters that matches ``pattern`` as a whole."""

    low: int = 0
    high: int | None = None
    pattern: str | None = None

    @property
    def words(self) -> str:
        """Length and pattern."""
        length = f" of at most {self.high} characters" if self.high else ""
        shape = f" that matches {self.pattern}" if self.pattern else ""
        return ("a string" if not self.low else "a non-empty string") + length + shape

    def accepts(self, value: object) -> bool:
        """Strings."""
        return isinstance(value, str)

    def check(self, value: Any, path: str) -> str:
        """The string."""
        if not isinstance(value, str) or len(value) < self.low or (self.high is not None and len(value) > self.high):
            raise refuse(path, value, self.words)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise refuse(path, value, self.words)
        return value

    def schema(self) -> JsonSchema:
        """Length and pattern."""
        bounds = {"minLength": self.low or None, "maxLength": self.high}
        if self.pattern:
            bounds["pattern"] = f"^{self.pattern}$"  # type: ignore[assignment]
        return {"type": "string", **{name: bound for name, bound in bounds.items() if bound is not None}}


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few strings."""

    options: tuple[str, ...]

    @property
    def words(self) -> str:
        """The options."""
        return " or ".join(f'"{option}"' for option in self.options)

    def accepts(self, value: object) -> bool:
        """Strings."""
        return isinstance(value, str)

    def check(self, value: Any, path: str) -> str:
        """The string."""
        if not isinstance(value, str) or value not in self.options:
            raise refuse(path, value, self.words)
        return value

    def schema(self) -> JsonSchema:
        """The options."""
        return {"type": "string", "enum": list(self.options)}
