"""What is decided once and kept, so that a new operator, image default or catalogue never rolls running pods.

The decision is stored as JSON on the Deployment beside the hash of what the user can see; only a change of that hash
decides again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, Literal, Self, get_args, get_origin, get_type_hints

from pagedserve_operator.fields import quantity
from pagedserve_operator.gpus.resolve import CPU, ResolvedGpu
from pagedserve_operator.shapes.model import ModelShape
from pagedserve_operator.sizing import Sizing, size, uses_graphs
from pagedserve_operator.sizing.demand import DTYPE_BYTES, MIB
from pagedserve_operator.spec import Image, InferenceService, Json, Spec

CONTRACT_VERSION: Final = 1
"""Of what operator and engine agree on; a new one decides everything again."""

Origin = Literal["spec", "computed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Everything about the engine that isn't a function of the spec alone."""

    gpu: ResolvedGpu
    sizing: Sizing
    shape_source: str
    """Where the model's shape comes from, to print."""
    image: str
    """``repository:tag`` that runs."""
    weights_mib: int
    """Of the whole model: what a pod downloads and loads."""
    use_cuda_graph: bool
    sources: Mapping[str, Origin]
    """By field of ``status.tuning``: numBlocks, maxBatchTokens, maxModelLen, useCudaGraph, dtype."""

    def to_json(self) -> str:
        """Compact and with sorted keys: equal decisions are equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """What ``to_json`` wrote; None where the text is anything else."""
        try:
            tuning = _read(cls, json.loads(text))
        except (TypeError, ValueError, KeyError, AttributeError):
            return None
        return tuning if isinstance(tuning, cls) else None


def decide(service: InferenceService, *, gpu: ResolvedGpu, shape: ModelShape, default_image: str) -> Tuning:
    """The whole decision for a resolved GPU and a known shape; raises TuningError as ``size`` does."""
    spec = service.spec
    sizing = size(shape, gpu, spec.model, spec.tuning, max_num_seqs=spec.limits.max_num_seqs)
    given = {
        "numBlocks": spec.tuning.num_blocks,
        "maxBatchTokens": spec.tuning.max_batch_tokens,
        "maxModelLen": spec.model.max_model_len,
        "useCudaGraph": spec.tuning.use_cuda_graph,
        "dtype": None if spec.model.dtype == "auto" else spec.model.dtype,
    }
    return Tuning(
        gpu=gpu,
        sizing=sizing,
        shape_source=shape.source,
        image=engine_image(spec.image, default_image),
        weights_mib=shape.parameters * DTYPE_BYTES[sizing.dtype] // MIB,
        use_cuda_graph=uses_graphs(gpu, spec.tuning),
        sources={name: "computed" if value is None else "spec" for name, value in given.items()},
    )


def engine_image(image: Image, default: str) -> str:
    """The image that runs: the user's repository and tag, the default's where one of them isn't given.

    A repository of the user's own without a tag gets the default's tag; a digest counts as a tag.
    """
    name, _, _ = default.partition("@")
    repository = name if ":" not in name.rsplit("/", 1)[-1] else name.rsplit(":", 1)[0]
    suffix = default[len(repository) :]
    return f"{image.repository or repository}{f':{image.tag}' if image.tag else suffix}"


def memory_of_pod(spec: Spec) -> int | None:
    """MiB that the user lets the pod use: the memory limit, else the request; None where neither is given."""
    text = spec.limits_of_resources.get("memory") or spec.requests.get("memory")
    return None if text is None else int(quantity(text)) // MIB


def inputs_hash(service: InferenceService) -> str:
    """Of everything that the user can see and the decision depends on; equal hashes keep the decision.

    The catalogue, the default image, replicas, autoscaling and labels aren't in it.
    """
    spec = service.spec
    model, tuning = asdict(spec.model), asdict(spec.tuning)
    for name in ("served_name", "chat_template"):
        del model[name]
    for name in ("scheduler", "safety_margin"):
        del tuning[name]
    inputs = {
        "contract": CONTRACT_VERSION,
        "model": model,
        "gpu": asdict(spec.gpu),
        "tuning": tuning,
        "image": [spec.image.repository, spec.image.tag],
        "maxNumSeqs": spec.limits.max_num_seqs,
        "memory": memory_of_pod(spec) if spec.gpu.type == CPU else None,
    }
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def status_of(tuning: Tuning) -> Json:
    """``status.tuning``."""
    sizing, gpu = tuning.sizing, tuning.gpu
    breakdown = sizing.breakdown
    return {
        "gpu": {"product": gpu.product, "memoryMiB": gpu.memory_mib, "count": gpu.count, "reason": gpu.reason},
        "dtype": sizing.dtype,
        "kvCacheDtype": sizing.kv_cache_dtype,
        "numBlocks": sizing.num_blocks,
        "maxBatchTokens": sizing.max_batch_tokens,
        "maxModelLen": sizing.max_model_len,
        "blockSize": sizing.block_size,
        "blockBytes": sizing.block_bytes,
        "useCudaGraph": tuning.use_cuda_graph,
        "sources": dict(tuning.sources),
        "breakdownMiB": {
            "weights": breakdown.weights,
            "runtime": breakdown.runtime,
            "activations": breakdown.activations,
            "graphs": breakdown.graphs,
            "cache": breakdown.cache,
            "leftOver": breakdown.left_over,
            "total": breakdown.total,
        },
        "notes": list(sizing.notes),
    }


def _read(kind: Any, value: Any) -> Any:
    """JSON as a value of the annotated type; raises TypeError, KeyError or AttributeError where it is another."""
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)
        # What a field that is new in this release defaults to is what an earlier one meant.
        known = [field for field in fields(kind) if field.name in value or field.default is MISSING]
        return kind(**{field.name: _read(types[field.name], value[field.name]) for field in known})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None and NoneType in arguments else _read(arguments[0], value)
    if origin is Literal:
        return _checked(value in arguments, value)
    if origin is tuple:
        _checked(isinstance(value, list), value)
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    if origin is not None:
        return {str(key): _read(arguments[1], item) for key, item in value.items()}
    if kind is float:
        return float(_checked(type(value) in (int, float), value))
    return _checked(type(value) is kind, value)


def _checked(holds: bool, value: Any) -> Any:
    if not holds:
        raise TypeError(value)
    return value
