"""A model's shape, as much of it as sizing needs, and the user's own statement of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from pagedserve_operator.spec import Architecture

FROM_SPEC: Final = "spec.model.architecture"
FROM_CONFIG: Final = "config.json"
FROM_NAME: Final = "the model's name"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Counts are of the whole model, before tensor parallelism; lengths in tokens."""

    layer_types: tuple[str, ...]
    """"full" or "sliding" for each layer."""
    sliding_window: int | None
    """Tokens that a sliding layer sees; None where no layer is sliding."""
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    active_parameters: int
    """Those that one token uses: less than all in a mixture of experts."""
    wide_parameters: int
    """Those that no quantisation makes smaller: embeddings, the output layer, and experts."""
    max_position_embeddings: int | None
    """The longest sequence; None where nothing tells."""
    source: str
    """Where the shape comes from, to print."""

    @property
    def layers(self) -> int:
        """Of all attention types."""
        return len(self.layer_types)

    @property
    def layers_per_group(self) -> int:
        """Layers that share a block: groups of equally many, each of one attention type."""
        return math.gcd(self.layer_types.count("full"), self.layer_types.count("sliding"))


def wide_at_most(parameters: int, active_parameters: int, *, vocab_size: int, hidden_size: int) -> int:
    """``wide_parameters`` where only totals are known: all of a mixture of experts, else two tables of embeddings."""
    return parameters if active_parameters < parameters else max(0, min(parameters, 2 * vocab_size * hidden_size))


def from_architecture(architecture: Architecture) -> ModelShape:
    """The shape that the user states."""
    layer_types = architecture.layer_types or ("full",) * architecture.layers
    parameters, active = architecture.parameters, architecture.active_parameters or architecture.parameters
    vocab, hidden = architecture.vocab_size, architecture.hidden_size
    return ModelShape(
        layer_types=layer_types,
        sliding_window=architecture.sliding_window if "sliding" in layer_types else None,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        vocab_size=architecture.vocab_size,
        parameters=parameters,
        active_parameters=active,
        wide_parameters=wide_at_most(parameters, active, vocab_size=vocab, hidden_size=hidden),
        max_position_embeddings=architecture.max_position_embeddings,
        source=FROM_SPEC,
    )
