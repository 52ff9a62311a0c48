"""How much is measured: the real shapes on a GPU, or tiny ones that show on a CPU that every row runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parents[1] / "shapes"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of every row; a row's name says its size on a GPU, whatever the scale."""

    large: Path = SHAPES / "llama-3.1-8b" / "config.json"
    small: Path = SHAPES / "qwen3-0.6b" / "config.json"
    dtype: str = "bfloat16"
    decode: Mapping[str, int] = field(default_factory=lambda: {"decode_8": 8, "decode_32": 32, "decode_128": 128})
    """Rows of the decoding steps, by workload."""
    context: int = 1024
    """Tokens that a decoding row holds half way through its measurement."""
    windows: int = 5
    """Samples of a step's time, each the mean over ``steps`` steps."""
    steps: int = 16
    prefill: tuple[int, int] = (8, 2048)
    """Prompts and their tokens."""
    gap_batch: int = 256
    gap_steps: int = 24
    mixed: int = 256
    mixed_peer: int = 64
    mixed_tokens: tuple[int, int] = (100, 1024)
    """Fewest and most tokens of a prompt, and of an output."""
    copy_bytes: int = 4 * GIB
    product: int = 8192
    repeats: int = 20
    """Copies and products, of which the best counts."""
    settings: Mapping[str, Any] = field(
        default_factory=lambda: {
            "num_blocks": "auto",
            "max_batch_tokens": 8192,
            "max_model_len": 8192,
            "max_num_seqs": 256,
            "use_cuda_graph": True,
        }
    )
    """Of the engine: what the operator sets on an H100."""


FULL = Scale()
TINY = Scale(
    large=SHAPES / "tiny" / "config.json",
    small=SHAPES / "tiny" / "config.json",
    dtype="float32",
    decode={"decode_8": 2, "decode_32": 3, "decode_128": 4},
    context=24,
    windows=2,
    steps=2,
    prefill=(2, 40),
    gap_batch=4,
    gap_steps=3,
    mixed=6,
    mixed_peer=3,
    mixed_tokens=(4, 12),
    copy_bytes=1 << 20,
    product=64,
    repeats=2,
    settings={
        "num_blocks": 128,
        "block_size": 8,
        "max_batch_tokens": 64,
        "max_num_seqs": 8,
        "num_threads": 1,
        "device": "cpu",
    },
)
CPU = Scale(
    large=SHAPES / "smollm2-135m" / "config.json",
    small=SHAPES / "smollm2-135m" / "config.json",
    decode={"decode_1": 1, "decode_8": 8, "decode_32": 32, "decode_64": 64},
    context=256,
    steps=4,
    copy_bytes=GIB // 2,
    product=1024,
    settings={"num_blocks": 1024, "max_num_seqs": 64, "max_model_len": 2048},
)
"""What a CPU's share of its own limit is measured with, in ``make bench``."""
SCALES = {"full": FULL, "tiny": TINY, "cpu": CPU}
