"""Prompt lookup on and off: a text that the model repeats greedily, and a story that it draws by chance.

Through the library; the order of on and off turns at each repetition. Outputs must be equal but for a near tie:
their differing tokens are a row of their own.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Row
from pagedserve_engine.assembly import Core, build_core
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.request import RequestState, SamplingParams

TEXT = """The lighthouse keeper wrote down the weather every morning: wind from the west, a light rain, visibility four
miles. At noon the supply boat brought flour, lamp oil, twelve candles and a letter from his sister in Bergen.
He read the letter twice, folded it, and put it into the book where he kept the others. In the evening he lit
the lamp, turned the handle forty times, and watched the beam sweep over the water until the moon rose above the
northern rocks."""

WORKLOADS = (
    ("repeat", f"Repeat the following text, word for word, twice:\n\n{TEXT}\n\n", 0.0),
    ("story", "Tell me a long story about a lighthouse, a boat and a letter.", 1.0),
)
"""Name, what is asked, temperature."""

OUTPUT_TOKENS = 128
BATCHES = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload."""

    seconds: float
    outputs: list[list[int]]
    drafted: int
    accepted: int


def measure(
    config: EngineConfig, *, batches: Sequence[int] = BATCHES, repeats: int = 3, speculation_tokens: int = 4
) -> Iterator[Row]:
    """Rows of every workload and batch size for the model of ``config``, which must have a chat template."""
    cores = {
        "off": build_core(config.derive(speculation="none")),
        "on": build_core(config.derive(speculation="ngram", speculation_tokens=speculation_tokens)),
    }
    for batch, (workload, ask, temperature) in itertools.product(batches, WORKLOADS):
        runs = _alternate(cores, _prompts(cores["on"], ask, batch), repeats=repeats, temperature=temperature)
        yield from _rows(f"speculation_{workload}_{batch}", runs)


def _alternate(
    cores: Mapping[str, Core], prompts: Sequence[Sequence[int]], *, repeats: int, temperature: float
) -> dict[str, list[Run]]:
    """Runs of each core, in turns that begin with another one each time."""
    for core in cores.values():
        run(core, prompts, 8, temperature=temperature)
    runs: dict[str, list[Run]] = {name: [] for name in cores}
    for repetition in range(repeats):
        for name in sorted(cores, reverse=bool(repetition % 2)):
            runs[name].append(run(cores[name], prompts, OUTPUT_TOKENS, temperature=temperature))
    return runs


def run(core: Core, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float) -> Run:
    """All ``prompts`` at once; seconds from the first step to the last."""
    core.processor.scheduler.cache.evict_cached()
    scheduler = core.processor.scheduler
    drafted, accepted = scheduler.num_drafted, scheduler.num_accepted
    requests = [
        RequestState.create(
            str(place),
            prompt,
            SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=place, ignore_eos=True),
            arrival_time=time.monotonic(),
            max_model_len=core.max_model_len,
        )
        for place, prompt in enumerate(prompts)
    ]
    for request in requests:
        refused = core.processor.add_request(request)
        assert refused is None, refused
    started = time.perf_counter()
    while not scheduler.idle:
        core.processor.step()
    seconds = time.perf_counter() - started
    outputs = [request.output_ids for request in requests]
    return Run(seconds, outputs, scheduler.num_drafted - drafted, scheduler.num_accepted - accepted)


def _prompts(core: Core, ask: str, batch: int) -> list[list[int]]:
    assert core.tokenizer is not None, "the model has no tokenizer"
    asked = [f"{ask} ({number})" for number in range(batch)]
    return [core.tokenizer.apply_chat_template([{"role": "user", "content": content}]) for content in asked]


def _rows(workload: str, runs: dict[str, list[Run]]) -> list[Row]:
    rows = []
    for name, found in runs.items():
        throughput = [sum(map(len, one.outputs)) / one.seconds for one in found]
        rows.append(Row.median(workload, f"pagedserve, speculation {name}", "throughput", throughput, "tok/s"))
    on, off = runs["on"], runs["off"]
    ratios = [other.seconds / one.seconds for one, other in zip(on, off, strict=True)]
    shares = [one.accepted / max(one.drafted, 1) for one in on]
    differing = [sum(a != b for a, b in zip(_flat(on[0]), _flat(off[0]), strict=True))]
    engine = "pagedserve, speculation on"
    rows.append(Row.median(workload, engine, "speedup", ratios, "ratio"))
    rows.append(Row.median(workload, engine, "accepted_share", shares, "ratio"))
    rows.append(Row.median(workload, engine, "drafted_tokens", [one.drafted for one in on], "tokens"))
    rows.append(Row.median(workload, engine, "differing_tokens", differing, "tokens"))
    return rows


def _flat(one: Run) -> list[int]:
    return [token for output in one.outputs for token in output]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES), help="requests at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4, help="drafted at most")
    arguments = parser.parse_args()
    config = EngineConfig(dtype=arguments.dtype, device="cpu")
    for row in measure(
        config, batches=arguments.batches, repeats=arguments.repeats, speculation_tokens=arguments.tokens
    ):
        print(
            f"{row.workload:24} {row.engine:28} {row.metric:18} {row.value:10.3f} {row.unit:8} {row.samples}",
            flush=True,
        )


if __name__ == "__main__":
    main()
