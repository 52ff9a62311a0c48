"""Resources, decisions and a small server-side apply for tests of the children that need no API server."""

from __future__ import annotations

import copy
import json
from typing import Any

from pagedserve_operator.gpus.resolve import ResolvedGpu
from pagedserve_operator.names import API_VERSION, KIND
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import Apply, ChildKey, Plan
from pagedserve_operator.sizing import Breakdown, Sizing
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.tuning import Tuning

UID = "5a0c2d1e-0000-4000-8000-000000000001"

_KEYS = {
    "ownerReferences": ("uid",),
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
_PORT_KEYS = {"containers": ("containerPort", "protocol"), "Service": ("port", "protocol")}


def resource(spec: Json | None = None, *, name: str = "chat", uid: str = UID, namespace: str = "models") -> Json:
    """An InferenceService as the API server has it."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": uid, "generation": 1},
        "spec": {"model": {"uri": "hf://example/model-8b"}, **(spec or {})},
    }


def service(spec: Json | None = None, **metadata: str) -> InferenceService:
    return parse(resource(spec, **metadata))


def gpu_tuning(*, count: int = 1, weights_mib: int = 15_300, image: str = "pagedserve/engine:0.1.0") -> Tuning:
    """As for an 8B model on an L4."""
    gpu = ResolvedGpu(
        product="NVIDIA-L4",
        memory_mib=23034,
        count=count,
        tflops=121.0,
        bandwidth_gbs=300,
        compute_capability=(8, 9),
        resource="nvidia.com/gpu",
        pin={"nvidia.com/gpu.product": ("NVIDIA-L4",)},
        reason="spec.gpu.type names NVIDIA-L4",
        source="spec",
    )
    parts = Breakdown(
        weights=15_606, runtime=1024, activations=700, graphs=600, cache=2800, left_over=2304, total=23_034
    )
    return _tuning(gpu, parts, dtype="bfloat16", weights_mib=weights_mib, image=image, use_cuda_graph=True)


def cpu_tuning(*, weights_mib: int = 520) -> Tuning:
    """As for a small model on a CPU."""
    gpu = ResolvedGpu(
        product="cpu",
        memory_mib=4096,
        count=1,
        tflops=1.0,
        bandwidth_gbs=40,
        compute_capability=(0, 0),
        resource=None,
        pin={},
        reason="spec.gpu.type is cpu",
        source="spec",
    )
    parts = Breakdown(weights=530, runtime=512, activations=100, graphs=0, cache=512, left_over=2442, total=4096)
    return _tuning(gpu, parts, dtype="float32", weights_mib=weights_mib, image="pagedserve/engine:0.1.0")


def _tuning(
    gpu: ResolvedGpu, parts: Breakdown, *, dtype: str, weights_mib: int, image: str, use_cuda_graph: bool = False
) -> Tuning:
    sizing = Sizing(
        dtype=dtype,
        kv_cache_dtype=dtype,
        num_blocks=716,
        max_batch_tokens=2048,
        max_model_len=8192,
        block_size=32,
        block_bytes=4_194_304,
        breakdown=parts,
        notes=(),
    )
    return Tuning(
        gpu=gpu,
        sizing=sizing,
        shape_source="config.json",
        image=image,
        weights_mib=weights_mib,
        use_cuda_graph=use_cuda_graph,
        sources=dict.fromkeys(("numBlocks", "maxBatchTokens", "maxModelLen", "useCudaGraph", "dtype"), "computed"),
    )


class FakeServer:
    """Objects by kind and name, with server-side apply, managed fields and resource versions; no defaults."""

    def __init__(self) -> None:
        self.objects: dict[ChildKey, Json] = {}
        self._version = 0

    def observe(self, keys: tuple[ChildKey, ...]) -> dict[ChildKey, Json | None]:
        return {key: copy.deepcopy(self.objects.get(key)) for key in keys}

    def execute(self, plan: Plan) -> None:
        for delete in plan.deletes:
            assert self.objects[delete.kind, delete.name]["metadata"]["uid"] == delete.uid
            del self.objects[delete.kind, delete.name]
        for apply in plan.applies:
            self._apply(apply)

    def _apply(self, apply: Apply) -> None:
        found = self.objects.get(apply.key)
        manifest = copy.deepcopy(apply.manifest)
        fields = {name: manifest[name] for name in manifest if name not in ("apiVersion", "kind", "metadata")}
        fields["metadata"] = {
            name: value for name, value in manifest["metadata"].items() if name not in ("name", "namespace")
        }
        if found is None:
            found = {
                "apiVersion": manifest["apiVersion"],
                "kind": manifest["kind"],
                "metadata": {**manifest["metadata"], "uid": f"uid-{self._version}", "managedFields": []},
            }
            if manifest["kind"] == "Deployment":
                found["spec"] = {"replicas": 1}
            self.objects[apply.key] = found
        before = next((row for row in found["metadata"]["managedFields"] if row["manager"] == apply.manager), None)
        tree = field_tree(fields, manifest["kind"])
        if before is not None:
            _remove(found, before["fieldsV1"], tree, manifest["kind"])
            found["metadata"]["managedFields"].remove(before)
        _merge(found, fields, manifest["kind"])
        found["metadata"]["managedFields"].append(
            {"manager": apply.manager, "operation": "Apply", "fieldsV1": {f: t for f, t in tree.items() if t != {}}}
        )
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)


def field_tree(value: Any, parent: str) -> Json:
    """``fieldsV1`` of an applied value; ``parent`` is the name of its field (or, at the top, the kind)."""
    if isinstance(value, dict):
        return {f"f:{name}": field_tree(item, _below(parent, name)) for name, item in value.items()}
    keys = _list_keys(parent)
    if not isinstance(value, list) or keys is None:
        return {}
    return {_item_key(item, keys): {".": {}, **field_tree(item, parent.removesuffix("[]"))} for item in value}


def _below(parent: str, name: str) -> str:
    # Ports are keyed differently in a container and in a Service; "ports" alone is an atomic list.
    if name == "ports":
        return f"{parent}.ports"
    return parent if name == "spec" else name


def _list_keys(parent: str) -> tuple[str, ...] | None:
    if parent.endswith(".ports"):
        return _PORT_KEYS.get(parent.removesuffix(".ports"))
    return _KEYS.get(parent)


def _item_key(item: Json, keys: tuple[str, ...]) -> str:
    return "k:" + json.dumps({key: item[key] for key in keys}, separators=(",", ":"))


def _merge(found: Json, wanted: Json, parent: str) -> None:
    for name, value in wanted.items():
        below = _below(parent, name)
        keys = _list_keys(below)
        if isinstance(value, dict):
            _merge(found.setdefault(name, {}), value, below)
        elif isinstance(value, list) and keys is not None:
            _merge_rows(found.setdefault(name, []), value, keys, below)
        else:
            found[name] = copy.deepcopy(value)


def _merge_rows(rows: list[Json], wanted: list[Json], keys: tuple[str, ...], parent: str) -> None:
    for item in wanted:
        same = next((row for row in rows if _item_key(row, keys) == _item_key(item, keys)), None)
        if same is None:
            rows.append(copy.deepcopy(item))
        else:
            _merge(same, item, parent)


def _remove(found: Any, before: Json, now: Json, parent: str) -> None:
    for field, tree in before.items():
        if field == ".":
            continue
        if field.startswith("f:"):
            name = field.removeprefix("f:")
            if field not in now:
                found.pop(name, None)
            else:
                _remove(found.get(name), tree, now[field], _below(parent, name))
            continue
        keys = json.loads(field[2:])
        same = next((row for row in found if all(row.get(key) == value for key, value in keys.items())), None)
        if same is not None and field not in now:
            found.remove(same)
        elif same is not None:
            _remove(same, tree, now[field], parent)
