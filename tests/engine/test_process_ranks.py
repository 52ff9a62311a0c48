"""A server whose model is on two ranks: it answers as one, says which rank a line is from, and dies with its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from openai import APIError

from models import tiny_chat_model
from oracle import Oracle
from processes import ENDING_SECONDS, Server

PROMPT = "Tell me a story"


def ranks_of(server: Server) -> list[int]:
    """Process ids of the ranks beside rank 0."""
    children = [
        int(child)
        for task in Path(f"/proc/{server._process.pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_server_on_two_ranks_answers_and_ends_with_the_one_that_was_killed(oracle: Oracle) -> None:
    folder = tiny_chat_model()[1]
    with Server(folder, served_model_name="tiny", num_blocks=512, tensor_parallel_size=2) as server:
        (rank,) = ranks_of(server)
        assert server.wait_for_line("rank=1")
        with server.client() as client:
            answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
            assert answer.choices[0].text == oracle.text(oracle.greedy(oracle.ids(PROMPT), 8))
            endless = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=7000, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(endless))
            os.kill(rank, signal.SIGKILL)
            with pytest.raises(APIError, match="rank 1 of 2 was killed by SIGKILL"):
                for _ in endless:
                    pass
        assert server._process.wait(ENDING_SECONDS) == 1
        server._reader.join(ENDING_SECONDS)
        assert "rank 1 of 2 was killed by SIGKILL" in server.log.strip().splitlines()[-1]
    assert not Path(f"/proc/{rank}").exists()
