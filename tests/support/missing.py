"""What a test needs and this machine lacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NoReturn

import pytest


def skip_without(missing: str, environment: Mapping[str, str] = os.environ) -> NoReturn:
    """Skip the test, saying what is missing; in CI, where nothing may be, it fails."""
    if environment.get("CI"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)
