"""The two kinds of values that are long: token ids and prompts. Checked without a Python call for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.server.fields import Integer, JsonSchema, refuse

MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPTS = 1024

_TOKEN = Integer(0, MAX_TOKEN_ID)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A non-empty list of token ids; ``check_vocabulary`` compares them with the model's."""

    words: str = "a non-empty list of token ids"

    def accepts(self, value: object) -> bool:
        """Lists."""
        return isinstance(value, list)

    def check(self, value: Any, path: str) -> list[int]:
        """The ids as ints."""
        if not isinstance(value, list) or not value:
            raise refuse(path, value, self.words)
        if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_TOKEN_ID:
            return value
        return [_TOKEN.check(item, f"{path}[{index}]") for index, item in enumerate(value)]

    def schema(self) -> JsonSchema:
        """A list of integers."""
        return {"type": "array", "items": _TOKEN.schema(), "minItems": 1}


@dataclass(frozen=True, slots=True)
class Prompts:
    """One or several prompts, each a string or token ids."""

    words: str = f"a string, a list of at most {MAX_PROMPTS} strings, a list of token ids, or a list of such lists"

    def accepts(self, value: object) -> bool:
        """Strings and lists."""
        return isinstance(value, str | list)

    def check(self, value: Any, path: str) -> list[str | list[int]]:
        """The prompts, always as a list of them."""
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            raise refuse(path, value, self.words)
        if not isinstance(value[0], str | list):
            return [TokenIds().check(value, path)]
        if len(value) > MAX_PROMPTS:
            raise refuse(path, value, self.words)
        return [self._check_one(item, f"{path}[{index}]", type(value[0])) for index, item in enumerate(value)]

    def _check_one(self, item: Any, path: str, kind: type) -> str | list[int]:
        if type(item) is not kind:
            raise refuse(path, item, "prompts of one kind: all strings or all lists of token ids")
        return item if isinstance(item, str) else TokenIds().check(item, path)

    def schema(self) -> JsonSchema:
        """All four shapes."""
        ids = TokenIds().schema()
        shapes = [
            {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PROMPTS}
            for item in ({"type": "string"}, ids)
        ]
        return {"anyOf": [{"type": "string"}, shapes[0], ids, shapes[1]]}


@dataclass(frozen=True, slots=True)
class Biases:
    """Token id (a JSON key, hence text) to what is added to its logit."""

    words: str = "an object of at most 1024 token ids, each with a number from -100 to 100"

    def accepts(self, value: object) -> bool:
        """Objects."""
        return isinstance(value, dict)

    def check(self, value: Any, path: str) -> dict[int, float]:
        """Ids to floats."""
        if not isinstance(value, dict) or len(value) > 1024:
            raise refuse(path, value, self.words)
        return dict(self._check_entry(name, bias, path) for name, bias in value.items())

    def _check_entry(self, name: str, bias: Any, path: str) -> tuple[int, float]:
        where = f"{path}.{name[:16]}"
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) <= MAX_TOKEN_ID):
            raise refuse(where, name, "keys that are token ids")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise refuse(where, bias, "a number from -100 to 100")
        return int(name), float(bias)

    def schema(self) -> JsonSchema:
        """An object of numbers."""
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 1024,
        }


def check_vocabulary(ids: list[int], vocab_size: int, path: str) -> None:
    """Raise InvalidParameterError naming the first id that the model doesn't have."""
    if not ids or max(ids) < vocab_size:
        return
    index = next(index for index, token in enumerate(ids) if token >= vocab_size)
    raise InvalidParameterError(
        f"{path}[{index}] is {ids[index]}: the model has the token ids 0 to {vocab_size - 1}", param=f"{path}[{index}]"
    )
