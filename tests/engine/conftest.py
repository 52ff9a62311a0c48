"""Server processes that several modules talk to: each takes seconds to start, so one serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from oracle import Oracle
    from processes import Server

# What the fixtures need is imported in them: tests on a GPU run where there is no client of the API.


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """What the tiny chat model says."""
    from models import tiny_chat_model
    from oracle import Oracle

    return Oracle(tiny_chat_model()[1])


@pytest.fixture(scope="session")
def chat_server() -> Iterator[Server]:
    """A server of the tiny chat model with its defaults."""
    from models import tiny_chat_model
    from processes import Server

    with Server(tiny_chat_model()[1], served_model_name="tiny", num_blocks=2048) as server:
        yield server
