from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from pagedserve_engine.config import EngineConfig
from reference import DOCS, DOCUMENTS, render_metrics, render_settings


@pytest.mark.parametrize(("name", "render"), DOCUMENTS.items(), ids=DOCUMENTS)
def test_a_generated_document_is_up_to_date(name: str, render: Callable[[], str]) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == render(), "run `make docs` and commit what it writes"


def test_every_setting_has_a_row() -> None:
    rows = render_settings()
    for field in dataclasses.fields(EngineConfig):
        assert f"| `{field.name.upper()}` |" in rows


def test_metrics_stand_with_their_labels() -> None:
    rows = render_metrics()
    assert (
        "| `pagedserve_requests_total` | counter | `outcome`: stop, length, cancelled, timeout, error, rejected |"
        in rows
    )
    assert "| `pagedserve_num_blocks` | gauge | `kind`: actual, requested |" in rows
    assert "| `pagedserve_cache_info` | info | `block_size`, `num_blocks` |" in rows


def test_links_between_documents_lead_somewhere() -> None:
    root = DOCS.parent
    documents = [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
