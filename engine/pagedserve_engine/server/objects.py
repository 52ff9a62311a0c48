"""JSON objects with known fields, checked from a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.server.fields import Choice, JsonSchema, Kind, refuse, show


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an object: name, values and a sentence for the documentation."""

    name: str
    kind: Kind
    help: str = ""
    default: Any = None
    required: bool = False
    extension: bool = False
    """Not part of OpenAI's API."""
    inert: bool = False
    """Checked, then without effect."""

    def schema(self) -> JsonSchema:
        """The kind, null where the field may be absent, the default and the help."""
        schema = self.kind.schema()
        if not self.required:
            schema = nullable(schema)
        if self.help:
            schema["description"] = self.help
        if self.default is not None:
            schema["default"] = list(self.default) if isinstance(self.default, tuple) else self.default
        return schema


def nullable(schema: JsonSchema) -> JsonSchema:
    """``schema`` or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


@dataclass(frozen=True, slots=True)
class Object:
    """An object whose fields are ``fields`` and no others."""

    fields: tuple[Field, ...]
    name: str = ""
    """Under which the OpenAPI document lists it; unnamed objects are written out in place."""
    refused: tuple[tuple[str, str], ...] = ()
    """Fields that clients know but this server can't serve, each with what to do."""

    @property
    def words(self) -> str:
        """The required fields, where there are some."""
        required = [field.name for field in self.fields if field.required]
        return "an object" + (f" with {', '.join(required)}" if required else "")

    def accepts(self, value: object) -> bool:
        """Objects."""
        return isinstance(value, dict)

    def check(self, value: Any, path: str) -> dict[str, Any]:
        """Every field by name: checked where given, its default otherwise."""
        if not isinstance(value, dict):
            raise refuse(path or "the body", value, self.words)
        known = {field.name for field in self.fields}
        for name, given in value.items():
            if name not in known and given is not None:
                raise self._unknown(name, path)
        return {field.name: _read(field, value.get(field.name), path) for field in self.fields}

    def _unknown(self, name: str, path: str) -> InvalidParameterError:
        where = join(path, name[:64])
        cure = dict(self.refused).get(name)
        if cure is None:
            cure = f"there's no such field; known are {', '.join(sorted(field.name for field in self.fields))}"
        return InvalidParameterError(f"{show(where)[1:-1]} isn't supported: {cure}", param=where)

    def schema(self) -> JsonSchema:
        """A reference where the object has a name."""
        return {"$ref": f"#/components/schemas/{self.name}"} if self.name else self.definition()

    def definition(self) -> JsonSchema:
        """The object written out."""
        required = [field.name for field in self.fields if field.required]
        return {
            "type": "object",
            "properties": {field.name: field.schema() for field in self.fields},
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }


@dataclass(frozen=True, slots=True)
class Tagged:
    """An object whose field ``tag`` decides which fields it has."""

    tag: str
    options: tuple[tuple[str, Object], ...]

    @property
    def words(self) -> str:
        """The tag's values."""
        return f"an object with {self.tag} {' or '.join(repr(name) for name, _ in self.options)}"

    def accepts(self, value: object) -> bool:
        """Objects."""
        return isinstance(value, dict)

    def check(self, value: Any, path: str) -> dict[str, Any]:
        """Every field by name, the tag included."""
        if not isinstance(value, dict):
            raise refuse(path, value, self.words)
        where, options = join(path, self.tag), dict(self.options)
        tag = Choice(tuple(options)).check(value.get(self.tag), where)
        rest = {name: given for name, given in value.items() if name != self.tag}
        return {self.tag: tag, **options[tag].check(rest, path)}

    def schema(self) -> JsonSchema:
        """All options."""
        definitions = []
        for name, option in self.options:
            definition = option.definition()
            definition["properties"] = {self.tag: {"type": "string", "const": name}, **definition["properties"]}
            definition["required"] = [self.tag, *definition.get("required", [])]
            definitions.append(definition)
        return {"anyOf": definitions}


def join(path: str, name: str) -> str:
    """The JSON path of a field below ``path``."""
    return f"{path}.{name}" if path else name


def _read(field: Field, given: Any, path: str) -> Any:
    where = join(path, field.name)
    if given is not None:
        return field.kind.check(given, where)
    if field.required:
        raise InvalidParameterError(f"{where} is missing: give {field.kind.words}", param=where)
    return field.default
