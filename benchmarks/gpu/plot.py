"""Draws a GPU's result file: throughput over latency, the achieved share of the limit, and the peer beside us."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.bars import void_reason_of

Figures = dict[tuple[str, str, str], float]
"""By (workload, engine, metric)."""
BATCHES = {"decode_8": 8, "decode_32": 32, "decode_128": 128, "gap_256": 256}
US, PEER = "pagedserve", "transformers_cb"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#999999"


def fill(figure: Figure, figures: Figures, head: dict[str, Any]) -> None:
    """Three axes in a figure that is there."""
    left, middle, right = figure.subplots(1, 3)
    _throughput(left, figures)
    _share(middle, figures)
    _peers(right, figures)
    machine, versions = head["hardware"], head["versions"]
    rate = figures.get(("copy", "device", "bandwidth"))
    limits = f"copies at {rate:.2f} TB/s" if rate else "bandwidth not measured"
    void = void_reason_of(machine["card"], rate)
    figure.suptitle(
        f"{machine['card']}, {limits}; torch {versions['torch']}, {head['settings']['dtype']}, 1k context"
        + (f"\nVOID: {void}" if void else ""),
        fontsize=10,
    )


def _throughput(axes: Axes, figures: Figures) -> None:
    ours = [
        (figures[workload, US, "step"], figures[workload, US, "throughput"], f"{batch}")
        for workload, batch in BATCHES.items()
        if (workload, US, "step") in figures and (workload, US, "throughput") in figures
    ]
    _points(axes, ours, "o-", BLUE, "8B bf16, by batch")
    bounds = [
        (figures[workload, US, "bound"], 1e3 * BATCHES[workload] / figures[workload, US, "bound"], "")
        for workload in BATCHES
        if (workload, US, "bound") in figures
    ]
    _points(axes, bounds, "--", GREY, "bandwidth bound")
    fp8 = ("decode_fp8_32", US)
    if (*fp8, "step") in figures:
        _points(axes, [(figures[*fp8, "step"], figures[*fp8, "throughput"], "32")], "s", GREEN, "8B fp8")
    eager = ("decode_32", "graphs_off")
    if (*eager, "step") in figures:
        _points(axes, [(figures[*eager, "step"], figures[*eager, "throughput"], "32")], "x", ORANGE, "without graphs")
    axes.set(xlabel="time per output token (ms)", ylabel="output tokens per second", title="decoding")
    _finish(axes)


def _share(axes: Axes, figures: Figures) -> None:
    _points(axes, shares(figures, BATCHES), "o-", BLUE, "decoding")
    prefill = figures.get(("prefill_8x2k", US, "share_of_product"))
    if prefill is not None:
        axes.axhline(100 * prefill, color=GREEN, linestyle=":", label="prefill 8 x 2k, of the best product")
    axes.set(xlabel="batch", ylabel="achieved share of the limit (%)", title="share of the limit")
    _finish(axes)
    axes.set_ylim(0, 105)


def shares(figures: Figures, batches: Mapping[str, int]) -> list[tuple[float, float, str]]:
    """(Batch, per cent of what bandwidth or products allow, whichever allows less, empty) by workload."""
    points = []
    for workload, batch in batches.items():
        bounds = [figures.get((workload, US, metric), 0.0) for metric in ("bound", "product_bound")]
        if (workload, US, "step") in figures and max(bounds):
            points.append((float(batch), 100 * max(bounds) / figures[workload, US, "step"], ""))
    return points


def _peers(axes: Axes, figures: Figures) -> None:
    names = {"mixed_8b": "8B", "mixed_0.6b": "0.6B"}
    for engine, offset, colour, label in ((US, -0.2, BLUE, US), (PEER, 0.2, ORANGE, "transformers CB, 64 of them")):
        for place, workload in enumerate(names):
            height = figures.get((workload, engine, "throughput"))
            axes.bar(place + offset, height or 0.0, 0.36, color=colour, label=label if place == 0 else None)
            said = "not compared" if height is None else f"{height:,.0f}"
            axes.annotate(said, (place + offset, height or 0.0), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set(ylabel="output tokens per second", title="256 requests of 100-1,024 in and out")
    axes.set_ylim(top=1.35 * max(axes.get_ylim()[1], 1.0))
    axes.legend(frameon=False, fontsize=8)


def _points(axes: Axes, points: Sequence[tuple[float, float, str]], style: str, colour: str, label: str) -> None:
    if not points:
        return
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=colour, label=label)
    for x, y, said in points:
        axes.annotate(said, (x, y), textcoords="offset points", xytext=(5, -11), color=colour)


def _finish(axes: Axes) -> None:
    axes.set(xlim=(0, None), ylim=(0, None))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
