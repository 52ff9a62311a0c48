"""The text of ``pagedserve-operator size``: what an engine would get, and where its memory goes."""

from __future__ import annotations

from pagedserve_operator.spec import InferenceService
from pagedserve_operator.tuning import Tuning


def report(service: InferenceService, tuning: Tuning) -> str:
    """Aligned lines: the GPU, the settings with who decided them, each device's memory, and the notes."""
    sections = [
        _table(_head(service, tuning)),
        _table([("setting", "value", "from"), *_settings(tuning)]),
        _table([("memory of each device", "MiB", "share"), *_memory(tuning)]),
        "\n".join(f"note: {note}" for note in tuning.sizing.notes),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(service: InferenceService, tuning: Tuning) -> list[tuple[str, ...]]:
    gpu = tuning.gpu
    devices = f"{gpu.count} x " if gpu.count > 1 else ""
    return [
        ("resource", str(service.key)),
        ("model", f"{service.spec.model.uri} (shape from {tuning.shape_source}; {tuning.weights_mib} MiB of weights)"),
        ("GPU", f"{devices}{gpu.product}, {gpu.memory_mib} MiB"),
        ("because", gpu.reason),
        ("image", tuning.image),
    ]


def _settings(tuning: Tuning) -> list[tuple[str, ...]]:
    sizing, sources = tuning.sizing, tuning.sources
    return [
        ("dtype", sizing.dtype, sources["dtype"]),
        ("numBlocks", str(sizing.num_blocks), sources["numBlocks"]),
        ("maxBatchTokens", str(sizing.max_batch_tokens), sources["maxBatchTokens"]),
        ("maxModelLen", str(sizing.max_model_len), sources["maxModelLen"]),
        ("useCudaGraph", str(tuning.use_cuda_graph).lower(), sources["useCudaGraph"]),
    ]


def _memory(tuning: Tuning) -> list[tuple[str, ...]]:
    sizing, breakdown = tuning.sizing, tuning.sizing.breakdown
    parts = [
        ("weights", breakdown.weights),
        ("runtime", breakdown.runtime),
        (f"activations of {sizing.max_batch_tokens} tokens", breakdown.activations),
        ("graphs", breakdown.graphs),
        (f"cache: blocks of {sizing.block_size} tokens, {sizing.block_bytes} bytes", breakdown.cache),
        ("left over", breakdown.left_over),
        ("total", breakdown.total),
    ]
    return [(name, str(size), f"{100 * size / breakdown.total:.1f} %") for name, size in parts]


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; the first to the left, of three the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = ([row[0].ljust(widths[0]), *_others(row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _others(row: tuple[str, ...], widths: list[int]) -> list[str]:
    if len(row) == 1:
        return [row[0]]
    return [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
