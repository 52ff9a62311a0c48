"""What can't be is refused where the user looks: by kubectl at once, or in Ready's message; the field is named."""

from __future__ import annotations

import pytest
import yaml
from e2e.providers.provider import Provider
from e2e.waiting import JSON

from operator_world import World, condition_of, psvc

AT_ONCE: dict[str, tuple[JSON, tuple[str, ...]]] = {
    "both counts": ({"replicas": 2, "autoscaling": {}}, ("replicas", "autoscaling")),
    "a misspelt field": ({"modle": {}}, ("spec.modle",)),
    "a share above one": ({"tuning": {"safetyMargin": 2}}, ("spec.tuning.safetyMargin",)),
    "GPUs of a CPU": ({"gpu": {"type": "cpu", "count": 2}}, ("spec.gpu", "count")),
    "an odd block": ({"tuning": {"blockSize": 33}}, ("spec.tuning.blockSize",)),
    "fewest above most": ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, ("minReplicas", "maxReplicas")),
}
SOON: dict[str, tuple[JSON, str, tuple[str, ...]]] = {
    "scheme": ({"model": {"uri": "s3://bucket/model"}}, "UnsupportedModelURI", ("spec.model.uri", "hf://")),
    "variable": (
        {"env": [{"name": "NUM_BLOCKS", "value": "1"}]},
        "InvalidSpec",
        ("spec.env[0]", "spec.tuning.numBlocks"),
    ),
    "secret": ({"auth": {"hfTokenSecretRef": {"name": "none"}}}, "SecretNotFound", ("hfTokenSecretRef", "none")),
    "gpu": ({"gpu": {"type": "Voodoo-2"}}, "GPUUnknown", ("spec.gpu.type", "Voodoo-2")),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_kubectl_is_told_the_field(provider: Provider, world: World, case: str) -> None:
    spec, words = AT_ONCE[case]
    manifest = yaml.safe_dump(psvc("refused", world.namespace, **spec))
    refused = provider.cluster.kubectl("apply", "-f=-", stdin=manifest, check=False)
    assert refused.returncode != 0
    assert all(word in refused.stderr for word in words), refused.stderr


def test_what_only_the_operator_can_judge_is_said_in_ready(world: World) -> None:
    for name, (spec, _, _) in SOON.items():
        world.create(name, **spec)
    for name, (_, reason, words) in SOON.items():
        told = condition_of(world.wait(name, "Ready", "False", reason=reason), "Ready")["message"]
        assert all(word in told for word in words), told
        assert world.find("Deployment", name) is None
