"""A model on two ranks says what it says on one, whatever shares a step, and dies with the cause when a rank does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from models import load_reference, tiny_chat_model, tiny_model
from pagedserve_engine.batch import Batch
from pagedserve_engine.errors import EngineDeadError
from pagedserve_engine.lockstep import decode, encode
from pagedserve_engine.manager import ContinuousBatchingManager, News
from pagedserve_engine.request import GrammarSpec, RequestState, SamplingParams
from stepping import Exactness, SteppedEngine

IDS: list[int] = np.random.default_rng(5).integers(3, 256, 200).tolist()
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7, "min_tokens": 3}


def load_mixed(engine: SteppedEngine) -> list[str]:
    """Prompts long and short, some with a common beginning, that come while others run; those that are sampled."""
    for length, tokens in ((90, 12), (5, 30), (33, 20)):
        engine.add(IDS[:length], tokens)
    sampled = [engine.add(IDS[:40], 12, **SAMPLED)]
    for _ in range(6):
        engine.step()
    engine.add(IDS[:90] + IDS[:20], 10)
    sampled.append(engine.add(IDS[7:60], 10, **{**SAMPLED, "top_k": 20, "logprobs": 3, "prompt_logprobs": 1}))
    for _ in range(3):
        engine.step()
    engine.add(IDS[:64], 16)
    engine.run()
    return sampled


@pytest.mark.parametrize(("name", "steps_in_flight"), [("llama", 0), ("qwen3", 1), ("gemma3", 1)])
def test_two_ranks_say_what_one_says(name: str, steps_in_flight: int) -> None:
    folder = tiny_model(name)[1]
    settings = {"num_blocks": 64, "max_batch_tokens": 48, "steps_in_flight": steps_in_flight}
    engine = SteppedEngine(folder, tensor_parallel_size=2, **settings)
    try:
        sampled = load_mixed(engine)
    finally:
        engine.processor.close()
    assert not multiprocessing.active_children()
    alone = SteppedEngine(folder, **settings)
    load_mixed(alone)
    assert [engine.tokens(request) for request in sampled] == [alone.tokens(request) for request in sampled]
    assert any(output.num_cached_tokens for news in engine.news.values() for output in news)
    scored = [output.prompt_logprobs for output in engine.news[sampled[1]] if output.prompt_logprobs]
    assert len(scored[0]) == len(engine.requests[sampled[1]].prompt_ids)
    greedy = [request for request in engine.requests if request not in sampled]
    differing = [request for request in greedy if engine.tokens(request) != alone.tokens(request)]
    if differing:
        exactness = Exactness(load_reference(folder))
        for request_id in differing:
            exactness.check(engine.requests[request_id].prompt_ids, engine.tokens(request_id))
        assert exactness.num_excused <= 1


def test_ranks_follow_a_grammar_together_and_a_dead_one_ends_every_request_with_the_cause() -> None:
    engine = SteppedEngine(tiny_chat_model()[1], tensor_parallel_size=2, max_model_len=256)
    pattern = GrammarSpec("regex", "[ab]{8}")
    ruled = engine.add([5, 6, 7], 20, grammar=pattern, ignore_eos=False)
    free = engine.add([5, 6, 7], 12)
    engine.run()
    text = engine.core.tokenizer.decode(engine.tokens(ruled))  # type: ignore[union-attr]
    assert len(text) == 8
    assert set(text) <= set("ab")
    assert len(engine.tokens(free)) == 12
    news: list[News] = []
    died = threading.Event()

    def receive(latest: News) -> None:
        news.append(latest)
        if latest.death is not None:
            died.set()

    manager = ContinuousBatchingManager(engine.processor, receive=receive)
    manager.start()
    manager.add_request([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
    (rank,) = multiprocessing.active_children()
    assert rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    assert died.wait(30)
    manager.stop()
    deaths = [latest.death for latest in news if latest.death is not None]
    assert len(deaths) == 1
    assert "rank 1 of 2 was killed by SIGKILL" in deaths[0].message
    assert isinstance(manager.death, EngineDeadError)
    assert not multiprocessing.active_children()


def batch_of(requests: list[RequestState], *, admitted: tuple[int, ...], num_decodes: int) -> Batch:
    rows = len(requests)
    return Batch(
        requests=requests,
        slots=np.array([request.slot for request in requests], np.int32),
        stays=np.zeros(rows, np.int32),
        query_lens=np.ones(rows, np.int32),
        context_lens=np.arange(rows, dtype=np.int32),
        token_ids=np.arange(rows, dtype=np.int32) + 40,
        carried=np.zeros(rows, np.bool_),
        sampled=np.ones(rows, np.bool_),
        block_tables=(np.arange(3 * rows, dtype=np.int32).reshape(rows, 3),),
        num_decodes=num_decodes,
        admitted=admitted,
        read_first=True,
    )


def request_in(slot: int, **params: float) -> RequestState:
    request = RequestState.create(
        f"r{slot}", [1, 2, slot], SamplingParams(seed=slot, **params), arrival_time=0.0, max_model_len=9
    )
    request.slot = slot
    return request


def test_a_batch_arrives_as_it_was_sent_and_requests_travel_once() -> None:
    first, second = request_in(4, temperature=0.5), request_in(2)
    second.output_ids = [8, 9]
    known: dict[int, RequestState] = {}
    sent = batch_of([first, second], admitted=(0, 1), num_decodes=0)
    got = decode(encode(sent), known)
    for field in ("slots", "query_lens", "context_lens", "token_ids", "carried", "sampled"):
        assert np.array_equal(getattr(got, field), getattr(sent, field))
    assert np.array_equal(got.block_tables[0], sent.block_tables[0])
    assert (got.num_decodes, got.admitted, got.read_first) == (0, (0, 1), True)
    assert [request.params for request in got.requests] == [first.params, second.params]
    assert [request.seed for request in got.requests] == [4, 2]
    assert got.requests[1].output_ids == [8, 9]
    first.output_ids = [3]
    later = decode(encode(batch_of([second, first], admitted=(), num_decodes=0)), known)
    assert later.requests == [known[2], known[4]]
    assert later.requests[1].output_ids, "no prompt position of it is scored any more"


def test_a_slot_belongs_to_the_request_that_entered_it_last() -> None:
    known: dict[int, RequestState] = {}
    decode(encode(batch_of([request_in(1)], admitted=(0,), num_decodes=0)), known)
    newcomer = request_in(1, temperature=0.25)
    got = decode(encode(batch_of([newcomer], admitted=(0,), num_decodes=0)), known)
    assert got.requests[0].params == newcomer.params


def test_a_message_is_little_more_than_its_arrays() -> None:
    requests = [request_in(slot) for slot in range(256)]
    batch = batch_of(requests, admitted=(), num_decodes=256)
    arrays = sum(
        array.nbytes for array in (*batch.block_tables, batch.slots, batch.stays, batch.query_lens, batch.context_lens)
    )
    assert len(encode(batch)) < arrays + 4 * 256 + 2 * 256 + 1500
