from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_operator.errors import GPUTypeRequired, GPUUnknown, GPUUnsupported, TuningError
from pagedserve_operator.gpus.labels import PRODUCT_LABELS, NodeGpu, read_node
from pagedserve_operator.gpus.resolve import ResolvedGpu, free_gpus, resolve
from tuning_cases import gfd, gpu_spec, node, pod

CURRENT = (7, 5)
L4 = gfd("NVIDIA-L4", 23034)
H100 = gfd("NVIDIA-H100-80GB-HBM3", 81559)
T4 = gfd("Tesla-T4", 15360)


def gpus(*nodes: dict[str, Any]) -> list[NodeGpu]:
    return [found for raw in nodes for found in read_node(raw)]


def choose(*nodes: dict[str, Any], **gpu: Any) -> ResolvedGpu:
    return resolve(gpu_spec(**gpu), gpus(*nodes), min_compute_capability=CURRENT)


def test_the_spec_wins_over_what_the_nodes_have() -> None:
    found = choose(node("a", labels=L4, gpu=8), node("b", labels=H100, gpu=1), type="h100")
    assert (found.product, found.memory_mib, found.source) == ("NVIDIA-H100-80GB-HBM3", 81559, "spec")
    assert found.pin == {"nvidia.com/gpu.product": ("NVIDIA-H100-80GB-HBM3",)}
    assert found.resource == "nvidia.com/gpu"
    assert "spec.gpu.type" in found.reason


def test_without_nodes_the_catalogue_has_to_do() -> None:
    found = resolve(gpu_spec(type="L4", count=2), None, min_compute_capability=CURRENT)
    assert (found.product, found.memory_mib, found.count, found.pin) == ("NVIDIA-L4", 23034, 2, {})
    assert any("nodes aren't read" in note for note in found.notes)


def test_a_label_beats_the_table_and_the_spec_beats_both() -> None:
    raw = node(labels=gfd("NVIDIA-A100-PCIE-40GB", 40536), gpu=1)
    assert choose(raw, type="A100-PCIE").memory_mib == 40536
    assert choose(raw, type="A100-PCIE", memoryMiB=39000).memory_mib == 39000


def test_of_nodes_that_differ_the_least_memory_counts() -> None:
    raws = [
        node("a", labels=gfd("NVIDIA-A100-PCIE-40GB", 40960), gpu=1),
        node("b", labels=gfd("A100-PCIE-40GB", 40536), gpu=1),
    ]
    found = choose(*raws)
    assert found.memory_mib == 40536
    assert found.pin == {"nvidia.com/gpu.product": ("A100-PCIE-40GB", "NVIDIA-A100-PCIE-40GB")}


@pytest.mark.parametrize("key", ["nvidia.com/gpu.product", "cloud.google.com/gke-accelerator"])
def test_a_product_in_the_node_selector_decides_for_auto(key: str) -> None:
    spec = gpu_spec(nodeSelector={key: "nvidia-l4"})
    found = resolve(spec, None, min_compute_capability=CURRENT)
    assert (found.product, found.source) == ("NVIDIA-L4", "nodeSelector")
    assert "spec.gpu.nodeSelector" in found.reason


def test_auto_without_nodes_asks_for_the_type() -> None:
    with pytest.raises(GPUTypeRequired, match=r"spec\.gpu\.type.*may not read nodes"):
        resolve(gpu_spec(), None, min_compute_capability=CURRENT)


