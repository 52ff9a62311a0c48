"""The resource as typed, frozen values; parsing.py makes them, everything else reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pagedserve_operator.names import Key, Owner

Json = dict[str, Any]
Strategy = Literal["Auto", "Surge", "InPlace", "Recreate"]
Backend = Literal["HPA", "KEDA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The model's shape as the user states it; counts of one whole model, before tensor parallelism."""

    layers: int
    layer_types: tuple[str, ...]
    """"full" or "sliding" for each layer; empty: all full."""
    sliding_window: int | None
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    active_parameters: int | None
    """Parameters that one token uses (mixture of experts); None: all."""
    max_position_embeddings: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served."""

    uri: str
    revision: str | None
    served_name: str | None
    dtype: str
    max_model_len: int | None
    """Tokens of prompt and output together; None: what the model allows and memory holds."""
    quantization: str
    chat_template: str | None
    """Jinja text that replaces the model's own template."""
    architecture: Architecture | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Where it is served."""

    type: str
    """``auto``, ``cpu``, or a product."""
    count: int
    memory_mib: int | None
    node_selector: Mapping[str, str]
    tolerations: tuple[Json, ...]
    pin: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOverrides:
    """Numbers that the user gives; None: computed."""

    num_blocks: int | None
    max_batch_tokens: int | None
    block_size: int
    safety_margin: float
    max_memory_percent: float
    scheduler: str
    use_cuda_graph: bool | None
    kv_cache_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """The autoscaler's side; ``metrics`` and ``behavior`` as in the resource."""

    backend: Backend
    """Whose autoscaler: a HorizontalPodAutoscaler of ours, or what KEDA makes of a ScaledObject."""
    min_replicas: int
    max_replicas: int
    metrics: tuple[Json, ...]
    behavior: Json | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """Seconds of coming and going."""

    startup_timeout_seconds: int | None
    pre_stop_seconds: int
    drain_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine accepts; None: the engine's default."""

    max_num_seqs: int | None
    max_queue: int | None
    request_timeout_seconds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewClaim:
    """A PersistentVolumeClaim to be made for the model cache."""

    size: str
    storage_class_name: str | None
    access_mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The volume that keeps downloaded weights: a new claim, an existing one, or (neither) an emptyDir."""

    new_claim: NewClaim | None
    existing_claim: str | None
    size_limit: str | None
    """Of the emptyDir."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretKey:
    """One key of a Secret in the resource's namespace."""

    name: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Overrides of the operator's default engine image; None: the default."""

    repository: str | None
    tag: str | None
    pull_policy: str | None
    pull_secrets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate:
    """What a user may add to the pods; lists as in the resource."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    volumes: tuple[Json, ...]
    volume_mounts: tuple[Json, ...]
    sidecars: tuple[Json, ...]
    service_account_name: str | None
    priority_class_name: str | None
    runtime_class_name: str | None
    topology_spread: tuple[Json, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The Service in front of the engines."""

    type: str
    port: int
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy:
    """Who may speak to the engines; ``allow_from``: peers as in a NetworkPolicy, empty: the own namespace."""

    enabled: bool
    allow_from: tuple[Json, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitoring:
    """Objects for the Prometheus operator, made where it is installed."""

    pod_monitor: bool
    service_monitor: bool
    prometheus_rule: bool
    interval: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """``spec`` of an InferenceService."""

    model: Model
    gpu: Gpu
    tuning: TuningOverrides
    replicas: int | None
    autoscaling: Autoscaling | None
    strategy: Strategy
    lifecycle: Lifecycle
    limits: Limits
    cache: Cache
    api_keys: SecretKey | None
    hf_token: SecretKey | None
    image: Image
    requests: Mapping[str, str]
    limits_of_resources: Mapping[str, str]
    env: tuple[Json, ...]
    pod_template: PodTemplate
    service: Service
    disruption_budget: bool
    network_policy: NetworkPolicy
    monitoring: Monitoring
    suspend: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceService:
    """A parsed resource; ``raw`` is the JSON that it came from."""

    owner: Owner
    generation: int
    spec: Spec
    raw: Json = field(repr=False, compare=False)

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.owner.key
