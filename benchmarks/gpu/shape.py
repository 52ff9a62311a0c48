"""What a model's shape costs: bytes read in a decoding step, operations of a prefill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PREFILL_FORMULA = (
    "FLOP = 2 · (layers · (hidden · (heads + 2 · kv_heads) · head_dim + heads · head_dim · hidden"
    " + 3 · hidden · intermediate)) · tokens + 2 · hidden · vocabulary · prompts"
    " + 4 · layers · heads · head_dim · prompts · n · (n + 1) / 2, prompts of n tokens each"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense decoder with gated products, as its config.json describes it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def read(cls, path: Path) -> Shape:
        """From a config.json."""
        config = json.loads(path.read_text())
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the products of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Numbers in the product that gives logits; the input embedding is looked up, not read."""
        return self.hidden * self.vocabulary

    def weight_bytes(self, *, layer_bytes: float = 2, head_bytes: float = 2) -> float:
        """Bytes of weights that every step reads, by the size of their numbers."""
        return layer_bytes * self.layer_weights + head_bytes * self.head_weights

    def cache_bytes(self, *, number_bytes: float = 2) -> float:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * number_bytes

    def prefill_flop(self, prompts: int, tokens: int) -> float:
        """Operations of ``prompts`` prompts of ``tokens`` tokens each; see ``PREFILL_FORMULA``."""
        linear = 2 * self.layer_weights * prompts * tokens + 2 * self.head_weights * prompts
        attention = 4 * self.layers * self.heads * self.head_dim * prompts * tokens * (tokens + 1) / 2
        return linear + attention
