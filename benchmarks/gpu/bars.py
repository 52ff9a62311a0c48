"""The bars of a GPU run, and the rule that voids it."""

from __future__ import annotations

from benchmarks.bars import Bar, Figure, against, bar_table, ratio, value
from benchmarks.results import ResultFile

SLOWEST_COPY = {"H100": 2.8}
"""TB/s by a word of the card's name; a card that copies slower is shared or throttled."""


def void_reason(results: ResultFile) -> str:
    """Why the run says nothing; empty where it does."""
    return void_reason_of(results.head["hardware"]["card"], results.value("copy", "device", "bandwidth"))


def void_reason_of(card: str, rate: float | None) -> str:
    """The same for a card's name and its fastest copy in TB/s."""
    for word, least in SLOWEST_COPY.items():
        if word in card and rate is not None and rate < least:
            return f"{card} copied at {rate:.2f} TB/s, below {least} TB/s: something else uses it"
    return ""


def _faster(workload: str, than: str) -> Figure:
    """How many times one workload's step goes into another's."""
    return ratio(value(than, "step"), value(workload, "step"))


_AGAINST_PEER = "256 mixed requests, against transformers' continuous batching"
_SECOND = value("start_8b", "second_after_weights")
_SAMPLED = value("sampling_128", "step_sampled")
BARS = [
    Bar("8B bf16 decode 8 x 1k, step over bandwidth bound", value("decode_8", "step_over_bound"), 1.25, False, "x"),
    Bar("8B bf16 decode 32 x 1k", value("decode_32", "step_over_bound"), 1.25, False, "x"),
    Bar("8B bf16 decode 128 x 1k", value("decode_128", "step_over_bound"), 1.25, False, "x"),
    Bar("8B prefill 8 x 2k, share of 8192^3 product", value("prefill_8x2k", "share_of_product"), 0.55, True, "x"),
    Bar(f"8B, {_AGAINST_PEER}", against("mixed_8b", "transformers_cb"), 4, True, "x"),
    Bar(f"0.6B, {_AGAINST_PEER}", against("mixed_0.6b", "transformers_cb"), 4, True, "x"),
    Bar("gap between steps on the device, batch 256", value("gap_256", "gap"), 0.2, False, "ms"),
    Bar("fp8 weights and cache, 32 x 1k, against bf16", _faster("decode_fp8_32", "decode_32"), 1.5, True, "x"),
    Bar(
        "second start after weights, over the first",
        ratio(_SECOND, value("start_8b", "first_after_weights")),
        0.5,
        False,
        "x",
    ),
    Bar("second start after weights", _SECOND, 30, False, "s"),
    Bar(
        "step with the full sampling set over argmax, batch 128",
        ratio(_SAMPLED, value("sampling_128", "step_argmax")),
        1.03,
        False,
        "x",
    ),
]


def report(results: ResultFile) -> str:
    """Every bar with its figure; a run that is void says so first."""
    void = void_reason(results)
    return (f"VOID: {void}\n" if void else "") + bar_table(results, BARS)
