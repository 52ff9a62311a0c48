"""The pod template: a pure function of spec, sticky tuning and facts, so that a new operator rolls no running pod.

A golden test pins the template's hash for several resources.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from pagedserve_operator.desired.environment import environment
from pagedserve_operator.desired.facts import Facts
from pagedserve_operator.desired.resources import resources
from pagedserve_operator.desired.source import ModelSource, model_source
from pagedserve_operator.desired.storage import chat_template_hash, mounts, volumes
from pagedserve_operator.desired.timing import grace_seconds, pre_stop, probes
from pagedserve_operator.names import (
    ANNOTATION_CHAT_TEMPLATE,
    ANNOTATION_SECRETS,
    ENGINE_CONTAINER,
    ENGINE_PORT,
    child_labels,
    selector_labels,
)
from pagedserve_operator.spec import InferenceService, Json, Spec
from pagedserve_operator.tuning import Tuning

USER_ID: Final = 10001
"""Of the engine's process and, as a group, of its volumes; the image's USER."""


def pod_template(service: InferenceService, tuning: Tuning, facts: Facts) -> Json:
    """``spec.template`` of the Deployment; raises SpecError for what can't stand in it."""
    spec, source = service.spec, model_source(service.spec.model.uri)
    metadata: Json = {"labels": {**spec.pod_template.labels, **child_labels(service.key.name)}}
    if annotations := _annotations(spec, facts):
        metadata["annotations"] = annotations
    pod: Json = {
        "containers": [_engine(service, tuning, source)],
        "volumes": volumes(service, source),
        "terminationGracePeriodSeconds": grace_seconds(spec.lifecycle),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": _topology_spread(service),
        **_placement(spec, tuning),
        **_optional(spec),
    }
    if spec.pod_template.sidecars:
        pod["initContainers"] = [_sidecar(row) for row in spec.pod_template.sidecars]
    return {"metadata": metadata, "spec": pod}


def template_hash(template: Json) -> str:
    """Changes where the template does."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def _annotations(spec: Spec, facts: Facts) -> dict[str, str]:
    annotations = dict(spec.pod_template.annotations)
    if facts.secrets_hash:
        annotations[ANNOTATION_SECRETS] = facts.secrets_hash
    if spec.model.chat_template is not None:
        annotations[ANNOTATION_CHAT_TEMPLATE] = chat_template_hash(spec.model.chat_template)
    return annotations


def _engine(service: InferenceService, tuning: Tuning, source: ModelSource) -> Json:
    spec = service.spec
    container: Json = {
        "name": ENGINE_CONTAINER,
        "image": tuning.image,
        "env": environment(service, tuning, source),
        "ports": [{"name": "http", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "resources": resources(spec, tuning),
        "volumeMounts": mounts(service, source),
        **probes(tuning.weights_mib, spec.lifecycle),
        **pre_stop(spec.lifecycle),
        # The last log lines stand in where the engine had no time for its own message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _container_security(readOnlyRootFilesystem=True),
    }
    if spec.image.pull_policy is not None:
        container["imagePullPolicy"] = spec.image.pull_policy
    return container


def _sidecar(row: Json) -> Json:
    # As an init container that is always restarted it starts before the engine and ends after it, so that a proxy
    # outlives the streams that it carries. An empty list isn't said: the server forgets that we said it, and every
    # comparison would differ.
    said = {name: value for name, value in row.items() if value != []}
    return {**said, "restartPolicy": "Always", "securityContext": _container_security()}


def _container_security(**more: bool) -> Json:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, **more}


def _topology_spread(service: InferenceService) -> list[Json]:
    rows = service.spec.pod_template.topology_spread or (
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"},
    )
    selector = {"matchLabels": selector_labels(service.key.name)}
    return [{"maxSkew": 1, **row, "labelSelector": selector} for row in rows]


def _placement(spec: Spec, tuning: Tuning) -> Json:
    placement: Json = {}
    if spec.gpu.node_selector:
        placement["nodeSelector"] = dict(spec.gpu.node_selector)
    tolerations = list(spec.gpu.tolerations)
    if tuning.gpu.resource is not None:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        placement["tolerations"] = tolerations
    if tuning.gpu.pin:
        expressions = [
            {"key": label, "operator": "In", "values": list(values)} for label, values in sorted(tuning.gpu.pin.items())
        ]
        term = {"matchExpressions": expressions}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        placement["affinity"] = {"nodeAffinity": required}
    return placement


def _optional(spec: Spec) -> Json:
    template = spec.pod_template
    named = {
        # Always said: the server keeps the name that is no longer applied in an old field beside it, and goes by that.
        "serviceAccountName": template.service_account_name or "default",
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
    }
    optional: Json = {name: value for name, value in named.items() if value is not None}
    if spec.image.pull_secrets:
        optional["imagePullSecrets"] = [{"name": name} for name in spec.image.pull_secrets]
    return optional