@pytest.mark.parametrize(
    ("raw", "why"), [(node(), "no node that"), (node(gpu=2), "n1 has nvidia.com/gpu but no label")]
)
def test_auto_without_a_known_gpu_asks_for_the_type(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(GPUTypeRequired, match=why):
        choose(raw)


def test_auto_takes_the_one_product_there_is() -> None:
    found = choose(node(labels=L4, gpu=1))
    assert (found.product, found.source) == ("NVIDIA-L4", "nodes")
    assert found.pin == {"nvidia.com/gpu.product": ("NVIDIA-L4",)}


@pytest.mark.parametrize(
    ("nodes", "product"),
    [
        ([node("a", labels=H100, gpu=2), node("b", labels=L4, gpu=4)], "NVIDIA-L4"),
        (
            [node("a", labels=L4, gpu=2), node("b", labels=H100, gpu=1), node("c", labels=H100, gpu=2)],
            "NVIDIA-H100-80GB-HBM3",
        ),
        ([node("a", labels=L4, gpu=2), node("b", labels=H100, gpu=2)], "NVIDIA-H100-80GB-HBM3"),
        ([node("a", labels=gfd("B", 1000), gpu=2), node("b", labels=gfd("A", 1000), gpu=2)], "A"),
    ],
    ids=["most devices", "most devices over several nodes", "more memory", "by name"],
)
def test_of_several_products_auto_takes_one_by_rule(nodes: list[dict[str, Any]], product: str) -> None:
    for order in (nodes, nodes[::-1]):
        found = choose(*order)
        assert found.product == product
        assert all(other["metadata"]["labels"]["nvidia.com/gpu.product"] in found.reason for other in nodes)


def test_cordoned_devices_count_for_nothing() -> None:
    cordoned = node("a", labels=L4, gpu=8)
    cordoned["spec"]["unschedulable"] = True
    assert choose(cordoned, node("b", labels=T4, gpu=1)).product == "Tesla-T4"
    assert choose(cordoned).product == "NVIDIA-L4"


def test_a_node_selector_narrows_what_auto_sees() -> None:
    raws = [node("a", labels={**H100, "pool": "x"}, gpu=1), node("b", labels={**L4, "pool": "y"}, gpu=8)]
    assert choose(*raws, nodeSelector={"pool": "x"}).product == "NVIDIA-H100-80GB-HBM3"


def test_nodes_whose_taints_nothing_tolerates_are_not_there() -> None:
    theirs, ours = node("a", labels=H100, gpu=8), node("b", labels=L4, gpu=1)
    theirs["spec"]["taints"] = [{"key": "team", "value": "other", "effect": "NoSchedule"}]
    ours["spec"]["taints"] = [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "soft", "effect": "PreferNoSchedule"},
    ]
    assert choose(theirs, ours).product == "NVIDIA-L4"
    for toleration in (
        {"key": "team", "operator": "Exists"},
        {"key": "team", "value": "other", "effect": "NoSchedule"},
        {"operator": "Exists"},
    ):
        assert choose(theirs, ours, tolerations=[toleration]).product == "NVIDIA-H100-80GB-HBM3"
    wrong = {"key": "team", "value": "other", "effect": "NoExecute"}
    assert choose(theirs, ours, tolerations=[wrong]).product == "NVIDIA-L4"


def test_auto_takes_whole_devices_before_slices_and_shares() -> None:
    labels = {**H100, "nvidia.com/mig-1g.10gb.memory": "9984"}
    found = choose(node("a", labels=labels, mig_1g_10gb=14), node("b", labels=L4, gpu=1))
    assert found.product == "NVIDIA-L4"
    shared = node("c", labels=gfd("Tesla-T4-SHARED", 15360, count="1", replicas="10"), gpu=10)
    assert choose(shared, node("b", labels=L4, gpu=1)).product == "NVIDIA-L4"
    found = choose(shared)
    assert (found.product, found.memory_mib) == ("Tesla-T4", 1536)
    assert found.pin == {"nvidia.com/gpu.product": ("Tesla-T4-SHARED",)}


def test_auto_takes_nodes_that_have_enough_devices_together() -> None:
    assert (
        choose(*(node(f"a{i}", labels=L4, gpu=1) for i in range(9)), node("b", labels=H100, gpu=4), count=4).product
        == "NVIDIA-H100-80GB-HBM3"
    )


def test_a_slice_has_its_part_of_speed_and_memory_and_its_own_resource() -> None:
    labels = {**H100, "nvidia.com/mig-1g.10gb.memory": "9984"}
    found = choose(node(labels=labels, mig_1g_10gb=7), type="h100-MIG-1g.10gb")
    assert (found.resource, found.memory_mib) == ("nvidia.com/mig-1g.10gb", 9984)
    assert found.tflops == pytest.approx(989 / 7, abs=0.1)
    unseen = resolve(gpu_spec(type="H100-MIG-3g.40gb"), None, min_compute_capability=CURRENT)
    assert (unseen.resource, unseen.memory_mib) == ("nvidia.com/mig-3g.40gb", 38880)


def test_parts_of_devices_do_not_work_together() -> None:
    shared = node(labels=gfd("Tesla-T4-SHARED", 15360, count="1", replicas="4"), gpu=4)
    with pytest.raises(GPUUnsupported, match=r"spec\.gpu\.count is 2 and Tesla-T4 shared by 4"):
        choose(shared, count=2)
    with pytest.raises(GPUUnsupported, match="set count to 1"):
        choose(type="H100-MIG-1g.10gb", count=2)


def test_a_share_of_which_nothing_is_known_needs_its_memory() -> None:
    with pytest.raises(GPUUnknown, match=r"spec\.gpu\.type: no node tells how many share t4-shared.*memoryMiB"):
        choose(type="t4-shared")
    assert choose(type="t4-shared", memoryMiB=5000).memory_mib == 5000


