"""A real server under five hundred clients, and one that is told to leave under load."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from load_clients import Answer, Crowd, Question, anonymous_bytes, ask, tally
from models import tiny_chat_model
from processes import Server

ROUNDS = 8
QUESTIONS = [Question(f"{n} is a number. Its neighbours are", 16 + 4 * n) for n in range(12)]


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def crowded() -> Iterator[Server]:
    """Too small for its clients: some are refused, and blocks run out."""
    with Server(
        tiny_chat_model()[1], max_num_seqs=128, max_queue=256, num_blocks=150, block_size=16, max_model_len=1024
    ) as server:
        yield server


def test_five_hundred_clients_get_their_texts_or_are_seen_to_leave_and_nothing_stays_behind(crowded: Server):
    port, seen, memory = port_of(crowded), Counter[str](), []
    alone = {question: said(question, asyncio.run(ask(port, question))) for question in QUESTIONS}
    crowd = Crowd(QUESTIONS)
    for number in range(ROUNDS):
        for question, answer in asyncio.run(crowd.storm(port, seed=number)):
            check(question, answer, alone[question])
            seen["complete"] += answer.complete
            seen["left"] += answer.hung_up
            seen["left reading"] += answer.hung_up and answer.num_events > 0
            seen["refused"] += answer.num_refused
        samples = crowded.wait_until_idle()
        assert samples["blocks_free"] == samples["blocks"]
        memory.append(anonymous_bytes(crowded._process.pid))
    outcomes = tally(samples)
    assert seen["complete"] + seen["left"] == ROUNDS * crowd.num_clients
    assert seen["refused"] > 0, "nobody was refused: the test's queue is too long"
    assert outcomes["rejected"] >= seen["refused"]
    assert outcomes["cancelled"] > 0
    assert (outcomes["error"], outcomes["timeout"], outcomes["stop"]) == (0, 0, 0)
    # Who leaves while the last token is on its way has a whole text on the server's side; who leaves before an answer
    # may not even have been heard.
    ended = outcomes["length"] + outcomes["cancelled"] - len(QUESTIONS)
    assert seen["complete"] + seen["left reading"] <= ended <= ROUNDS * crowd.num_clients
    assert outcomes["length"] - len(QUESTIONS) >= seen["complete"]
    assert samples["preemptions_total"] > 0, "blocks never ran out: the test's pool is too large"
    assert memory[7] <= 1.02 * memory[3], [f"{size >> 20} MiB" for size in memory]


def said(question: Question, answer: Answer) -> str:
    assert (answer.status, answer.complete, answer.finish_reason) == (200, True, "length"), (question, answer)
    return answer.text


def check(question: Question, answer: Answer, expected: str) -> None:
    """The whole text, or its beginning where the client left."""
    if answer.hung_up:
        assert expected.startswith(answer.text), question
    else:
        assert said(question, answer) == expected, question


# --- leaving ----------------------------------------------------------------------------------------------------------

NUM_STREAMS = 100


async def all_under_way(port: int, question: Question) -> list[asyncio.Task[Answer]]:
    """Streams of ``question`` that have all begun to answer."""
    begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
    streams = [asyncio.create_task(ask(port, question, on_event=lambda _, event=event: event.set())) for event in begun]
    async with asyncio.timeout(120):
        for event in begun:
            await event.wait()
    return streams


def test_an_order_to_leave_cuts_no_stream_and_refuses_new_ones():
    question = Question("The ship leaves the harbour and", 300)
    with Server(tiny_chat_model()[1], num_blocks=2048) as server:
        port = port_of(server)
        expected = said(question, asyncio.run(ask(port, question)))

        async def scenario() -> None:
            streams = await all_under_way(port, question)
            leaving = asyncio.create_task(asyncio.to_thread(server.stop))
            await asyncio.to_thread(server.wait_for_line, "draining")
            ready, live = await asyncio.to_thread(server.get, "/health/ready"), server.get("/health/live")
            refused = await ask(port, question)
            assert not any(stream.done() for stream in streams), "the streams were too short to see it drain"
            assert (ready.status, live.status, refused.status) == (503, 200, 503)
            assert refused.headers["retry-after"] == "1"
            assert refused.error is not None
            assert refused.error["code"] == "draining"
            for answer in await asyncio.gather(*streams):
                assert said(question, answer) == expected
            ended = await leaving
            assert ended.status == 0, ended.log

        asyncio.run(scenario())


def test_what_takes_longer_than_it_may_is_told_so_and_the_process_leaves():
    question = Question("The ship leaves the harbour and", 4000)
    with Server(tiny_chat_model()[1], num_blocks=16384, drain_seconds=0.5) as server:
        port = port_of(server)

        async def scenario() -> None:
            streams = await all_under_way(port, question)
            leaving = asyncio.create_task(asyncio.to_thread(server.stop))
            for answer in await asyncio.gather(*streams):
                assert not answer.complete
                assert answer.text, "what came before is not lost"
                assert answer.error is not None
                assert answer.error["code"] == "draining"
            ended = await leaving
            assert ended.status == 0, ended.log

        asyncio.run(scenario())
