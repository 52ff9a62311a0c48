"""The last resort: the number of parameters that most models carry in their names, and a typical shape of that size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.errors import ModelShapeUnknown
from pagedserve_operator.shapes.model import FROM_NAME, ModelShape, wide_at_most

_NUMBER: Final = r"\d{1,6}(?:\.\d{1,6})?"
"""Bounded, so that no name makes a number that can't be reckoned with."""
_SIZE: Final = re.compile(
    rf"(?<![\w.])(?:(\d{{1,6}})x)?({_NUMBER})([bm])(?![a-z0-9])|(?<=[a-z])(\d{{1,6}})b(?![a-z0-9])", re.I
)
"""8B, 0.6b, 135M, 8x7B; of names without a dash before it (falcon7b) whole billions only."""
_ACTIVE: Final = re.compile(rf"(?<![a-z0-9])a({_NUMBER})b(?![a-z0-9])", re.I)
"""Active parameters of a mixture of experts: the A3B of 30B-A3B."""
_SHARED_PART: Final = 0.83
"""Of 8x7B: attention and embeddings aren't multiplied, so that it has 46.7 billion parameters, not 56."""
_EXPERTS_USED: Final = 2
_LONGEST: Final = 32768
"""Tokens: a guess that most models of today reach; the engine reads the true length."""


@dataclass(frozen=True, slots=True)
class _Typical:
    """A widespread decoder of this size, with grouped keys and values."""

    parameters: float
    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


_TYPICAL: Final = (
    _Typical(135e6, 30, 576, 3, 64, 1536, 49152),
    _Typical(360e6, 32, 960, 5, 64, 2560, 49152),
    _Typical(0.6e9, 28, 1024, 8, 128, 3072, 151936),
    _Typical(1.2e9, 16, 2048, 8, 64, 8192, 128256),
    _Typical(1.7e9, 28, 2048, 8, 128, 6144, 151936),
    _Typical(3.2e9, 28, 3072, 8, 128, 8192, 128256),
    _Typical(8.0e9, 32, 4096, 8, 128, 14336, 128256),
    _Typical(14.8e9, 40, 5120, 8, 128, 17408, 151936),
    _Typical(32.8e9, 64, 5120, 8, 128, 25600, 151936),
    _Typical(70.6e9, 80, 8192, 8, 128, 28672, 128256),
    _Typical(122e9, 88, 12288, 8, 128, 28672, 32768),
    _Typical(405e9, 126, 16384, 8, 128, 53248, 128256),
)


def from_name(uri: str) -> ModelShape:
    """A typical shape for the number of parameters in the model's name; raises ModelShapeUnknown where it has none."""
    # The model's own name before the folders or the organisation that it is in.
    parts = [part for part in re.split(r"[/:]", uri) if part]
    for part in reversed(parts):
        size = _SIZE.search(part)
        if size is not None:
            return _shape(*_parameters(size, part))
    raise ModelShapeUnknown(
        f"spec.model.uri: nothing tells how big {uri} is: no config.json could be read, and the name states no number "
        "of parameters, such as 8B; state the shape in spec.model.architecture"
    )


def _parameters(size: re.Match[str], name: str) -> tuple[int, int]:
    """(All, those one token uses)."""
    experts, number = size[1], float(size[2] or size[4])
    count = number * (1e6 if (size[3] or "b").lower() == "m" else 1e9)
    if experts and int(experts) > _EXPERTS_USED:
        return round(int(experts) * count * _SHARED_PART), round(_EXPERTS_USED * count * _SHARED_PART)
    active = _ACTIVE.search(name)
    return round(count), min(round(count), round(float(active[1]) * 1e9)) if active else round(count)


def _shape(parameters: int, active: int) -> ModelShape:
    if not 1_000_000 <= parameters <= 10**13:
        raise ModelShapeUnknown(
            f"spec.model.uri: its name states {parameters:,} parameters, which can't be; "
            "state the shape in spec.model.architecture"
        )
    typical = min(_TYPICAL, key=lambda shape: abs(math.log(shape.parameters / parameters)))
    return ModelShape(
        layer_types=("full",) * typical.layers,
        sliding_window=None,
        kv_heads=typical.kv_heads,
        head_dim=typical.head_dim,
        hidden_size=typical.hidden_size,
        intermediate_size=typical.intermediate_size,
        vocab_size=typical.vocab_size,
        parameters=parameters,
        active_parameters=max(1, active),
        wide_parameters=wide_at_most(
            parameters, active, vocab_size=typical.vocab_size, hidden_size=typical.hidden_size
        ),
        max_position_embeddings=_LONGEST,
        source=FROM_NAME,
    )
