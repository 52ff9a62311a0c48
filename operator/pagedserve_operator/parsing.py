"""``parse()`` turns an InferenceService's JSON into a frozen spec, or names the bad field.

The API server has already applied the schema's bounds and defaults. What is checked here is what would otherwise
surface far from its cause; the defaults are repeated because ``pagedserve-operator size`` reads files without a server.
"""

from __future__ import annotations

from typing import Final

from pagedserve_operator.fields import Fields
from pagedserve_operator.names import Key, Owner
from pagedserve_operator.spec import (
    Architecture,
    Autoscaling,
    Cache,
    Gpu,
    Image,
    InferenceService,
    Json,
    Lifecycle,
    Limits,
    Model,
    Monitoring,
    NetworkPolicy,
    NewClaim,
    PodTemplate,
    SecretKey,
    Service,
    Spec,
    TuningOverrides,
)

PRE_STOP_SECONDS: Final = 15
DRAIN_SECONDS: Final = 120


def parse(raw: Json) -> InferenceService:
    """The resource as typed values; raises SpecError with the field's path."""
    metadata = Fields(raw.get("metadata"), "metadata")
    key = Key(metadata.text("namespace", "default"), metadata.required_text("name"))
    return InferenceService(
        owner=Owner(key, metadata.text("uid", "")),
        generation=metadata.integer("generation", 1),
        spec=_spec(Fields(raw.get("spec"), "spec")),
        raw=raw,
    )


def _spec(spec: Fields) -> Spec:
    auth = spec.child("auth")
    resources = spec.child("resources")
    return Spec(
        model=_model(spec.child("model")),
        gpu=_gpu(spec.child("gpu")),
        tuning=_tuning(spec.child("tuning")),
        replicas=spec.maybe_integer("replicas"),
        autoscaling=_autoscaling(spec.child("autoscaling")) if spec.has("autoscaling") else None,
        strategy=spec.child("rollout").choice("strategy", "Auto", ("Auto", "Surge", "InPlace", "Recreate")),
        lifecycle=_lifecycle(spec.child("lifecycle")),
        limits=_limits(spec.child("limits")),
        cache=_cache(spec.child("cache")),
        api_keys=_secret_key(auth, "apiKeysSecretRef", "api-keys"),
        hf_token=_secret_key(auth, "hfTokenSecretRef", "token"),
        image=_image(spec.child("image")),
        requests=resources.quantities("requests"),
        limits_of_resources=resources.quantities("limits"),
        env=spec.rows("env"),
        pod_template=_pod_template(spec.child("podTemplate")),
        service=_service(spec.child("service")),
        disruption_budget=spec.child("disruption").flag("enabled", True),
        network_policy=_network_policy(spec.child("networkPolicy")),
        monitoring=_monitoring(spec.child("monitoring")),
        suspend=spec.flag("suspend", False),
    )


def _model(model: Fields) -> Model:
    return Model(
        uri=model.required_text("uri"),
        revision=model.maybe_text("revision"),
        served_name=model.maybe_text("servedName"),
        dtype=model.text("dtype", "auto"),
        max_model_len=model.maybe_integer("maxModelLen", low=1),
        quantization=model.text("quantization", "none"),
        chat_template=model.maybe_text("chatTemplate"),
        architecture=_architecture(model.child("architecture")) if model.has("architecture") else None,
    )


def _architecture(shape: Fields) -> Architecture:
    return Architecture(
        layers=shape.required_integer("layers", low=1),
        layer_types=shape.texts("layerTypes"),
        sliding_window=shape.maybe_integer("slidingWindow", low=1),
        kv_heads=shape.required_integer("kvHeads", low=1),
        head_dim=shape.required_integer("headDim", low=1),
        hidden_size=shape.required_integer("hiddenSize", low=1),
        intermediate_size=shape.required_integer("intermediateSize", low=1),
        vocab_size=shape.required_integer("vocabSize", low=1),
        parameters=shape.required_integer("parameters", low=1),
        active_parameters=shape.maybe_integer("activeParameters", low=1),
        max_position_embeddings=shape.maybe_integer("maxPositionEmbeddings", low=1),
    )


def _gpu(gpu: Fields) -> Gpu:
    return Gpu(
        type=gpu.text("type", "auto"),
        count=gpu.integer("count", 1, low=1),
        memory_mib=gpu.maybe_integer("memoryMiB", low=1),
        node_selector=gpu.texts_by_name("nodeSelector"),
        tolerations=gpu.rows("tolerations"),
        pin=gpu.flag("pin", True),
    )


