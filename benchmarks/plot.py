"""Draws a result file: throughput over latency, and the achieved share of the limit over batch size.

``python -m benchmarks.plot benchmarks/results/cpu.json`` draws an SVG and a PNG beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.plot import fill, shares
from benchmarks.results import Row
from benchmarks.workloads import HTTP_CONCURRENCY

COLOURS = {
    "pagedserve": "#0072b2",
    "vllm_cpu": "#d55e00",
    "transformers_cb": "#009e73",
    "padded_generate": "#999999",
}
NAMES = {
    "pagedserve": "pagedserve",
    "vllm_cpu": "vLLM CPU",
    "transformers_cb": "transformers continuous batching",
    "padded_generate": "padded generate",
}
OFFLINE = {
    "mixed": "64 mixed",
    "gemma": "Gemma 3, 32 mixed",
    "greedy": "16 x 64 greedy",
    "shared": "shared prefix x 32",
}
SHARE_BATCHES = {"decode_1": 1, "decode_8": 8, "decode_32": 32, "decode_64": 64}
Figures = dict[tuple[str, str, str], float]
"""By (workload, engine, metric)."""


def draw(path: Path) -> list[Path]:
    """Draw the result file at ``path``; returns the pictures."""
    stored = json.loads(path.read_text())
    rows = [Row(**row) for row in stored["rows"]]
    figures = {(row.workload, row.engine, row.metric): row.value for row in rows if row.value is not None}
    plt.rcParams.update(
        {"svg.hashsalt": "pagedserve", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    on_gpu = "card" in stored["hardware"]
    figure = plt.figure(figsize=(13, 4.2 if on_gpu else 8.0), layout="constrained")
    if on_gpu:
        fill(figure, figures, stored)
    else:
        _fill(figure, figures, stored)
    pictures = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(pictures[0], metadata={"Date": None})
    figure.savefig(pictures[1], dpi=120)
    plt.close(figure)
    return pictures


def _fill(figure: Figure, figures: Figures, stored: dict[str, Any]) -> None:
    (ttft, per_token), (offline, share) = figure.subplots(2, 2)
    _curve(ttft, figures, "ttft_p50", "time to first token, median (ms)")
    _curve(per_token, figures, "per_token_p50", "time per output token, median (ms)")
    _bars(offline, figures)
    _share(share, figures)
    # What the machine itself can do is the best of its samples, not their median.
    most = max((len(row["samples"]) for row in stored["rows"] if row["engine"] != "device"), default=0)
    machine, settings = stored["hardware"], stored["settings"]
    figure.suptitle(
        f"{settings['model'].partition('.')[0]}, {settings['dtype']}, {settings['threads']} threads"
        f" on {machine['processor']} ({', '.join(machine['instructions'])}); medians of up to {most} runs",
        fontsize=10,
    )


def _curve(axes: Axes, figures: Figures, latency: str, label: str) -> None:
    for engine, colour in COLOURS.items():
        points = [
            (figures[f"http_{count}", engine, latency], figures[f"http_{count}", engine, "throughput"], count)
            for count in HTTP_CONCURRENCY
            if (f"http_{count}", engine, latency) in figures
        ]
        if points:
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour, label=NAMES[engine])
        for x, y, count in points:
            axes.annotate(f"{count}", (x, y), textcoords="offset points", xytext=(5, -11), color=colour)
    axes.set(xlabel=label, ylabel="output tokens per second", title="HTTP, by number of clients")
    axes.set(xlim=(0, None), ylim=(0, None))
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _share(axes: Axes, figures: Figures) -> None:
    points = shares(figures, SHARE_BATCHES)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=COLOURS["pagedserve"])
    axes.set(xlabel="batch", ylabel="achieved share of the limit (%)", title="decoding: memory's or products' limit")
    axes.set(xlim=(0, None), ylim=(0, 105))
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _bars(axes: Axes, figures: Figures) -> None:
    engines = list(COLOURS)
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        for group, workload in enumerate(OFFLINE):
            place = group + (index - (len(engines) - 1) / 2) * width
            height = figures.get((workload, engine, "throughput"))
            label = NAMES[engine] if group == 0 else None
            axes.bar(place, height or 0.0, width * 0.92, color=COLOURS[engine], label=label)
            said = "not compared" if height is None else f"{height:.3g}"
            axes.annotate(
                said, (place, height or 0.0), ha="center", va="bottom", xytext=(0, 2), textcoords="offset points",
                fontsize=7, rotation=90 if height is None else 0, color="#555555",
            )  # fmt: skip
    axes.set_xticks(range(len(OFFLINE)), list(OFFLINE.values()))
    axes.set(ylabel="output tokens per second", title="offline")
    axes.set_ylim(top=1.6 * max([axes.get_ylim()[1], 1.0]))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


if __name__ == "__main__":
    for picture in draw(Path(sys.argv[1])):
        print(picture)
