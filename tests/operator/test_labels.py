from typing import Any

import pytest

from pagedserve_operator.gpus.labels import NodeGpu, read_node, split_product
from tuning_cases import gfd, node


def read_one(raw: dict[str, Any]) -> NodeGpu:
    (found,) = read_node(raw)
    return found


def test_feature_discovery_tells_product_memory_and_compute_capability() -> None:
    labels = {
        **gfd("NVIDIA-L4", 23034, count="2"),
        "nvidia.com/gpu.compute.major": "8",
        "nvidia.com/gpu.compute.minor": "9",
    }
    found = read_one(node("n7", labels=labels, gpu=2))
    assert (found.node, found.product, found.memory_mib, found.allocatable) == ("n7", "NVIDIA-L4", 23034, 2)
    assert found.compute_capability == (8, 9)
    assert found.resource == "nvidia.com/gpu"
    assert found.pin == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert found.is_whole
    assert found.schedulable


def test_a_shared_gpu_has_its_part_of_the_memory() -> None:
    found = read_one(node(labels=gfd("Tesla-T4-SHARED", 15360, count="1", replicas="4"), gpu=4))
    assert (found.product, found.memory_mib, found.replicas) == ("Tesla-T4", 3840, 4)
    assert found.pin == {"nvidia.com/gpu.product": "Tesla-T4-SHARED"}
    assert not found.is_whole


def test_sharing_shows_in_the_count_where_the_label_of_replicas_is_wrong() -> None:
    found = read_one(node(labels=gfd("NVIDIA-A10G-SHARED", 23028, count="1", replicas="1"), gpu=8))
    assert (found.replicas, found.memory_mib) == (8, 2878)


def test_sharing_shows_in_the_resource_where_it_is_renamed() -> None:
    found = read_one(node(labels=gfd("NVIDIA-L4", 23034, count="1", replicas="2"), shared=2))
    assert (found.resource, found.product, found.memory_mib) == ("nvidia.com/gpu.shared", "NVIDIA-L4", 11517)


def test_a_slice_of_the_single_strategy_has_the_memory_of_the_plain_label() -> None:
    found = read_one(node(labels=gfd("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", 4864, replicas="1"), gpu=7))
    assert (found.product, found.mig_profile, found.memory_mib) == ("NVIDIA-A100-SXM4-40GB", "1g.5gb", 4864)
    assert found.resource == "nvidia.com/gpu"
    assert found.pin == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"}


def test_slices_of_the_mixed_strategy_are_resources_with_labels_of_their_own() -> None:
    labels = {
        **gfd("NVIDIA-H100-80GB-HBM3", 81559, count="2", replicas="0"),
        "nvidia.com/mig-1g.10gb.memory": "9984",
        "nvidia.com/mig-2g.20gb.memory": "20096",
        "nvidia.com/mig-2g.20gb.replicas": "2",
    }
    whole, small, large = read_node(node(labels=labels, gpu=1, mig_1g_10gb=4, mig_2g_20gb=2))
    assert (whole.mig_profile, whole.memory_mib) == (None, 81559)
    assert (small.resource, small.mig_profile, small.memory_mib) == ("nvidia.com/mig-1g.10gb", "1g.10gb", 9984)
    assert (large.mig_profile, large.memory_mib, large.replicas) == ("2g.20gb", 10048, 2)


def test_a_slice_without_a_memory_label_has_what_its_profile_promises() -> None:
    found = read_one(node(labels={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}, mig_1g_5gb=7))
    assert found.memory_mib == 4860


def test_gke_names_the_card_and_says_how_it_is_cut() -> None:
    plain = read_one(node(labels={"cloud.google.com/gke-accelerator": "nvidia-l4"}, gpu=1))
    assert (plain.product, plain.memory_mib) == ("nvidia-l4", None)
    assert plain.pin == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    labels = {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    cut = read_one(node(labels={**labels, "cloud.google.com/gke-gpu-partition-size": "1g.5gb"}, gpu=7))
    assert (cut.mig_profile, cut.memory_mib) == ("1g.5gb", 4860)
    shared = read_one(node(labels={**labels, "cloud.google.com/gke-max-shared-clients-per-gpu": "3"}, gpu=3))
    assert shared.replicas == 3


@pytest.mark.parametrize("prefix", ["karpenter.k8s.aws", "eks.amazonaws.com"])
def test_what_a_cloud_sells_never_beats_what_the_driver_leaves(prefix: str) -> None:
    def labelled(name: str, memory: str) -> NodeGpu:
        labels = {f"{prefix}/instance-gpu-name": name, f"{prefix}/instance-gpu-memory": memory}
        return read_one(node(labels=labels, gpu=1))

    assert labelled("a10g", "24576").memory_mib == 23028
    assert labelled("l4", "22888").memory_mib == 22888
    assert labelled("x900", "50000").memory_mib == 50000
    assert (labelled("a100", "81920").product, labelled("a100", "40960").product) == ("a100-80gb", "a100-40gb")
    assert labelled("a100", "81920").pin == {f"{prefix}/instance-gpu-name": "a100"}


def test_feature_discovery_is_trusted_before_the_cloud() -> None:
    labels = {**gfd("NVIDIA-L4", 23034), "cloud.google.com/gke-accelerator": "nvidia-tesla-t4"}
    assert read_one(node(labels=labels, gpu=1)).product == "NVIDIA-L4"


def test_a_gpu_without_labels_has_no_product() -> None:
    found = read_one(node(gpu=1))
    assert (found.product, found.memory_mib, found.pin) == ("", None, {})


@pytest.mark.parametrize("raw", [{}, {"metadata": {}, "status": {}}, node(), node(gpu=0)])
def test_a_node_without_gpus_has_none(raw: dict[str, Any]) -> None:
    assert read_node(raw) == ()


@pytest.mark.parametrize("memory", ["", "16GB", "-1", "0", "many"])
def test_a_memory_label_that_is_no_number_tells_nothing(memory: str) -> None:
    assert read_one(node(labels={**gfd("Tesla-T4"), "nvidia.com/gpu.memory": memory}, gpu=1)).memory_mib is None


def test_cordoned_and_unready_nodes_take_no_pods() -> None:
    cordoned, unready = node(gpu=1), node(gpu=1)
    cordoned["spec"]["unschedulable"] = True
    unready["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    assert not read_one(cordoned).schedulable
    assert not read_one(unready).schedulable


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("NVIDIA-L4", ("NVIDIA-L4", None, False)),
        ("Tesla-T4-SHARED", ("Tesla-T4", None, True)),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", ("NVIDIA-H100-80GB-HBM3", "1g.10gb", False)),
        ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb-SHARED", ("NVIDIA-H100-80GB-HBM3", "1g.10gb", True)),
        ("h100-mig-3g.40gb", ("h100", "3g.40gb", False)),
        ("", ("", None, False)),
    ],
)
def test_a_product_label_splits_into_product_slice_and_sharing(label: str, parts: tuple[str, str | None, bool]) -> None:
    assert split_product(label) == parts


def test_a_round_number_of_devices_is_read_as_the_server_writes_it() -> None:
    raw = node(gpu=4000)
    raw["status"]["allocatable"]["nvidia.com/gpu"] = "4k"
    assert read_one(raw).allocatable == 4000
