"""What is made of the Helm chart: templates, the settings among its values, and their schema. `make chart` writes them.

By hand: Chart.yaml, the other values with their part of the schema, and what templates share (_helpers.tpl, NOTES.txt).
"""

from __future__ import annotations

import json
from pathlib import Path

import helm_settings
import helm_templates
from bundle import ROOT
from helm_templates import CHART

BY_HAND = frozenset({"_helpers.tpl", "NOTES.txt"})
"""Files of templates/ that aren't made."""

_SETTINGS = "\n# Settings of the operator"


def render() -> dict[Path, str]:
    """The text of every file that is made, whole or in part."""
    made = {CHART / "templates" / name: text for name, text in helm_templates.templates().items()}
    return {**made, CHART / "values.yaml": _values(), CHART / "values.schema.json": _schema()}


def stale() -> list[Path]:
    """Templates that nothing is made of any more."""
    made = render()
    return [path for path in sorted((CHART / "templates").iterdir()) if path not in made and path.name not in BY_HAND]


def _values() -> str:
    by_hand, _, _ = (CHART / "values.yaml").read_text(encoding="utf-8").partition(_SETTINGS)
    return f"{by_hand.rstrip()}\n\n{helm_settings.values_text(helm_templates.variables())}"


def _schema() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["settings"] = helm_settings.settings_schema()
    schema["definitions"]["own-variable"] = {"enum": helm_settings.variables()}
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    """Write what is made, and take away what isn't any more."""
    for path in stale():
        path.unlink()
    for path, text in render().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
