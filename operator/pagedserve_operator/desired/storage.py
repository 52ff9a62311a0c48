"""Where an engine finds and keeps files: volumes, their mounts, and the children behind two of them."""

from __future__ import annotations

import hashlib
from typing import Final

from pagedserve_operator.desired.head import head
from pagedserve_operator.desired.source import ModelSource
from pagedserve_operator.errors import SpecError
from pagedserve_operator.names import chat_template_name, claim_name
from pagedserve_operator.spec import Cache, InferenceService, Json, SecretKey

CACHE_PATH: Final = "/var/cache/pagedserve"
API_KEYS_PATH: Final = "/etc/pagedserve/api-keys"
HF_TOKEN_PATH: Final = "/etc/pagedserve/hf-token"
CHAT_TEMPLATE_PATH: Final = "/etc/pagedserve/chat-template"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
API_KEYS_FILE: Final = "api-keys"
HF_TOKEN_FILE: Final = "token"
MODELS_PATH: Final = "/models"

_SECRET_MODE: Final = 0o440
"""The engine reads its Secrets through the pod's group."""


def chat_template_hash(text: str) -> str:
    """Changes with the template, and rolls the pods."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_map(service: InferenceService) -> Json | None:
    """The inline chat template, where there is one."""
    text = service.spec.model.chat_template
    if text is None:
        return None
    return {**head(service, "ConfigMap", chat_template_name(service.key.name)), "data": {CHAT_TEMPLATE_FILE: text}}


def persistent_volume_claim(service: InferenceService) -> Json | None:
    """The claim for the model cache, where a new one is wanted."""
    claim = service.spec.cache.new_claim
    if claim is None:
        return None
    spec: Json = {"accessModes": [claim.access_mode], "resources": {"requests": {"storage": claim.size}}}
    if claim.storage_class_name is not None:
        spec["storageClassName"] = claim.storage_class_name
    return {**head(service, "PersistentVolumeClaim", claim_name(service.key.name)), "spec": spec}


def volumes(service: InferenceService, source: ModelSource) -> list[Json]:
    """The pod's volumes, the user's last; raises SpecError for a name that is taken."""
    spec = service.spec
    ours: list[Json] = [
        {"name": "model-cache", **_cache(spec.cache, service.key.name)},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if source.claim is not None:
        ours.append({"name": "models", "persistentVolumeClaim": {"claimName": source.claim, "readOnly": True}})
    if spec.api_keys is not None:
        ours.append({"name": "api-keys", "secret": _secret(spec.api_keys, API_KEYS_FILE)})
    if spec.hf_token is not None:
        ours.append({"name": "hf-token", "secret": _secret(spec.hf_token, HF_TOKEN_FILE)})
    if spec.model.chat_template is not None:
        ours.append({"name": "chat-template", "configMap": {"name": chat_template_name(service.key.name)}})
    return _joined(ours, spec.pod_template.volumes, key="name", field="spec.podTemplate.volumes")


def mounts(service: InferenceService, source: ModelSource) -> list[Json]:
    """The engine container's mounts, the user's last; raises SpecError for a path that is taken.

    Whole folders, never single files by ``subPath``: those wouldn't follow a Secret that is rotated.
    """
    spec = service.spec
    ours: list[Json] = [
        {"name": "model-cache", "mountPath": CACHE_PATH},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if source.claim is not None:
        ours.append({"name": "models", "mountPath": MODELS_PATH, "readOnly": True})
    if spec.api_keys is not None:
        ours.append({"name": "api-keys", "mountPath": API_KEYS_PATH, "readOnly": True})
    if spec.hf_token is not None:
        ours.append({"name": "hf-token", "mountPath": HF_TOKEN_PATH, "readOnly": True})
    if spec.model.chat_template is not None:
        ours.append({"name": "chat-template", "mountPath": CHAT_TEMPLATE_PATH, "readOnly": True})
    return _joined(ours, spec.pod_template.volume_mounts, key="mountPath", field="spec.podTemplate.volumeMounts")


def _cache(cache: Cache, name: str) -> Json:
    if cache.new_claim is not None:
        return {"persistentVolumeClaim": {"claimName": claim_name(name)}}
    if cache.existing_claim is not None:
        return {"persistentVolumeClaim": {"claimName": cache.existing_claim}}
    return {"emptyDir": {} if cache.size_limit is None else {"sizeLimit": cache.size_limit}}


def _secret(reference: SecretKey, path: str) -> Json:
    return {
        "secretName": reference.name,
        "items": [{"key": reference.key, "path": path}],
        "defaultMode": _SECRET_MODE,
    }


def _joined(ours: list[Json], theirs: tuple[Json, ...], *, key: str, field: str) -> list[Json]:
    taken = {row[key] for row in ours}
    for index, row in enumerate(theirs):
        value = row.get(key)
        if value in taken:
            raise SpecError(f"{field}[{index}].{key}", f"{value!r} is taken: choose another")
        taken.add(value)
    return [*ours, *theirs]