def _tuning(tuning: Fields) -> TuningOverrides:
    return TuningOverrides(
        num_blocks=tuning.maybe_integer("numBlocks", low=1),
        max_batch_tokens=tuning.maybe_integer("maxBatchTokens", low=1),
        block_size=tuning.integer("blockSize", 32, low=1),
        safety_margin=tuning.number("safetyMargin", 0.2, low=0, high=0.99),
        max_memory_percent=tuning.number("maxMemoryPercent", 0.9, low=0.05, high=1),
        scheduler=tuning.text("scheduler", "fifo"),
        use_cuda_graph=tuning.maybe_flag("useCudaGraph"),
        kv_cache_dtype=tuning.text("kvCacheDtype", "auto"),
    )


def _autoscaling(autoscaling: Fields) -> Autoscaling:
    # An explicit maximum below the default minimum lowers it, as an explicit minimum raises the default maximum.
    lowest, highest = autoscaling.maybe_integer("minReplicas"), autoscaling.maybe_integer("maxReplicas")
    return Autoscaling(
        backend=autoscaling.choice("backend", "HPA", ("HPA", "KEDA")),
        min_replicas=lowest if lowest is not None else min(2, highest if highest is not None else 2),
        max_replicas=highest if highest is not None else max(10, lowest if lowest is not None else 10),
        metrics=autoscaling.rows("metrics"),
        behavior=autoscaling.maybe_table("behavior"),
    )


def _lifecycle(lifecycle: Fields) -> Lifecycle:
    return Lifecycle(
        startup_timeout_seconds=lifecycle.maybe_integer("startupTimeoutSeconds"),
        pre_stop_seconds=lifecycle.integer("preStopSeconds", PRE_STOP_SECONDS),
        drain_seconds=lifecycle.integer("drainSeconds", DRAIN_SECONDS),
    )


def _limits(limits: Fields) -> Limits:
    return Limits(
        max_num_seqs=limits.maybe_integer("maxNumSeqs"),
        max_queue=limits.maybe_integer("maxQueue"),
        request_timeout_seconds=limits.maybe_integer("requestTimeoutSeconds"),
    )


def _cache(cache: Fields) -> Cache:
    claim = cache.child("newClaim")
    return Cache(
        new_claim=NewClaim(
            size=claim.quantity("size", "100Gi"),
            storage_class_name=claim.maybe_text("storageClassName"),
            access_mode=claim.text("accessMode", "ReadWriteMany"),
        )
        if cache.has("newClaim")
        else None,
        existing_claim=cache.maybe_text("existingClaim"),
        size_limit=cache.child("emptyDir").maybe_quantity("sizeLimit"),
    )


def _secret_key(auth: Fields, name: str, key: str) -> SecretKey | None:
    if not auth.has(name):
        return None
    reference = auth.child(name)
    return SecretKey(name=reference.required_text("name"), key=reference.text("key", key))


def _image(image: Fields) -> Image:
    return Image(
        repository=image.maybe_text("repository"),
        tag=image.maybe_text("tag"),
        pull_policy=image.maybe_text("pullPolicy"),
        pull_secrets=image.texts("pullSecrets"),
    )


def _pod_template(template: Fields) -> PodTemplate:
    return PodTemplate(
        labels=template.texts_by_name("labels"),
        annotations=template.texts_by_name("annotations"),
        volumes=template.rows("volumes"),
        volume_mounts=template.rows("volumeMounts"),
        sidecars=template.rows("sidecars"),
        service_account_name=template.maybe_text("serviceAccountName"),
        priority_class_name=template.maybe_text("priorityClassName"),
        runtime_class_name=template.maybe_text("runtimeClassName"),
        topology_spread=template.rows("topologySpread"),
    )


def _service(service: Fields) -> Service:
    return Service(
        type=service.text("type", "ClusterIP"),
        port=service.integer("port", 80),
        annotations=service.texts_by_name("annotations"),
    )


def _network_policy(policy: Fields) -> NetworkPolicy:
    return NetworkPolicy(enabled=policy.flag("enabled", False), allow_from=policy.rows("allowFrom"))


def _monitoring(monitoring: Fields) -> Monitoring:
    return Monitoring(
        pod_monitor=monitoring.flag("podMonitor", True),
        service_monitor=monitoring.flag("serviceMonitor", False),
        prometheus_rule=monitoring.flag("prometheusRule", True),
        interval=monitoring.text("interval", "30s"),
        labels=monitoring.texts_by_name("labels"),
    )
