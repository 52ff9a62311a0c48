"""Services, nodes and shapes for the tests of tuning: each builder has what every case needs and takes the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pagedserve_operator.gpus.resolve import ResolvedGpu, resolve
from pagedserve_operator.parsing import parse
from pagedserve_operator.shapes import ModelShape, from_config
from pagedserve_operator.sizing import Sizing, size
from pagedserve_operator.spec import Gpu, InferenceService

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "model_shapes.json").read_text())
LLAMA = "Llama-3.1-8B"


def service(*, uri: str = f"hf://meta-llama/{LLAMA}", **spec: Any) -> InferenceService:
    """A parsed resource; ``model`` is merged into the URI."""
    model = {"uri": uri, **spec.pop("model", {})}
    return parse({"metadata": {"name": "llama", "namespace": "chat", "uid": "u1"}, "spec": {"model": model, **spec}})


def gpu_spec(**gpu: Any) -> Gpu:
    """``spec.gpu``."""
    return service(gpu=gpu).spec.gpu


def resolved(name: str, **gpu: Any) -> ResolvedGpu:
    """A catalogue's GPU, no node known."""
    return resolve(gpu_spec(type=name, **gpu), None, min_compute_capability=(7, 0))


def shape(name: str = LLAMA) -> ModelShape:
    """A golden model's shape."""
    return from_config(GOLDEN[name]["config"])


def sized(gpu: ResolvedGpu, model_shape: ModelShape | None = None, **spec: Any) -> Sizing:
    """The sizing of a service with this spec; blocks of 16 tokens unless it says otherwise."""
    tuning = {"blockSize": 16, **spec.pop("tuning", {})}
    parsed = service(tuning=tuning, **spec).spec
    return size(model_shape or shape(), gpu, parsed.model, parsed.tuning)


def node(name: str = "n1", *, labels: dict[str, str] | None = None, **allocatable: int) -> dict[str, Any]:
    """A ready node; keywords are resources without their ``nvidia.com/``: ``gpu=8``, ``mig_1g_10gb=7``."""
    names = {
        key: "nvidia.com/" + (key if key == "gpu" else "gpu.shared" if key == "shared" else _mig(key))
        for key in allocatable
    }
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "8", **{names[key]: str(count) for key, count in allocatable.items()}},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def _mig(key: str) -> str:
    _, compute, memory = key.split("_")
    return f"mig-{compute}.{memory}"


def gfd(product: str, memory: int | None = None, **more: str) -> dict[str, str]:
    """Labels of GPU feature discovery; keywords are more of ``nvidia.com/gpu.…``."""
    sizes = {} if memory is None else {"memory": str(memory)}
    return {f"nvidia.com/gpu.{key}": value for key, value in {"product": product, **sizes, **more}.items()}


def pod(
    node_name: str | None, gpus: int, *, phase: str = "Running", resource: str = "nvidia.com/gpu"
) -> dict[str, Any]:
    """A pod that requests GPUs."""
    spec = {"containers": [{"name": "c", "resources": {"limits": {resource: str(gpus)}}}]}
    return {"spec": {**spec, **({"nodeName": node_name} if node_name else {})}, "status": {"phase": phase}}
