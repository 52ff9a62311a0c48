"""What a model takes of each device's memory, part by part: the constants and formulas that sizing rests on.

The engine measures the real parts at start and lowers its numbers where these are too bold. They are fitted to a 8B
model in bfloat16, where runtime, activations and graphs together are known to take 2.3 GiB and 5 % of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.shapes.model import ModelShape
from pagedserve_operator.sizing.blocks import SHORTEST_SEQUENCE, UNBOUNDED, Blocks
from pagedserve_operator.spec import TuningOverrides

MIB: Final = 1 << 20
GIB: Final = 1 << 30
DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
CACHE_BYTES: Final = {**DTYPE_BYTES, "fp8": 1}
QUANTIZATIONS: Final = ("none", "fp8", "int8")
FIRST_WITH_FLOAT8: Final = (8, 9)
"""Compute capability that multiplies 8-bit floats; older cards widen them."""

WEIGHTS_OVERHEAD: Final = 1.02
"""Norms, biases, rotary tables and the allocator's rounding, beside the counted parameters."""
RUNTIME_BYTES: Final = 1539 * MIB
"""CUDA context, libraries and their workspaces, static buffers."""
RUNTIME_OF_WEIGHTS: Final = 0.05
"""Fragmentation grows with what has been loaded."""
COMMUNICATION_BYTES: Final = 256 * MIB
"""Buffers between the devices of one engine, where there are several."""
GRAPHS_BYTES: Final = 512 * MIB
"""Captured graphs of the decode sizes, where they are on."""
CPU_RUNTIME_BYTES: Final = 1024 * MIB
"""Interpreter, libraries and the server."""
CPU_CACHE_SHARE: Final = 0.25
"""Of a container's memory, at most, for the cache: the rest of what is free is for the host's own work."""
LOGITS_BYTES: Final = 8
"""Of each row and vocabulary entry: scores in float32 and the sampler's copy."""

SCALE_BYTES: Final = 4
"""Of each output of a quantised layer."""
CPU_WIDENED_BYTES: Final = {"fp8": 8, "int8": 4}
"""Of each quantised weight while a CPU multiplies with it."""

SMALLEST_BATCH: Final = 512
LARGEST_BATCH: Final = 16384
DEFAULT_NUM_SEQS: Final = 256
"""The engine's MAX_NUM_SEQS where none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One model on one kind of GPU; sizes in bytes, of one device."""

    shape: ModelShape
    gpu: ResolvedGpu
    overrides: TuningOverrides
    dtype: str
    kv_cache_dtype: str
    quantization: str
    max_num_seqs: int
    use_cuda_graph: bool

    @property
    def blocks(self) -> Blocks:
        """The cache's arithmetic."""
        return Blocks(
            shape=self.shape,
            block_size=self.overrides.block_size,
            dtype_bytes=CACHE_BYTES[self.kv_cache_dtype],
            devices=self.gpu.count,
        )

    @property
    def budget(self) -> int:
        """What the engine may take."""
        return int(self.gpu.memory_mib * MIB * self.overrides.max_memory_percent)

    @property
    def weights(self) -> int:
        """A device's part of them."""
        wide, small = self.shape.parameters, 0
        if self.quantization != "none":
            wide = min(wide, self.shape.wide_parameters)
            small = self.shape.parameters - wide
        # A quantised layer has a byte for each weight, and about as many weights for each output as the stream is wide.
        whole = wide * DTYPE_BYTES[self.dtype] + small + small * SCALE_BYTES // max(1, self.shape.hidden_size)
        return int(whole * WEIGHTS_OVERHEAD / self.gpu.count)

    @property
    def runtime(self) -> int:
        """What is there before the first step."""
        if self.gpu.is_cpu:
            return CPU_RUNTIME_BYTES
        between = COMMUNICATION_BYTES if self.gpu.count > 1 else 0
        return RUNTIME_BYTES + between + int(RUNTIME_OF_WEIGHTS * self.weights)

    @property
    def graphs(self) -> int:
        """Nothing where they are off."""
        return GRAPHS_BYTES if self.use_cuda_graph else 0

    def activations(self, batch_tokens: int) -> int:
        """Of a step: gate and up projection, residual and its norm for each token, and the sampled rows' scores."""
        per_token = 2 * self.shape.intermediate_size // self.gpu.count + 2 * self.shape.hidden_size
        rows = min(self.max_num_seqs, batch_tokens)
        tokens = batch_tokens * per_token * DTYPE_BYTES[self.dtype]
        return tokens + rows * self.shape.vocab_size * LOGITS_BYTES + self._widened

    @property
    def _widened(self) -> int:
        """The largest layer, both halves of the gated product, where its weights are widened to be multiplied."""
        has_float8 = not self.gpu.is_cpu and self.gpu.compute_capability >= FIRST_WITH_FLOAT8
        if self.quantization == "none" or (self.quantization == "fp8" and has_float8):
            return 0
        each = CPU_WIDENED_BYTES[self.quantization] if self.gpu.is_cpu else DTYPE_BYTES[self.dtype]
        return 2 * self.shape.intermediate_size * self.shape.hidden_size // self.gpu.count * each

    def room(self, batch_tokens: int) -> int:
        """What such steps leave for the cache; negative where they don't fit themselves."""
        return self.budget - self.weights - self.runtime - self.graphs - self.activations(batch_tokens)

    def cache_limit(self, wanted: int | None, batch_tokens: int) -> int | None:
        """Blocks beyond which the cache takes what others need; None on a GPU, which does nothing else.

        One sequence of the length that the user has given (tokens) is always allowed.
        """
        if not self.gpu.is_cpu:
            return None
        blocks, length = self.blocks, wanted or self.shape.max_position_embeddings or UNBOUNDED
        share = int(self.gpu.memory_mib * MIB * CPU_CACHE_SHARE) // blocks.block_bytes
        in_use = 1 + self.max_num_seqs * (blocks.needed(length, batch_tokens) - 1)
        return max(blocks.needed(wanted or SHORTEST_SEQUENCE, batch_tokens), min(share, in_use))

    def shortage(self, length: int) -> int:
        """Bytes that one sequence of ``length`` tokens lacks in the smallest steps; negative or 0 where it fits."""
        batch = min(SMALLEST_BATCH, self.overrides.max_batch_tokens or SMALLEST_BATCH)
        return self.blocks.needed(length, batch) * self.blocks.block_bytes - self.room(batch)