@pytest.mark.parametrize(
    ("found", "is_whole"),
    [
        (choose(type="L4"), True),
        (choose(type="cpu"), True),
        (choose(node(labels=L4, gpu=1)), True),
        (choose(type="H100-MIG-1g.10gb"), False),
        (choose(type="t4-shared", memoryMiB=5000), False),
        (choose(node(labels=gfd("Tesla-T4-SHARED", 15360, count="1", replicas="4"), gpu=4)), False),
    ],
)
def test_a_slice_and_a_share_are_no_whole_device(found: ResolvedGpu, is_whole: bool) -> None:
    assert found.is_whole == is_whole


def test_several_shares_are_refused_where_no_node_is_known_too() -> None:
    with pytest.raises(GPUUnsupported, match=r"spec\.gpu\.count is 2 and t4 is a part of a device"):
        choose(type="t4-shared", memoryMiB=5000, count=2)


def test_more_devices_than_any_node_has_are_noted() -> None:
    found = choose(node(labels=L4, gpu=2), count=4)
    assert any("spec.gpu.count is 4 and no node has more than 2 of NVIDIA-L4" in note for note in found.notes)
    assert choose(node(labels=L4, gpu=4), count=4).notes == ()


@pytest.mark.parametrize(("name", "product"), [("l4", "NVIDIA-L4"), ("x900", "x900")])
def test_a_note_names_the_product_as_the_report_does(name: str, product: str) -> None:
    found = choose(type=name, memoryMiB=24000)
    assert found.product == product
    assert any(f"pods aren't pinned to {product}: no node has it now" in note for note in found.notes)


LABELS = st.dictionaries(
    st.sampled_from(
        [
            *PRODUCT_LABELS,
            "nvidia.com/gpu.memory",
            "nvidia.com/gpu.count",
            "nvidia.com/gpu.replicas",
            "nvidia.com/gpu.compute.major",
            "nvidia.com/gpu.compute.minor",
            "nvidia.com/mig-1g.10gb.memory",
            "karpenter.k8s.aws/instance-gpu-memory",
            "cloud.google.com/gke-gpu-partition-size",
            "cloud.google.com/gke-max-shared-clients-per-gpu",
        ]
    ),
    st.sampled_from(
        ["NVIDIA-L4", "h100", "x900-SHARED", "A100-MIG-1g.5gb", "1g.5gb", "0", "1", "3", "40000", "-1", "", "?"]
    ),
)
COUNTS = st.dictionaries(st.sampled_from(["gpu", "shared", "mig_1g_10gb"]), st.integers(0, 8))


@given(
    st.lists(st.tuples(LABELS, COUNTS), max_size=4),
    st.sampled_from(["auto", "cpu", "L4", "h100-MIG-1g.10gb", "t4-shared", "x900", "v100"]),
    st.integers(1, 8),
)
def test_any_nodes_give_a_gpu_or_an_error_that_the_user_can_cure(nodes: list[Any], name: str, count: int) -> None:
    raws = [node(f"n{index}", labels=labels, **counts) for index, (labels, counts) in enumerate(nodes)]
    try:
        found = choose(*raws, type=name, **({} if name == "cpu" else {"count": count}))
    except TuningError as error:
        text = str(error)
    else:
        assert found.memory_mib > 0
        text = found.reason
        assert 0 <= free_gpus(raws, [], found) <= 8
    assert text


def test_the_pin_can_be_turned_off() -> None:
    assert choose(node(labels=L4, gpu=1), pin=False).pin == {}


def test_an_unknown_product_is_sized_by_its_labels() -> None:
    labels = {**gfd("NVIDIA-X900", 50000), "nvidia.com/gpu.compute.major": "13", "nvidia.com/gpu.compute.minor": "1"}
    for spec in ({}, {"type": "x900"}):
        found = choose(node(labels=labels, gpu=1), **spec)
        assert (found.memory_mib, found.compute_capability) == (50000, (13, 1))
        assert any("isn't in the catalogue" in note for note in found.notes)


def test_an_unknown_product_without_memory_is_an_error_that_helps() -> None:
    with pytest.raises(GPUUnknown, match=r"spec\.gpu\.type: h1000 .*spec\.gpu\.memoryMiB.*NVIDIA-H100"):
        choose(node(labels=L4, gpu=1), type="h1000")
    assert choose(node(), type="x900", memoryMiB=24000).memory_mib == 24000


