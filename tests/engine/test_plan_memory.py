"""The memory plan on the command line, and settings that can't be: one line says which and what would fit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models import tiny_chat_model
from processes import run_engine


@pytest.fixture(scope="module")
def folder() -> str:
    return str(tiny_chat_model()[1])


def test_the_plan_is_a_table_of_memory_and_settings(folder: str) -> None:
    done = run_engine("plan-memory", "--model", folder, "--num-blocks", "64", "--dtype", "float32")
    assert done.status == 0, done.log
    lines = done.out.splitlines()
    assert lines[0].split() == ["memory", "size", "share"]
    names = [line.split("  ")[0] for line in lines]
    for name in (
        "weights",
        "activations of 2048 tokens",
        "cache: 64 blocks of 32 tokens",
        "budget",
        "setting",
        "NUM_BLOCKS",
    ):
        assert name in names
    assert next(line for line in lines if line.startswith("NUM_BLOCKS")).split() == ["NUM_BLOCKS", "64", "64"]


def test_the_plan_is_json_where_that_is_asked_for(folder: str) -> None:
    done = run_engine("plan-memory", "--json", "--model", folder, "--num-blocks", "64", "--dtype", "float32")
    assert done.status == 0, done.log
    plan = json.loads(done.out)
    assert plan["settings"]["num_blocks"] == {"requested": 64, "actual": 64}
    # 63 blocks of 32 tokens beside the null block hold 2016 tokens: less than the model's 8192.
    assert plan["settings"]["max_model_len"] == {"requested": "auto", "actual": plan["longest_sequence"]}
    assert plan["longest_sequence"] == 63 * 32
    # Two layers of one head of 16 numbers, keys and values, in float32.
    assert plan["block"] == {"tokens": 32, "bytes": 32 * 2 * 2 * 16 * 4}
    assert plan["bytes"]["cache"] == 64 * plan["block"]["bytes"]
    assert plan["bytes"]["used"] <= plan["bytes"]["budget"] <= plan["bytes"]["total"]


IMPOSSIBLE: dict[str, tuple[list[str], list[str]]] = {
    "longer than the model": (["--max-model-len", "9000"], ["MAX_MODEL_LEN", "9000", "8192"]),
    "longer than the cache": (
        ["--num-blocks", "2", "--max-model-len", "8192"],
        ["MAX_MODEL_LEN", "8192", "NUM_BLOCKS", "257"],
    ),
    "no such folder": (["--model", "/nowhere/model"], ["MODEL", "/nowhere/model"]),
    "no such type": (["--dtype", "float99"], ["dtype", "float99", "bfloat16"]),
    "no such device": (["--device", "cuda:99"], ["DEVICE", "cuda:99"]),
}


@pytest.mark.parametrize(("flags", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_ends_the_process_with_one_line(
    folder: str, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    message = tmp_path / "termination-log"
    message.write_text("")
    common = ["--model", folder, *flags, "--termination-message-path", str(message)]
    with ThreadPoolExecutor(2) as pool:
        planning = pool.submit(run_engine, "plan-memory", *common)
        serving = pool.submit(run_engine, "serve", "--host", "127.0.0.1", "--port", "0", *common)
    planned, served = planning.result(), serving.result()
    assert (planned.status, planned.out) == (1, "")
    assert all(word in planned.last_line for word in words), planned.log
    assert "Traceback" not in planned.log
    assert served.status == 1
    assert served.last_line == planned.last_line
    assert served.last_line == f"pagedserve-engine: {message.read_text()}"
    assert "Traceback" not in served.log
