"""Weights on their way from safetensors files, or from a random generator, into a fused decoder on its device.

The decoder begins on the meta device. Each tensor of each file is read once, in the order of the file, and its pieces
are copied into the fused parameters, which are made when their first piece comes; on a GPU the copies go through two
pinned buffers. When a product's last piece has come, it takes the form that its device multiplies best (``Products``):
the plain one is freed before the next is made. The host holds one tensor at most at any time.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pagedserve_engine.errors import ModelLoadError
from pagedserve_engine.model.decoder import Embedding, FusedDecoder, Linear, Norm
from pagedserve_engine.model.products import Products
from pagedserve_engine.model.progress import Progress
from pagedserve_engine.model.shards import Piece, TensorPlan

STAGING_BYTES = 64 << 20

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_COMPUTED = re.compile(r"rotary_emb\.|\.masked_bias$|\.attention\.bias$")
"""Tensors of old checkpoints that are no weights."""


class WeightFiller:
    """Makes a decoder's parameters on the device as they are filled, and finishes each product once it is full."""

    def __init__(self, decoder: FusedDecoder, device: torch.device, products: Products) -> None:
        self._decoder, self._device, self._products = decoder, device, products
        self._staging = _Staging(device) if device.type == "cuda" else None
        self._waiting: Counter[str] = Counter()

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Count the pieces that each product waits for; a parameter that no piece is for is zeros."""
        targets = [piece.target for piece in pieces]
        self._waiting = Counter(target.rpartition(".")[0] for target in targets)
        for name in {name for name, _ in self._decoder.named_parameters()} - set(targets):
            self.parameter(name)

    def parameter(self, name: str) -> torch.Tensor:
        """The parameter of that name, made now (zeros) where it still is on the meta device."""
        path, _, leaf = name.rpartition(".")
        owner = self._decoder.get_submodule(path)
        found: torch.Tensor = getattr(owner, leaf)
        if found.device.type == "meta":
            multiplies = isinstance(owner, Linear) or (isinstance(owner, Embedding) and self._decoder.head is None)
            # Its values are rounded to the decoder's dtype first, whichever dtype holds them.
            dtype = self._products.weight_dtype if multiplies else self._decoder.dtype
            found = torch.zeros(found.shape, dtype=dtype, device=self._device)
            setattr(owner, leaf, nn.Parameter(found, requires_grad=False))
        return found

    def put(self, piece: Piece, values: torch.Tensor) -> None:
        """Copy ``values``, that piece of a checkpoint, to its place."""
        target = self.parameter(piece.target)[piece.row : piece.row + len(values)]
        if self._staging is not None:
            self._staging.copy(values, target, through=self._decoder.dtype)
        else:
            target.copy_(values.to(self._decoder.dtype))
        self.arrived(piece.target)

    def arrived(self, name: str) -> None:
        """One of the pieces of the parameter ``name`` is there: a product that has all is finished."""
        path = name.rpartition(".")[0]
        self._waiting[path] -= 1
        if self._waiting[path] == 0:
            self._finish(path)

    def _finish(self, path: str) -> None:
        decoder, products = self._decoder, self._products
        full = decoder.get_submodule(path)
        if isinstance(full, Embedding) and decoder.head is None and products.tied is not None:
            decoder.embedding, decoder.head = products.tied(full.weight)
        make = products.output if full is decoder.head else products.layer
        if isinstance(full, Linear) and make is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, make(full.weight, full.bias))


class _Staging:
    """Two pinned buffers through which host memory reaches a GPU while the next part is being read."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._turn = 0

    def copy(self, values: torch.Tensor, target: torch.Tensor, *, through: torch.dtype) -> None:
        """Copy to ``target`` of the same shape, rounded to ``through`` on the way."""
        rows = max(1, STAGING_BYTES // max(1, values[:1].numel() * through.itemsize))
        for start in range(0, len(values), rows):
            part = values[start : start + rows]
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            copied.synchronize()
            staged = buffer[: part.numel() * through.itemsize].view(through).view(part.shape)
            staged.copy_(part)
            target[start : start + rows].copy_(staged, non_blocking=True)
            copied.record(self._stream)
            self._turn = 1 - self._turn


def load_weights(
    filler: WeightFiller, plans: Mapping[str, TensorPlan], files: Sequence[Path], *, progress: Progress, what: str
) -> None:
    """Fill a decoder from ``files``; raises ModelLoadError naming a tensor that is missing, strange or wrong."""
    stored = [tensor for file in files for tensor in _catalogue(file)]
    matched = _match(stored, plans)
    filler.expect(piece for plan in plans.values() for piece in plan.pieces)
    with progress(total=sum(t.bytes for t in matched), desc=what, unit="B", unit_scale=True, leave=False) as bar:
        for file in files:
            mine = [(tensor, plans[planned]) for tensor, planned in matched.items() if tensor.file == file]
            for done in _read_file(filler, file, mine):
                bar.update(done)


def _read_file(filler: WeightFiller, file: Path, tensors: Sequence[tuple[_Stored, TensorPlan]]) -> Iterator[int]:
    """Put the pieces of a file's tensors in their places; the bytes of each that is done."""
    with safe_open(file, framework="pt") as opened:
        for tensor, plan in tensors:
            for piece in plan.pieces:
                filler.put(piece, _read(opened, tensor.name, piece))
            yield tensor.bytes


def fill_random(filler: WeightFiller, decoder: FusedDecoder, *, deviation: float, seed: int) -> None:
    """Random weights of that standard ``deviation``, made on the device; norms change nothing, biases are zero."""
    generator = torch.Generator(filler.parameter("norm.weight").device).manual_seed(seed)
    names = [name for name, _ in decoder.named_parameters()]
    filler.expect(Piece(name, 0, (0, 0), None) for name in names)
    for name in names:
        owner = decoder.get_submodule(name.rpartition(".")[0])
        parameter = filler.parameter(name)
        if isinstance(owner, Norm):
            parameter.fill_(1.0 - decoder.recipe.norm_offset)
        elif parameter.ndim > 1:
            parameter.normal_(0.0, deviation, generator=generator)
            parameter.copy_(parameter.to(decoder.dtype))
        filler.arrived(name)


def find_files(folder: Path) -> list[Path]:
    """The folder's safetensors; says which file is missing or cut short before it is needed."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{index} can't be read: download the model again", param="model") from error
    if not files and not any(folder.glob("*.bin")):
        raise ModelLoadError(f"{folder} holds no weights: *.safetensors files belong beside config.json", param="model")
    for file in files:
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing: download the model again", param="model")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            message = f"{file} is cut short or damaged ({error}): download the model again"
            raise ModelLoadError(message, param="model") from error
    return files


# --- which tensor of which file is which -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as a file has it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    bytes: int


def _catalogue(file: Path) -> list[_Stored]:
    """What a file holds, in the order of its bytes, so that a disk is read once from end to end."""
    with safe_open(file, framework="pt") as opened:
        views = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
        shapes = [(name, tuple(view.get_shape()), view.get_dtype()) for name, view in views]
    return [_Stored(file, name, shape, math.prod(shape) * _DTYPE_BYTES.get(dtype, 1)) for name, shape, dtype in shapes]


_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def _match(stored: Sequence[_Stored], plans: Mapping[str, TensorPlan]) -> dict[_Stored, str]:
    """The planned tensor of each that is there; raises ModelLoadError unless all are, in shape, and no others."""
    prefix = _prefix(tensor.name for tensor in stored)
    matched: dict[_Stored, str] = {}
    for tensor in stored:
        local = _HEAD if tensor.name.endswith(_HEAD) else tensor.name.removeprefix(prefix)
        if local in plans:
            _check_shape(tensor, plans[local].shape)
            matched[tensor] = local
        elif tensor.name.startswith(prefix) and local != _HEAD and not _COMPUTED.search(tensor.name):
            raise ModelLoadError(
                f"{tensor.file} holds the tensor {tensor.name}, which its config.json does not ask for: give the "
                "folder whose configuration fits its weights, or set DECODER=transformers, which leaves it out",
                param="model",
            )
    refuse_missing(stored[0].file.parent if stored else "the folder", plans.keys() - set(matched.values()))
    return matched


def refuse_missing(folder: Path | str, missing: Collection[str]) -> None:
    """Raise ModelLoadError where tensors are ``missing`` from the weights in ``folder``."""
    if missing:
        raise ModelLoadError(
            f"{folder}: the weights lack {len(missing)} tensors that the configuration asks for, {min(missing)} first: "
            "download the model again, or give the folder that fits its config.json",
            param="model",
        )


def _prefix(names: Iterable[str]) -> str:
    """What stands before the decoder's names: ``model.``, nothing, or the place of a larger model's text part."""
    found = [name.removesuffix(_EMBEDDING) for name in names if name.endswith(_EMBEDDING)]
    return found[0] if found else "model."


def _check_shape(tensor: _Stored, wanted: tuple[int, ...]) -> None:
    if tensor.shape != wanted:
        raise ModelLoadError(
            f"{tensor.file}: the tensor {tensor.name} has the shape {list(tensor.shape)}, its config.json asks for "
            f"{list(wanted)}: give the folder whose configuration fits its weights",
            param="model",
        )


def _read(opened: Any, name: str, piece: Piece) -> torch.Tensor:
    view = opened.get_slice(name)
    rows = slice(*piece.rows)
    values: torch.Tensor = view[rows] if piece.columns is None else view[rows, slice(*piece.columns)]
    return values
