"""What a GGUF file says of its tokenizer, read without the slow parts.

The full readers build an object for each of a few hundred thousand vocabulary entries; here lists are stepped over.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from pagedserve_engine.errors import ModelLoadError

Value = int | float | bool | str

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Value types of fixed size, as ``struct`` knows them."""


def read_header(path: Path) -> dict[str, Value]:
    """The file's settings but for its lists. Raises ModelLoadError where it is no GGUF file of version 2 or 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).settings()
    except (OSError, ValueError, KeyError, struct.error) as error:
        message = f"{path} can't be read as a GGUF file ({error}): download it again, or convert the model again"
        raise ModelLoadError(message, param="model") from error


class _Reader:
    """A position in the file's first part."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def settings(self) -> dict[str, Value]:
        """Everything from the magic number to the end of the settings."""
        if self._data[:4] != b"GGUF":
            raise ValueError("it doesn't begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        self._number("<Q")  # tensors
        found: dict[str, Value] = {}
        for _ in range(int(self._number("<Q"))):
            key, kind = self._string(), int(self._number("<I"))
            if kind == _ARRAY:
                self._skip_array()
            else:
                found[key] = self._string() if kind == _STRING else self._number(_SCALARS[kind])
        return found

    def _number(self, form: str) -> int | float | bool:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value  # type: ignore[no-any-return]

    def _string(self) -> str:
        length = int(self._number("<Q"))
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _skip_array(self) -> None:
        kind, count = int(self._number("<I")), int(self._number("<Q"))
        if kind in _SCALARS:
            self._at += count * struct.calcsize(_SCALARS[kind])
            return
        for _ in range(count):
            if kind == _STRING:
                length = int(self._number("<Q"))  # on a line of its own: it moves the position
                self._at += length
            else:
                self._skip_array()
