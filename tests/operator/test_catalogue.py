import pytest

from pagedserve_operator.gpus.catalogue import CATALOGUE, canonical, find, resembling


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("nvidia-h100-80gb", "NVIDIA-H100-80GB-HBM3"),
        ("nvidia-h100-mega-80gb", "NVIDIA-H100-80GB-HBM3"),
        ("h100", "NVIDIA-H100-80GB-HBM3"),
        ("H100-SXM", "NVIDIA-H100-80GB-HBM3"),
        ("H100 PCIe", "NVIDIA-H100-PCIe"),
        ("nvidia-tesla-t4", "Tesla-T4"),
        ("NVIDIA-Tesla-T4", "Tesla-T4"),
        ("t4", "Tesla-T4"),
        ("A100-SXM4-40GB", "NVIDIA-A100-SXM4-40GB"),
        ("nvidia-tesla-a100", "NVIDIA-A100-SXM4-40GB"),
        ("nvidia-a100-80gb", "NVIDIA-A100-SXM4-80GB"),
        ("nvidia-l4", "NVIDIA-L4"),
        ("l40s", "NVIDIA-L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA-GeForce-RTX-4090"),
        ("rtx_4090", "NVIDIA-GeForce-RTX-4090"),
        ("nvidia-h200-141gb", "NVIDIA-H200"),
        ("gh200", "NVIDIA-GH200-480GB"),
        ("  b200 ", "NVIDIA-B200"),
    ],
)
def test_a_gpu_goes_by_the_names_of_labels_clouds_and_people(name: str, product: str) -> None:
    model = find(name)
    assert model is not None
    assert model.product == product


@pytest.mark.parametrize("name", ["", "h", "nvidia-", "mi300x", "H1000", "cpu"])
def test_another_name_is_unknown(name: str) -> None:
    assert find(name) is None


def test_each_row_tells_where_it_comes_from_and_is_of_this_world() -> None:
    assert len(CATALOGUE) >= 26
    for product, model in CATALOGUE.items():
        assert model.product == product
        assert model.source, product
        assert 15000 <= model.memory_mib <= 200_000, product
        assert 300 <= model.bandwidth_gbs <= 8000, product
        assert 60 <= model.tflops <= 2500, product
        assert (7, 0) <= model.compute_capability <= (12, 0), product


def test_no_two_products_share_a_name() -> None:
    for model in CATALOGUE.values():
        assert find(model.product) is model
        assert all(find(alias) is model for alias in model.aliases), model.product


def test_names_of_one_product_are_one_and_unknown_ones_stay_apart() -> None:
    assert canonical("NVIDIA-H100-80GB-HBM3") == canonical("h100") != canonical("h100-nvl")
    assert canonical("NVIDIA-X1") == canonical("x1") != canonical("x2")


def test_a_misspelt_name_finds_its_neighbours() -> None:
    assert "NVIDIA-H100-80GB-HBM3" in resembling("h1000")
    assert resembling("zzzzzz") == ()
