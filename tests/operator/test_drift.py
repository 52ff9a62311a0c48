from __future__ import annotations

import copy
from typing import Any

import pytest

from children import field_tree
from pagedserve_operator.drift import differences
from pagedserve_operator.spec import Json

MANIFEST: Json = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "a", "namespace": "b", "labels": {"x": "1"}},
    "spec": {
        "strategy": {"rollingUpdate": {"maxSurge": 0}},
        "template": {
            "spec": {
                "enableServiceLinks": False,
                "containers": [
                    {
                        "name": "engine",
                        "image": "i:1",
                        "env": [{"name": "A", "value": "1"}, {"name": "EMPTY", "value": ""}],
                        "resources": {"requests": {"cpu": "0.5", "memory": "1024Mi"}},
                        "args": ["a", "b"],
                    }
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}],
                "tolerations": [{"key": "k", "operator": "Exists"}],
            }
        },
    },
}


def observed(manager: str = "us") -> Json:
    """MANIFEST as a server has it: with defaults, canonical quantities, a dropped empty value and our fields."""
    found = copy.deepcopy(MANIFEST)
    fields = {"spec": field_tree(MANIFEST["spec"], "Deployment"), "labels": field_tree({"x": "1"}, "labels")}
    tree = {"f:spec": fields["spec"], "f:metadata": {"f:labels": fields["labels"]}}
    found["metadata"]["managedFields"] = [{"manager": manager, "operation": "Apply", "fieldsV1": tree}]
    container = engine(found)
    container["resources"]["requests"] = {"cpu": "500m", "memory": "1Gi"}
    container["imagePullPolicy"] = "IfNotPresent"
    del container["env"][1]["value"]
    found["spec"]["replicas"] = 3
    found["status"] = {"replicas": 3}
    return found


def engine(found: Json) -> Json:
    container: Json = found["spec"]["template"]["spec"]["containers"][0]
    return container


def trees(found: Json) -> Any:
    """Our fields below the pod's spec."""
    return found["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"]["f:template"]["f:spec"]


def paths(found: Json, manifest: Json = MANIFEST) -> list[str]:
    return list(differences(manifest, found, manager="us"))


def test_defaults_canonical_quantities_and_dropped_empty_values_are_no_difference():
    assert paths(observed()) == []


def test_fields_and_items_of_others_are_no_difference():
    found = observed()
    found["metadata"]["labels"]["theirs"] = "1"
    engine(found)["env"].insert(0, {"name": "THEIRS", "value": "1"})
    found["spec"]["template"]["spec"]["containers"].insert(0, {"name": "injected", "image": "x"})
    assert paths(found) == []


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("image", "i:2", "image"),
        ("args", ["a", "c"], "args[1]"),
        ("args", ["a", "b", "c"], "args"),
        ("resources", {"requests": {"cpu": "501m", "memory": "1Gi"}}, "resources.requests.cpu"),
    ],
)
def test_a_value_that_was_changed_is_named(name: str, value: Any, path: str):
    # B5, B7: every argument and every field counts, and they are compared themselves, not a hash of what made them.
    found = observed()
    engine(found)[name] = value
    assert paths(found) == [f"spec.template.spec.containers[engine].{path}"]


def test_a_number_is_no_truth_value():
    found = observed()
    found["spec"]["strategy"]["rollingUpdate"]["maxSurge"] = False
    assert paths(found) == ["spec.strategy.rollingUpdate.maxSurge"]


def test_text_that_looks_like_a_quantity_is_compared_as_text():
    found = observed()
    engine(found)["env"][0]["value"] = "1.0"
    assert paths(found) == ["spec.template.spec.containers[engine].env[A].value"]


def test_an_empty_value_that_somebody_removed_is_missed():
    # The server drops empty values by itself; only its record of our fields tells the two apart.
    found = observed()
    del found["spec"]["template"]["spec"]["enableServiceLinks"]
    assert paths(found) == []
    del trees(found)["f:enableServiceLinks"]
    assert paths(found) == ["spec.template.spec.enableServiceLinks"]


def test_an_item_that_was_removed_is_missed():
    found = observed()
    del found["spec"]["template"]["spec"]["volumes"][0]
    assert paths(found) == ["spec.template.spec.volumes[tmp]"]


def test_an_addition_to_a_list_that_is_one_value_is_seen():
    found = observed()
    found["spec"]["template"]["spec"]["tolerations"][0]["tolerationSeconds"] = 5
    del trees(found)["f:tolerations"]
    assert paths(found) == ["spec.template.spec.tolerations"]


def test_what_we_own_and_no_longer_want_is_a_difference():
    manifest = copy.deepcopy(MANIFEST)
    del engine(manifest)["args"]
    engine(manifest)["env"] = engine(manifest)["env"][:1]
    assert paths(observed(), manifest) == [
        'spec.template.spec.containers[engine].env[{"name":"EMPTY"}]',
        "spec.template.spec.containers[engine].args",
    ]


def test_what_others_own_beside_a_value_of_ours_does_not_matter():
    found = observed()
    found["metadata"]["managedFields"].append(
        {"manager": "them", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    )
    assert paths(found) == []


def test_an_object_that_we_never_applied_differs_in_its_lists():
    assert paths(observed(manager="them")) != []


def test_metadata_beyond_labels_annotations_and_owners_is_the_servers():
    found = observed()
    found["metadata"]["managedFields"][0]["fieldsV1"]["f:metadata"]["f:deletionGracePeriodSeconds"] = {}
    found["metadata"] |= {"uid": "x", "generation": 4}
    assert paths(found) == []
