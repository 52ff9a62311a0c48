"""Captured steps: which there are, which is replayed, and that replaying changes no token."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from models import tiny_model
from pagedserve_engine.graphs import Choosing, DecodeGraphs, GraphKey, graph_sizes
from recorder import RepeatingRecorder, draw
from stepping import SteppedEngine

MIXES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}, {}, {}],
    "drawn": [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2, "top_p": 0.8}, {}],
    "filtered": [{"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3}] * 2,
    "asking for more": [
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.4, "temperature": 0.8, "seed": 4},
        {"logprobs": 2},
        {"logit_bias": {9: 4.0}},
        {"min_tokens": 5, "stop_token_ids": (7, 8), "ignore_eos": False},
    ],
}


def test_sizes_are_close_where_rows_are_few_and_end_at_the_most_rows() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(6) == (1, 2, 4, 6)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes(256)[-3:] == (240, 248, 256)
    assert graph_sizes(300)[-3:] == (256, 288, 300)
    assert len(graph_sizes(512)) == 3 + 32 + 8


def test_graphs_are_captured_largest_first_and_the_smallest_that_fits_is_replayed() -> None:
    order: list[GraphKey] = []

    def prepare(key: GraphKey) -> Any:
        order.append(key)
        return lambda: key

    recorder = RepeatingRecorder(bytes_each=10)
    graphs = DecodeGraphs(recorder, prepare)
    assert graphs.capture((1, 4, 8), (Choosing.GREEDY,))
    assert [key.num_rows for key in order] == [8, 4, 1]
    assert (graphs.num_captured, graphs.num_bytes) == (3, 30)
    assert [graphs.size_for(rows) for rows in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, None]
    assert graphs.replay(GraphKey(4, Choosing.GREEDY)).num_rows == 4


def test_a_model_that_cannot_be_captured_is_launched_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of()
    engine.core.runner.capture(RepeatingRecorder(refuses="operation not permitted"), (1, 2))
    assert engine.core.runner.graphs is None
    assert "operation not permitted" in caplog.text
    engine.add([5, 6, 7], 4)
    engine.run()
    assert len(engine.tokens("r0")) == 4


def test_graphs_that_were_asked_for_where_there_are_none_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(use_cuda_graph=True)
    assert engine.core.runner.graphs is None
    assert "USE_CUDA_GRAPH has no effect: there are none on cpu" in caplog.text


def test_steps_that_the_host_plans_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    recorder = RepeatingRecorder()
    engine_of(use_cuda_graph=True, recorder=recorder, attention="reference")
    assert recorder.num_recorded == 0
    assert "attention by reference is planned on the host" in caplog.text


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_replayed_steps_bring_the_tokens_of_launched_ones(family: str, mix: list[dict[str, Any]], depth: int) -> None:
    plain, captured = engine_of(family, depth), engine_of(family, depth)
    recorder = RepeatingRecorder()
    captured.core.runner.draw = draw
    captured.core.runner.capture(recorder, graph_sizes(8))
    num_recorded = recorder.num_recorded
    for engine in (plain, captured):
        load(engine, mix)
    for request_id in plain.requests:
        assert captured.tokens(request_id) == plain.tokens(request_id), request_id
        assert reported(captured, request_id) == reported(plain, request_id)
    assert recorder.num_replayed > 10
    assert recorder.num_recorded == num_recorded, "nothing is captured once requests run"


def test_replays_are_counted_and_mixed_steps_are_not_replayed() -> None:
    engine = engine_of()
    recorder = RepeatingRecorder()
    engine.core.runner.capture(recorder, (1, 2))
    engine.add([5, 6, 7], 4)
    counted = 0
    while not engine.scheduler.idle:
        counted += engine.processor.step()[1].graph_replays
    assert counted == recorder.num_replayed == 3, "the prefill is launched, and brings the first of four tokens"


def test_more_rows_than_any_graph_has_are_launched() -> None:
    engine = engine_of()
    recorder = RepeatingRecorder()
    engine.core.runner.capture(recorder, (1,))
    for start in (5, 15):
        engine.add([start, start + 1], 3)
    engine.run()
    assert recorder.num_replayed == 0


def test_the_recorder_given_to_the_core_captures_before_it_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = RepeatingRecorder(bytes_each=1 << 20)
    engine = engine_of(use_cuda_graph=True, recorder=recorder)
    assert recorder.num_recorded == len(graph_sizes(8))
    assert "captured 4 steps of up to 8 rows" in caplog.text
    engine.add([5, 6, 7], 4)
    engine.run()
    assert recorder.num_replayed == 3


def engine_of(family: str = "llama", depth: int = 0, **settings: Any) -> SteppedEngine:
    settings = {"num_threads": 1, "attention": "native", **settings}
    return SteppedEngine(tiny_model(family)[1], steps_in_flight=depth, **settings)


def reported(engine: SteppedEngine, request_id: str) -> list[tuple[int, float, list[int]]]:
    """Of each token: its id, its log probability, and the likeliest ids."""
    entries = [entry for news in engine.news[request_id] for entry in news.logprobs or []]
    return [(entry.token_id, round(entry.logprob, 3), [token for token, _ in entry.top]) for entry in entries]


def load(engine: SteppedEngine, mix: list[dict[str, Any]]) -> None:
    """Requests that come, decode and end at different times, so that the number of rows goes up and down."""
    rng = np.random.default_rng(0)
    for at, params in enumerate(mix + mix):
        engine.add(rng.integers(3, 90, 2 + 7 * at % 19).tolist(), 5 + 3 * at % 11, **params)
        for _ in range(at % 3):
            engine.step()
    engine.run()
