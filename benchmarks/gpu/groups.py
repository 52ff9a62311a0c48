"""Which rows share a process: those of one core; a process that dies takes no other group's rows with it."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.gpu.bench import Bench
from benchmarks.results import Row


@dataclass(frozen=True, slots=True)
class Group:
    """A process's work. Modules are imported only where it runs: the parent needs no torch."""

    run: Callable[[Bench], None]
    least_seconds: float
    """With less left of the run, it isn't begun."""
    most_seconds: float
    rows: tuple[tuple[str, str, str, str], ...]
    """(workload, engine, metric, unit) that the bars read: marked as not compared where the process ends without."""


def limits(bench: Bench) -> None:
    """The card's own limits."""
    from benchmarks.gpu import limits as of_the_card

    of_the_card.measure(bench)


def bf16(bench: Bench) -> None:
    """Everything that one core of the large shape can tell: also the first start."""
    from benchmarks.gpu import start
    from benchmarks.gpu.decode import decode, sampling
    from benchmarks.gpu.driver import driving
    from benchmarks.gpu.gap import gap
    from benchmarks.gpu.mixed import mixed
    from benchmarks.gpu.prefill import prefill

    scale = bench.scale
    with driving(bench, scale.large) as driver:
        bench.attempt("start_8b", "first_after_weights", "s", lambda: start.start(driver, "first"))
        for workload, batch in scale.decode.items():
            bench.attempt(workload, "step", "ms", lambda w=workload, b=batch: decode(bench, driver, w, b))  # type: ignore[misc]
        bench.attempt("prefill_8x2k", "rate", "TFLOP/s", lambda: prefill(bench, driver))
        bench.attempt("gap_256", "gap", "ms", lambda: gap(bench, driver, scale.gap_batch))
        bench.attempt("mixed_8b", "throughput", "tok/s", lambda: mixed(bench, driver, "mixed_8b"))
        bench.attempt("sampling_128", "step_sampled", "ms", lambda: sampling(bench, driver, scale.decode["decode_128"]))


def fp8(bench: Bench) -> None:
    """Weights and cache in fp8, against the bf16 step of the same batch."""
    from benchmarks.gpu.decode import decode
    from benchmarks.gpu.driver import driving

    batch = bench.scale.decode["decode_32"]

    def measure() -> typing.Iterator[typing.Any]:
        with driving(bench, bench.scale.large, quantization="fp8", kv_cache_dtype="fp8") as driver:
            yield from decode(bench, driver, "decode_fp8_32", batch, number_bytes=1)

    bench.attempt("decode_fp8_32", "step", "ms", measure)


def peer_8b(bench: Bench) -> None:
    """The peer on the large shape."""
    from benchmarks.gpu import peer

    bench.attempt(
        "mixed_8b", "throughput", "tok/s", lambda: peer.mixed(bench, "mixed_8b", bench.scale.large), engine=peer.PEER
    )


def second_start(bench: Bench) -> None:
    """Another process that finds the first one's compiled artefacts."""
    from benchmarks.gpu import start
    from benchmarks.gpu.driver import driving

    def measure() -> typing.Iterator[typing.Any]:
        with driving(bench, bench.scale.large) as driver:
            yield from start.start(driver, "second")

    bench.attempt("start_8b", "second_after_weights", "s", measure)


def small(bench: Bench) -> None:
    """The small shape, then its peer."""
    from benchmarks.gpu import peer
    from benchmarks.gpu.driver import driving
    from benchmarks.gpu.mixed import mixed

    def measure() -> typing.Iterator[typing.Any]:
        with driving(bench, bench.scale.small) as driver:
            yield from mixed(bench, driver, "mixed_0.6b")

    bench.attempt("mixed_0.6b", "throughput", "tok/s", measure)
    bench.attempt(
        "mixed_0.6b",
        "throughput",
        "tok/s",
        lambda: peer.mixed(bench, "mixed_0.6b", bench.scale.small),
        engine=peer.PEER,
    )


def variants(bench: Bench) -> None:
    """The decoding step without graphs, and with each attention backend that is there."""
    from benchmarks.gpu.decode import decode
    from benchmarks.gpu.driver import driving
    from pagedserve_engine.config import EngineConfig

    batch = bench.scale.decode["decode_32"]
    backends = [name for name in typing.get_args(typing.get_type_hints(EngineConfig)["attention"]) if name != "auto"]
    chosen = [
        ("graphs_off", {"use_cuda_graph": False}),
        *((f"attention_{name}", {"attention": name}) for name in backends),
    ]
    for name, changes in chosen:

        def measure(name: str = name, changes: dict[str, typing.Any] = changes) -> typing.Iterator[typing.Any]:
            with driving(bench, bench.scale.large, **changes) as driver:
                yield from decode(bench, driver, "decode_32", batch, engine=name)

        bench.attempt("decode_32", "step", "ms", measure, engine=name)


def share(bench: Bench) -> None:
    """A CPU's limits and how near to them decoding comes, over batch sizes."""
    from benchmarks.gpu import limits as of_the_machine
    from benchmarks.gpu.decode import decode
    from benchmarks.gpu.driver import driving

    found: dict[str, float] = {}

    def keep(row: Row) -> None:
        if row.value is not None and row.metric in ("bandwidth", "rate"):
            found["bandwidth" if row.metric == "bandwidth" else "product"] = 1e12 * row.value
        bench.report(row)

    of_the_machine.measure(replace(bench, report=keep))
    known = replace(bench, limits=found)
    with driving(known, known.scale.large) as driver:
        for workload, batch in known.scale.decode.items():
            known.attempt(workload, "step", "ms", lambda w=workload, b=batch: decode(known, driver, w, b))  # type: ignore[misc]


def _steps(*workloads: str) -> tuple[tuple[str, str, str, str], ...]:
    return tuple((workload, "pagedserve", "step", "ms") for workload in workloads)


_MIXED = ("throughput", "tok/s")
GROUPS: dict[str, Group] = {
    "limits": Group(
        limits, 20, 60, (("copy", "device", "bandwidth", "TB/s"), ("product", "device", "rate", "TFLOP/s"))
    ),
    "bf16": Group(
        bf16,
        60,
        240,
        (
            ("start_8b", "pagedserve", "first_after_weights", "s"),
            *_steps("decode_8", "decode_32", "decode_128"),
            ("prefill_8x2k", "pagedserve", "rate", "TFLOP/s"),
            ("gap_256", "pagedserve", "gap", "ms"),
            ("mixed_8b", "pagedserve", *_MIXED),
            ("sampling_128", "pagedserve", "step_sampled", "ms"),
        ),
    ),
    "fp8": Group(fp8, 40, 90, _steps("decode_fp8_32")),
    "peer_8b": Group(peer_8b, 50, 150, (("mixed_8b", "transformers_cb", *_MIXED),)),
    "second_start": Group(second_start, 30, 90, (("start_8b", "pagedserve", "second_after_weights", "s"),)),
    "small": Group(
        small,
        40,
        120,
        (("mixed_0.6b", "pagedserve", *_MIXED), ("mixed_0.6b", "transformers_cb", *_MIXED)),
    ),
    "variants": Group(variants, 40, 120, ()),
}
"""In the order of importance: the last ones are left out first when the time is over."""
SHARE = Group(share, 0, 300, _steps("decode_1", "decode_8", "decode_32", "decode_64"))
"""The CPU's own, run by ``python -m benchmarks``."""
