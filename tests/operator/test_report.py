from pagedserve_operator.report import report
from pagedserve_operator.tuning import decide
from tuning_cases import resolved, service, shape


def text(card: str = "L4", **spec: object) -> str:
    parsed = service(**spec)
    return report(parsed, decide(parsed, gpu=resolved(card), shape=shape(), default_image="pagedserve/engine:0.1.0"))


def test_a_report_names_model_gpu_settings_memory_and_notes() -> None:
    lines = text().splitlines()
    assert lines[0].split() == ["resource", "chat/llama"]
    assert any(line.startswith("GPU") and line.endswith("NVIDIA-L4, 23034 MiB") for line in lines)
    assert any(line.split() == ["maxBatchTokens", "1024", "computed"] for line in lines)
    assert any(line.split()[:2] == ["weights", "15622"] for line in lines)
    assert lines[-1].startswith("note: ")


def test_columns_are_aligned() -> None:
    table = text().split("\n\n")[2].splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[-1].split()[-2:] == ["100.0", "%"]


def test_what_the_user_gave_is_marked_and_several_devices_are_counted() -> None:
    found = text("A100", gpu={"type": "A100"}, tuning={"numBlocks": 50})
    assert any(line.split() == ["numBlocks", "50", "spec"] for line in found.splitlines())
    parsed = service(gpu={"count": 4})
    four = report(parsed, decide(parsed, gpu=resolved("A100", count=4), shape=shape(), default_image="a/b:1"))
    assert "4 x NVIDIA-A100-SXM4-40GB" in four