@pytest.mark.parametrize("nodes", [(), (node(labels=gfd("Tesla-V100-SXM2-16GB", 16384), gpu=4),)])
def test_a_card_that_the_image_does_not_run_on_is_refused(nodes: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(GPUUnsupported, match=r"7\.0 and the engine image starts at 7\.5"):
        choose(*nodes, type="v100")


def test_auto_passes_over_cards_that_the_image_does_not_run_on() -> None:
    v100 = node("a", labels=gfd("Tesla-V100-SXM2-16GB", 16384), gpu=8)
    assert choose(v100, node("b", labels=T4, gpu=1)).product == "Tesla-T4"
    with pytest.raises(GPUUnsupported):
        choose(v100)


@pytest.mark.parametrize(
    ("pod_memory", "spec", "expected"),
    [(4096, {"memoryMiB": 9999}, 4096), (None, {"memoryMiB": 2048}, 2048), (None, {}, 8192)],
)
def test_a_cpu_has_the_memory_of_the_pod_else_the_specs_else_the_default(
    pod_memory: int | None, spec: dict[str, int], expected: int
) -> None:
    found = resolve(gpu_spec(type="cpu", **spec), None, min_compute_capability=CURRENT, cpu_memory_mib=pod_memory)
    assert (found.product, found.memory_mib, found.resource, found.pin) == ("cpu", expected, None, {})
    assert found.is_cpu


def test_every_failure_is_one_that_the_user_can_cure() -> None:
    for error in (GPUTypeRequired, GPUUnknown, GPUUnsupported):
        assert issubclass(error, TuningError)


# --- free devices ----------------------------------------------------------------------------------------------------


def free(nodes: list[dict[str, Any]], pods: list[dict[str, Any]], **more: Any) -> int:
    resolved = choose(*nodes, type="l4")
    return free_gpus(nodes, pods, resolved, **more)


def test_free_is_what_no_live_pod_has_on_one_node() -> None:
    nodes = [node("a", labels=L4, gpu=4), node("b", labels=L4, gpu=4), node("c", labels=H100, gpu=8)]
    pods = [pod("a", 3), pod("b", 1), pod("b", 1), pod("b", 2, phase="Succeeded"), pod("c", 1)]
    assert free(nodes, pods) == 2
    assert free(nodes, []) == 4


def test_pods_that_wait_for_a_node_take_what_is_free() -> None:
    assert free([node("a", labels=L4, gpu=4)], [pod(None, 3, phase="Pending")]) == 1
    assert free([node("a", labels=L4, gpu=2)], [pod(None, 3, phase="Pending")]) == 0


def test_a_pod_that_waits_for_other_nodes_takes_nothing_here() -> None:
    by_selector, by_affinity = pod(None, 3, phase="Pending"), pod(None, 3, phase="Pending")
    by_selector["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": "NVIDIA-H200"}
    expression = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-H200"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    by_affinity["spec"]["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    assert free([node("a", labels=L4, gpu=4)], [by_selector, by_affinity]) == 4
    expression["values"].append("NVIDIA-L4")
    assert free([node("a", labels=L4, gpu=4)], [by_selector, by_affinity]) == 1


def test_another_resource_takes_nothing() -> None:
    assert free([node("a", labels=L4, gpu=2)], [pod("a", 2, resource="nvidia.com/mig-1g.10gb")]) == 2


def test_devices_where_the_pod_may_not_run_are_not_free() -> None:
    tainted, elsewhere, cordoned = (node(name, labels=L4, gpu=8) for name in "abc")
    tainted["spec"]["taints"] = [{"key": "team", "effect": "NoSchedule"}]
    elsewhere["metadata"]["labels"]["pool"] = "x"
    cordoned["spec"]["unschedulable"] = True
    nodes = [tainted, elsewhere, cordoned, node("d", labels={**L4, "pool": "y"}, gpu=1)]
    assert free(nodes, [], node_selector={"pool": "y"}) == 1
    assert free(nodes, [pod("b", 8), pod("d", 1)]) == 0
    assert free(nodes, [pod("b", 8)], tolerations=[{"operator": "Exists"}]) == 8


def test_init_containers_hold_devices_first_and_sidecars_beside() -> None:
    raw = node("a", labels=L4, gpu=8)
    one = pod("a", 1)
    request = {"resources": {"requests": {"nvidia.com/gpu": "2"}}}
    one["spec"]["initContainers"] = [request, {**request, "restartPolicy": "Always"}]
    assert free([raw], [one]) == 5


def test_a_cpu_needs_no_free_gpu() -> None:
    cpu = resolve(gpu_spec(type="cpu"), None, min_compute_capability=CURRENT)
    assert free_gpus([node(labels=L4, gpu=4)], [], cpu) == 0
