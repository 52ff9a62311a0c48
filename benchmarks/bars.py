"""The bars that the figures are held against; a bar without its figures stays open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.results import ResultFile

US = "pagedserve"
Figure = Callable[[ResultFile], float | None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and the least or the most that it may be."""

    what: str
    figure: Figure
    limit: float
    at_least: bool
    unit: str

    def verdict(self, results: ResultFile) -> tuple[str, str]:
        """The figure as text, and "met", "missed" or "open"."""
        value = self.figure(results)
        if value is None:
            return "not compared", "open"
        met = value >= self.limit if self.at_least else value <= self.limit
        return f"{value:.3g} {self.unit}", "met" if met else "missed"

    @property
    def asked(self) -> str:
        """The limit as text."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:,g} {self.unit}"


def value(workload: str, metric: str, engine: str = US) -> Figure:
    """One figure."""
    return lambda results: results.value(workload, engine, metric)


def ratio(over: Figure, under: Figure) -> Figure:
    """One figure over another, None where either lacks."""

    def divide(results: ResultFile) -> float | None:
        upper, lower = over(results), under(results)
        return None if upper is None or not lower else upper / lower

    return divide


def against(workload: str, peer: str) -> Figure:
    """Our throughput over a peer's."""
    return ratio(value(workload, "throughput"), value(workload, "throughput", peer))


def _first_token(workload: str) -> Figure:
    """Our median time to first token over vLLM's."""
    return ratio(value(workload, "ttft_p50"), value(workload, "ttft_p50", "vllm_cpu"))


BARS = [
    Bar(
        "64 mixed requests offline, against transformers' continuous batching",
        against("mixed", "transformers_cb"),
        3,
        True,
        "x",
    ),
    Bar("64 mixed requests offline, against vLLM CPU", against("mixed", "vllm_cpu"), 1, True, "x"),
    Bar(
        "HTTP at concurrency 32 against offline with 32 at once",
        ratio(value("http_32", "throughput"), value("offline_32", "throughput")),
        0.85,
        True,
        "x",
    ),
    Bar("HTTP at concurrency 8, tokens per second against vLLM CPU", against("http_8", "vllm_cpu"), 1.2, True, "x"),
    Bar("HTTP at concurrency 32, tokens per second against vLLM CPU", against("http_32", "vllm_cpu"), 1.2, True, "x"),
    Bar("HTTP at concurrency 8, median TTFT over vLLM CPU's", _first_token("http_8"), 1, False, "x"),
    Bar("HTTP at concurrency 32, median TTFT over vLLM CPU's", _first_token("http_32"), 1, False, "x"),
    Bar("Gemma 3 270M offline, against vLLM CPU", against("gemma", "vllm_cpu"), 1, True, "x"),
    Bar("bookkeeping per step, no-op model, 256 running", value("bookkeeping_256", "step"), 1, False, "ms"),
    Bar(
        "bookkeeping, 1,024 running against 4 x 256",
        ratio(value("bookkeeping_1024", "step"), lambda results: _times(4, value("bookkeeping_256", "step")(results))),
        1.25,
        False,
        "x",
    ),
    Bar(
        "shared prefix of 1,000 tokens x 32, prompt tokens computed",
        value("shared", "prompt_tokens_computed"),
        1_000 + 32 * 64,
        False,
        "tokens",
    ),
    Bar(
        "resident memory above weights + cache", value("memory", "resident_above_weights_and_cache"), 1.2, False, "GiB"
    ),
]


def _times(factor: float, figure: float | None) -> float | None:
    return None if figure is None else factor * figure


def bar_table(results: ResultFile, bars: Sequence[Bar] = BARS) -> str:
    """Every bar with its figure."""
    lines = [("bar", "asked", "measured", "")]
    lines += [(bar.what, bar.asked, *bar.verdict(results)) for bar in bars]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
