"""The engine's environment: one variable for each field that says something, then what the user adds.

What isn't set is left to the engine. MAX_MODEL_LEN is passed only where the user gives it: an explicit length that
doesn't fit ends the engine, and ours is an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pagedserve_operator.desired.source import ModelSource
from pagedserve_operator.desired.storage import (
    API_KEYS_FILE,
    API_KEYS_PATH,
    CACHE_PATH,
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_PATH,
    HF_TOKEN_FILE,
    HF_TOKEN_PATH,
)
from pagedserve_operator.errors import SpecError
from pagedserve_operator.spec import InferenceService, Json, Spec
from pagedserve_operator.tuning import Tuning

RESERVED: Final = {
    "MODEL": "spec.model.uri",
    "MODEL_REVISION": "spec.model.revision",
    "SERVED_MODEL_NAME": "spec.model.servedName",
    "DTYPE": "spec.model.dtype",
    "MAX_MODEL_LEN": "spec.model.maxModelLen",
    "QUANTIZATION": "spec.model.quantization",
    "CHAT_TEMPLATE": "spec.model.chatTemplate",
    "DEVICE": "spec.gpu.type",
    "TENSOR_PARALLEL_SIZE": "spec.gpu.count",
    "CUDA_VISIBLE_DEVICES": "spec.gpu.count",
    "NUM_BLOCKS": "spec.tuning.numBlocks",
    "MAX_BATCH_TOKENS": "spec.tuning.maxBatchTokens",
    "BLOCK_SIZE": "spec.tuning.blockSize",
    "SAFETY_MARGIN": "spec.tuning.safetyMargin",
    "MAX_MEMORY_PERCENT": "spec.tuning.maxMemoryPercent",
    "SCHEDULER": "spec.tuning.scheduler",
    "USE_CUDA_GRAPH": "spec.tuning.useCudaGraph",
    "KV_CACHE_DTYPE": "spec.tuning.kvCacheDtype",
    "MAX_NUM_SEQS": "spec.limits.maxNumSeqs",
    "MAX_QUEUE": "spec.limits.maxQueue",
    "REQUEST_TIMEOUT_SECONDS": "spec.limits.requestTimeoutSeconds",
    "DRAIN_SECONDS": "spec.lifecycle.drainSeconds",
    "API_KEY_FILE": "spec.auth.apiKeysSecretRef",
    "HF_TOKEN_FILE": "spec.auth.hfTokenSecretRef",
    "PORT": "spec.service.port",
}
"""Variables that have a field of their own, which ``spec.env`` may not contradict."""


def environment(service: InferenceService, tuning: Tuning, source: ModelSource) -> list[Json]:
    """The engine container's ``env``; raises SpecError for a variable that has a field or that comes twice."""
    theirs = _checked(service.spec.env)
    given = {row["name"] for row in theirs}
    ours = dict(_settings(service.spec, tuning, source))
    return [*({"name": name, "value": value} for name, value in ours.items() if name not in given), *theirs]


def _checked(rows: tuple[Json, ...]) -> tuple[Json, ...]:
    seen: set[str] = set()
    for index, row in enumerate(rows):
        name = row.get("name")
        field = f"spec.env[{index}]"
        if not isinstance(name, str) or not name:
            raise SpecError(f"{field}.name", "is missing: give the variable's name")
        if name in RESERVED:
            raise SpecError(field, f"{name} is the operator's: set {RESERVED[name]} instead")
        if name in seen:
            raise SpecError(field, f"{name} is there twice: keep one")
        seen.add(name)
    return rows


def _settings(spec: Spec, tuning: Tuning, source: ModelSource) -> Iterator[tuple[str, str]]:
    model, sizing = spec.model, tuning.sizing
    yield "MODEL", source.model
    yield from _given("MODEL_REVISION", model.revision)
    yield from _given("SERVED_MODEL_NAME", model.served_name)
    yield "DTYPE", sizing.dtype
    yield from _given("MAX_MODEL_LEN", model.max_model_len)
    yield from _given("QUANTIZATION", None if model.quantization == "none" else model.quantization)
    yield "KV_CACHE_DTYPE", sizing.kv_cache_dtype
    if model.chat_template is not None:
        yield "CHAT_TEMPLATE", f"{CHAT_TEMPLATE_PATH}/{CHAT_TEMPLATE_FILE}"
    # A GPU node may show its GPUs to every container.
    yield from _given("DEVICE", "cpu" if tuning.gpu.is_cpu else None)
    yield "TENSOR_PARALLEL_SIZE", str(tuning.gpu.count)
    yield from _tuned(spec, tuning)
    yield from _given("MAX_NUM_SEQS", spec.limits.max_num_seqs)
    yield from _given("MAX_QUEUE", spec.limits.max_queue)
    yield from _given("REQUEST_TIMEOUT_SECONDS", spec.limits.request_timeout_seconds)
    yield "DRAIN_SECONDS", str(spec.lifecycle.drain_seconds)
    if spec.api_keys is not None:
        yield "API_KEY_FILE", f"{API_KEYS_PATH}/{API_KEYS_FILE}"
    if spec.hf_token is not None:
        yield "HF_TOKEN_FILE", f"{HF_TOKEN_PATH}/{HF_TOKEN_FILE}"
    yield "LOG_FORMAT", "json"
    # The root file system is read-only: everything that is written goes to a volume.
    yield "HOME", "/tmp"
    yield "HF_HOME", f"{CACHE_PATH}/huggingface"
    yield "CACHE_DIR", f"{CACHE_PATH}/models"


def _tuned(spec: Spec, tuning: Tuning) -> Iterator[tuple[str, str]]:
    yield "NUM_BLOCKS", str(tuning.sizing.num_blocks)
    yield "MAX_BATCH_TOKENS", str(tuning.sizing.max_batch_tokens)
    yield "BLOCK_SIZE", str(tuning.sizing.block_size)
    yield "SAFETY_MARGIN", f"{spec.tuning.safety_margin:g}"
    yield "MAX_MEMORY_PERCENT", f"{spec.tuning.max_memory_percent:g}"
    yield "SCHEDULER", spec.tuning.scheduler
    yield "USE_CUDA_GRAPH", "true" if tuning.use_cuda_graph else "false"


def _given(name: str, value: str | int | None) -> Iterator[tuple[str, str]]:
    if value is not None:
        yield name, str(value)
