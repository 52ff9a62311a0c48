"""Reading JSON by field, with the field's path in every complaint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, TypeVar

from pagedserve_operator.errors import SpecError

Choice = TypeVar("Choice", bound=str)

_QUANTITY: Final = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))([eE][+-]?\d{1,2}|[numkMGTPE]|[KMGTPE]i)?")
_LONGEST_QUANTITY: Final = 64
"""Characters; a number with more digits than these is a slip."""
_POWERS: Final = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY: Final = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def quantity(text: str | int | float) -> Decimal:
    """A Kubernetes quantity as a number of base units ("1500m" is 1.5, "1Gi" is 2**30); raises ValueError."""
    match = _QUANTITY.fullmatch(str(text).strip())
    if match is None or len(match[0]) > _LONGEST_QUANTITY:
        raise ValueError(f"{text!r} is no quantity: write a number with at most one suffix, such as 500m, 8 or 16Gi")
    number, suffix = Decimal(match[1]), match[2] or ""
    if suffix in _BINARY:
        return number * Decimal(2) ** _BINARY[suffix]
    if suffix in _POWERS:
        return number.scaleb(_POWERS[suffix])
    return number.scaleb(int(suffix[1:]))


class Fields:
    """One JSON object at ``path``; readers raise SpecError for a value of another type; absent is the default."""

    def __init__(self, values: Any, path: str) -> None:
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise SpecError(path, f"must be an object, not {values!r}")
        self._values = values
        self.path = path

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def child(self, name: str) -> Fields:
        """The object below ``name``, empty where absent."""
        return Fields(self._values.get(name), self._at(name))

    def text(self, name: str, default: str) -> str:
        """A string; empty counts as absent."""
        return self.maybe_text(name) or default

    def maybe_text(self, name: str) -> str | None:
        """A string or None; empty counts as absent."""
        value = self._values.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise SpecError(self._at(name), f"must be a string, not {value!r}: quote it")
        return value

    def required_text(self, name: str) -> str:
        """A string that must be there."""
        value = self.maybe_text(name)
        if value is None:
            raise SpecError(self._at(name), "is missing: give a value")
        return value

    def choice(self, name: str, default: Choice, allowed: tuple[Choice, ...]) -> Choice:
        """One of ``allowed``."""
        value = self.text(name, default)
        for option in allowed:
            if option == value:
                return option
        raise SpecError(self._at(name), f"must be one of {', '.join(allowed)}, not {value!r}")

    def integer(self, name: str, default: int, *, low: int | None = None) -> int:
        """A whole number, ``low`` or more."""
        value = self.maybe_integer(name, low=low)
        return default if value is None else value

    def maybe_integer(self, name: str, *, low: int | None = None) -> int | None:
        """A whole number, ``low`` or more, or None."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise SpecError(self._at(name), f"must be a whole number, not {value!r}")
        if low is not None and value < low:
            raise SpecError(self._at(name), f"must be at least {low}, not {value}")
        return value

    def required_integer(self, name: str, *, low: int | None = None) -> int:
        """A whole number, ``low`` or more, that must be there."""
        value = self.maybe_integer(name, low=low)
        if value is None:
            raise SpecError(self._at(name), "is missing: give a whole number")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(self._at(name), f"must be a number, not {value!r}: write it without quotes")
        # So that neither infinity nor what is no number at all gets through.
        if not low <= value <= high:
            raise SpecError(self._at(name), f"must be from {low:g} to {high:g}, not {value}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.maybe_flag(name)
        return default if value is None else value

    def maybe_flag(self, name: str) -> bool | None:
        """True, false or None."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise SpecError(self._at(name), f"must be true or false, not {value!r}")
        return value

    def quantity(self, name: str, default: str) -> str:
        """A Kubernetes quantity, as it is written."""
        return self.maybe_quantity(name) or default

    def maybe_quantity(self, name: str) -> str | None:
        """A Kubernetes quantity, as it is written, or None."""
        value = self._values.get(name)
        return None if value is None else self._checked_quantity(value, self._at(name))

    def quantities(self, name: str) -> dict[str, str]:
        """Quantities by resource name."""
        table = self.child(name)
        return {key: self._checked_quantity(value, table._at(key)) for key, value in table._values.items()}

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._list(name)
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise SpecError(f"{self._at(name)}[{index}]", f"must be a string, not {item!r}")
        return tuple(value)

    def texts_by_name(self, name: str) -> dict[str, str]:
        """Strings by key."""
        table = self.child(name)
        for key, value in table._values.items():
            if not isinstance(value, str):
                raise SpecError(table._at(key), f"must be a string, not {value!r}: quote it")
        return dict(table._values)

    def rows(self, name: str) -> tuple[dict[str, Any], ...]:
        """A list of objects."""
        value = self._list(name)
        for index, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise SpecError(f"{self._at(name)}[{index}]", f"must be an object, not {item!r}")
        return tuple(dict(item) for item in value)

    def maybe_table(self, name: str) -> dict[str, Any] | None:
        """An object as it is, or None."""
        return dict(self.child(name)._values) if self.has(name) else None

    def _list(self, name: str) -> list[Any]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise SpecError(self._at(name), f"must be a list, not {value!r}")
        return value

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}"

    @staticmethod
    def _checked_quantity(value: Any, path: str) -> str:
        try:
            quantity(value)
        except ValueError as error:
            raise SpecError(path, str(error)) from error
        return str(value)
