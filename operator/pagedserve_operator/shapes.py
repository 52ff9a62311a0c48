"""A model's shape, as much of it as sizing needs: stated by the user, read from config.json, or guessed by its name."""

from __future__ import annotations

from dataclasses import dataclass


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
    max_position_embeddings: int | None
    """The longest sequence; None where nothing tells."""
    source: str
    """Where the shape comes from, to print: ``spec.model.architecture``, ``config.json``, ``the name``."""

    @property
    def layers(self) -> int:
        """Of all attention types."""
        return len(self.layer_types)
