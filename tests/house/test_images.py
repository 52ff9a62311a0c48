"""What can be said of the images without building them; tests/images has the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from children import cpu_tuning, service
from pagedserve_operator.desired import Facts, pod_template
from pagedserve_operator.desired.pods import USER_ID

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / ".ci/images"
DOCKERFILES = {name: (ROOT / f"Dockerfile.{name}").read_text(encoding="utf-8") for name in ("engine", "operator")}
LABELS = ("title", "description", "source", "version", "revision", "licenses", "base.name")
CREDENTIALS = re.compile(r"token|passw|secret|credential|api_?key|index_url", re.IGNORECASE)

each_image = pytest.mark.parametrize("image", DOCKERFILES)


def instructions(image: str) -> list[tuple[str, str]]:
    """(Keyword, the rest) of each instruction, continued lines joined."""
    rows = [row for row in DOCKERFILES[image].splitlines() if row and not row.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(rows))
    pairs = [row.split(maxsplit=1) for row in joined.splitlines()]
    return [(keyword, rest) for keyword, rest in pairs]


def final_stage(image: str) -> list[tuple[str, str]]:
    """What is shipped: the instructions from the last FROM on."""
    rows = instructions(image)
    last = max(index for index, (keyword, _) in enumerate(rows) if keyword == "FROM")
    return rows[last:]


def only(image: str, keyword: str) -> str:
    (found,) = [rest for name, rest in final_stage(image) if name == keyword]
    return found


def variables(image: str) -> dict[str, str]:
    rows = [rest for name, rest in final_stage(image) if name == "ENV"]
    return dict(pair.split("=", 1) for rest in rows for pair in rest.split())


def operator_deployment() -> dict[str, object]:
    return yaml.safe_load((ROOT / "manifests/base/deployment.yaml").read_text(encoding="utf-8"))["spec"]["template"][
        "spec"
    ]


@each_image
def test_processes_are_started_without_a_shell_between(image: str) -> None:
    for keyword in ("ENTRYPOINT", "CMD"):
        words = json.loads(only(image, keyword))
        assert all(isinstance(word, str) for word in words)
    assert json.loads(only(image, "ENTRYPOINT")) == [f"/opt/pagedserve/bin/pagedserve-{image}"]
    assert only(image, "STOPSIGNAL") == "SIGTERM"


def test_what_runs_without_arguments_is_what_the_pods_expect() -> None:
    assert json.loads(only("engine", "CMD")) == ["serve"]
    (container,) = operator_deployment()["containers"]  # type: ignore[misc]
    assert json.loads(only("operator", "CMD")) == container["args"]


@each_image
def test_the_health_check_needs_no_shell_and_no_extra_program(image: str) -> None:
    words = json.loads(only(image, "HEALTHCHECK").split(" CMD ", 1)[1])
    assert words[0] == "/opt/pagedserve/bin/python"
    assert words[3] == "/opt/pagedserve/health.py"
    assert words[6] == only(image, "EXPOSE")


def test_users_are_numbers_and_those_of_the_pods() -> None:
    assert only("engine", "USER") == f"{USER_ID}:{USER_ID}"
    security = operator_deployment()["securityContext"]
    assert only("operator", "USER") == "{runAsUser}:{runAsGroup}".format(**security)  # type: ignore[arg-type]


def test_the_engine_writes_where_its_pods_have_volumes() -> None:
    template = pod_template(service({"gpu": {"type": "cpu"}}), cpu_tuning(), Facts())
    pod = {row["name"]: row.get("value") for row in template["spec"]["containers"][0]["env"]}
    image = variables("engine")
    for name in ("HOME", "HF_HOME", "CACHE_DIR"):
        assert image[name] == pod[name]


@each_image
def test_nothing_is_written_beside_the_sources(image: str) -> None:
    assert variables(image)["PYTHONDONTWRITEBYTECODE"] == "1"
    assert variables(image)["HOME"] == "/tmp"


@each_image
def test_every_label_of_the_open_container_initiative_is_there(image: str) -> None:
    said = only(image, "LABEL")
    for label in LABELS:
        assert re.search(rf'org\.opencontainers\.image\.{re.escape(label)}="[^"]+"', said), label


@each_image
def test_the_base_is_an_argument_and_nothing_else_is_pulled(image: str) -> None:
    rows = instructions(image)
    assert rows[0][0] == "ARG"
    assert rows[0][1].startswith("BASE_IMAGE=")
    stages = [rest.split() for keyword, rest in rows if keyword == "FROM"]
    assert [words[0] for words in stages] == ["${BASE_IMAGE}", "base", "base"]
    assert not re.search(r"^#\s*syntax=", DOCKERFILES[image], re.MULTILINE)


@each_image
def test_build_tools_stay_in_the_stage_that_builds(image: str) -> None:
    assert [keyword for keyword, _ in final_stage(image)].count("RUN") == 1
    copied = [rest.split() for keyword, rest in final_stage(image) if keyword == "COPY"]
    assert copied[0] == ["--from=build", "/opt/pagedserve", "/opt/pagedserve"]
    assert copied[1:] == [["LICENSE", ".ci/images/health.py", "/opt/pagedserve/"]]
    assert "apt-get" not in str(final_stage(image))


@each_image
def test_no_secret_is_an_argument_or_a_variable(image: str) -> None:
    for keyword, rest in instructions(image):
        if keyword in ("ARG", "ENV"):
            assert not CREDENTIALS.search(rest), rest
    # Only RUN's own mount shows a secret to one command.
    for secret in ("apt.conf", "pip.conf", "uv.toml"):
        assert f"--mount=type=secret,id={secret}" in DOCKERFILES[image]


@each_image
def test_an_image_holds_its_own_component_only(image: str) -> None:
    copied = [rest.split()[0] for keyword, rest in instructions(image) if keyword == "COPY" and "--from" not in rest]
    assert {"engine", "operator"} & set(copied) == {image}


def test_the_context_is_a_list_of_what_goes_in() -> None:
    rows = [
        row for row in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if row[:1] not in ("#", "")
    ]
    assert rows[0] == "*"
    allowed = {row[1:] for row in rows if row.startswith("!")}
    assert allowed == {".ci/images", "LICENSE", "pyproject.toml", "uv.lock", "engine", "operator"}
    # Compiled for this machine, and not by the image's compiler.
    assert "**/kernels.so*" in rows


def test_packages_come_from_the_lock_and_are_never_built() -> None:
    script = (SCRIPTS / "packages.sh").read_text(encoding="utf-8")
    assert "sync --frozen --no-build" in script
    for name in ("engine.sh", "operator.sh"):
        assert "--no-deps --no-index" in (SCRIPTS / name).read_text(encoding="utf-8")


def test_build_tools_are_pinned_by_hash_and_uv_is_the_projects() -> None:
    text = (SCRIPTS / "tools.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z,-]+\])?==([^\s;]+)", text, re.MULTILINE))
    assert {"uv", "hatchling", "cyclonedx-bom"} <= set(pinned)
    blocks = re.split(r"\n(?=[a-z0-9])", text)
    assert all("--hash=sha256:" in block for block in blocks if re.match(r"[a-z0-9]", block))
    wanted = re.search(r"^pinned=(.+)$", (ROOT / ".ci/uv").read_text(encoding="utf-8"), re.MULTILINE)
    assert wanted is not None
    assert pinned["uv"] == wanted.group(1)
    assert "--require-hashes" in (SCRIPTS / "tools.sh").read_text(encoding="utf-8")


@each_image
def test_every_argument_is_explained(image: str) -> None:
    document = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    for keyword, rest in instructions(image):
        if keyword == "ARG":
            assert f"`{rest.split('=')[0]}`" in document, rest
