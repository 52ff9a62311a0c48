"""From an engine's ``/metrics`` to the few numbers that autoscalers ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

LARGEST: Final = 1e15
"""Well within what a quantity of thousandths holds, in 64 bits; no engine has anything of that number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One metric of one pod; ``at`` is when it was read there."""

    pod: str
    number: float
    at: datetime


@dataclass(frozen=True, slots=True)
class Reading:
    """All the numbers of one pod by metric, and when they were read; no number: the pod didn't answer in time."""

    numbers: Mapping[str, float]
    at: datetime

    @property
    def missing(self) -> bool:
        """Whether it says nothing, which isn't the same as zero."""
        return not self.numbers


def read_numbers(text: str, names: Collection[str]) -> dict[str, float]:
    """Those of ``names`` that the text in Prometheus' format has, but for LARGEST and above; raises ValueError."""
    # An engine shows some hundred series, most of them histograms: only the lines that are asked for are parsed.
    lines = [line for line in text.splitlines() if line.startswith(tuple(names))]
    samples = (
        sample for family in text_string_to_metric_families("\n".join([*lines, ""])) for sample in family.samples
    )
    return {
        sample.name: sample.value
        for sample in samples
        if sample.name in names and not sample.labels and abs(sample.value) < LARGEST
    }
