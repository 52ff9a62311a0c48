"""The scripts that build, release and repair, with a builder that only writes down what it is asked."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

import fake_builder
from fake_builder import asked, option

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / ".ci/images"

NCCL = """
int ncclSend(void) { return 0; }
const char *ncclGetErrorString(int status) { return 0; }
int ncclGetVersion(void) { return 9; }
"""
TORCH = """
int cublasCreate(void), ncclSend(void), ncclGetVersion(void);
const char *ncclGetErrorString(int);
int multiply(int a) { return 2 * a; }
int create(void) { return cublasCreate(); }
int send(void) { return ncclSend(); }
int version(void) { return ncclGetVersion(); }
const char *why(void) { return ncclGetErrorString(1); }
"""


def run(script: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return fake_builder.run(SCRIPTS / script, environment, *words)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"images_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    return fake_builder.install(tmp_path, "docker")


def test_both_images_are_built_and_their_sboms_lie_beside(docker: dict[str, str]) -> None:
    done = run("build.py", {**docker, "VERSION": "9.9", "BASE_IMAGE": "example/base:1"})
    assert done.returncode == 0, done.stderr
    builds = [words for words in asked(docker) if words[1] == "build"]
    assert [option(words, "--tag") for words in builds if "--tag" in words] == [
        ["pagedserve/engine:9.9"],
        ["pagedserve/operator:9.9"],
    ]
    # An image with attestations is an index, whose absent parts `kind load` stumbles over.
    assert all({"--provenance=false", "--sbom=false"} <= set(words) for words in builds)
    assert {path.name for path in Path(docker["OUTPUT"]).iterdir()} == {
        "engine-9.9.cdx.json",
        "operator-9.9.cdx.json",
    }
    assert "pagedserve/engine:9.9: 3000 MB, 2900 MB of them over its base" in done.stdout


def test_settings_reach_the_builder(docker: dict[str, str], tmp_path: Path) -> None:
    apt = tmp_path / "apt.conf"
    apt.write_text("")
    given = {"IMAGES": "engine", "IMAGE_PREFIX": "example.org/team", "VERSION": "9.9", "VARIANT": "cpu"}
    given |= {
        "BASE_IMAGE": "example/base:1",
        "BUILD_NETWORK": "host",
        "APT_CONF": str(apt),
        "https_proxy": "http://p:1",
    }
    assert run("build.py", {**docker, **given}).returncode == 0
    words = asked(docker)[0]
    arguments = dict(pair.split("=", 1) for pair in option(words, "--build-arg"))
    assert arguments["BASE_IMAGE"] == "example/base:1"
    assert arguments["VARIANT"] == "cpu"
    assert arguments["https_proxy"] == "http://p:1"
    assert len(arguments["REVISION"].removesuffix("-dirty")) == 40
    assert option(words, "--tag") == ["example.org/team/engine:9.9-cpu"]
    assert option(words, "--secret") == [f"id=apt.conf,src={apt}"]
    assert option(words, "--network") == ["host"]
    assert words[-1] == str(ROOT)


def test_the_version_is_the_projects_where_none_is_given(docker: dict[str, str]) -> None:
    assert run("build.py", {**docker, "IMAGES": "operator"}).returncode == 0
    (tag,) = option(asked(docker)[0], "--tag")
    assert f'version = "{tag.rpartition(":")[2]}"' in (ROOT / "operator/pyproject.toml").read_text()


def test_without_git_the_revision_is_unknown(docker: dict[str, str]) -> None:
    fake_builder.uninstall_git(docker)
    done = run("build.py", {**docker, "IMAGES": "operator"})
    assert done.returncode == 0, done.stderr
    assert "REVISION=unknown" in option(asked(docker)[0], "--build-arg")


@pytest.mark.parametrize("builder", ["podman", "buildah"])
def test_other_builders_keep_the_health_check(builder: str, tmp_path: Path) -> None:
    environment = fake_builder.install(tmp_path, builder)
    assert run("build.py", {**environment, "IMAGES": "operator"}).returncode == 0
    words = asked(environment)[0]
    assert words[:2] == [builder, "build"]
    assert option(words, "--format") == ["docker"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"VARIANT": "rocm"}, "VARIANT is 'rocm': give cuda or cpu"),
        ({"IMAGES": "engine router"}, "IMAGES is 'router': give engine or operator"),
        ({"BUILDER": "kaniko"}, "BUILDER is 'kaniko': give docker or podman or buildah"),
        ({"BUILDER": "podman"}, "no builder answers (podman)"),
        ({"PIP_CONF": "/nowhere"}, "PIP_CONF is '/nowhere', which is no file"),
        ({"FAKE_BUILDER_FAILS": "version"}, "no builder answers (docker, podman, buildah): start Docker's daemon"),
        ({"FAKE_BUILDER_FAILS": "build"}, "docker build ended with 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_stops_a_build_is_named_with_its_cure(docker: dict[str, str], given: dict[str, str], said: str) -> None:
    done = run("build.py", {**docker, **given})
    assert done.returncode == 1
    assert said in done.stderr


class OnIPv6(HTTPServer):
    """Takes no connections of IPv4, as asyncio's servers."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


@contextmanager
def answering(kind: type[HTTPServer], address: str) -> Iterator[int]:
    """The port of a server on which /well is well and all else is not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/well" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with kind((address, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("host", "kind", "address"),
    [
        ("", HTTPServer, "127.0.0.1"),
        ("0.0.0.0", HTTPServer, "127.0.0.1"),
        ("::", OnIPv6, "::1"),
        ("::1", OnIPv6, "::1"),
    ],
)
def test_a_health_check_asks_the_containers_own_port(host: str, kind: type[HTTPServer], address: str) -> None:
    with answering(kind, address) as port:
        environment = {"HOST": host, "PORT": str(port)}
        well = run("health.py", environment, "HOST", "PORT", "1", "/well")
        assert well.returncode == 0, well.stdout
        ill = run("health.py", environment, "HOST", "PORT", "1", "/ill")
        assert (ill.returncode, "503" in ill.stdout) == (1, True)
        nobody = run("health.py", {"HOST": host}, "HOST", "PORT", "1", "/well")
        assert (nobody.returncode, "port 1" in nobody.stdout) == (1, True)


@pytest.mark.skipif(not shutil.which("gcc") or not shutil.which("readelf"), reason="needs gcc and readelf")
def test_a_library_runs_where_what_it_links_against_is_left_out(tmp_path: Path) -> None:
    lib, kept = tmp_path / "torch/lib", tmp_path / "nvidia"
    lib.mkdir(parents=True)
    kept.mkdir()
    (kept / "left.h").write_text("")

    def compiled(soname: str, source: str, *flags: str) -> None:
        (tmp_path / "source.c").write_text(source)
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(lib / soname), "source.c", *flags]
        subprocess.run(command, cwd=tmp_path, check=True)

    (tmp_path / "versions").write_text("libcublas.so.13 { global: *; };\n")
    compiled("libcublas.so.13", "int cublasCreate(void) { return 0; }", "-Wl,--version-script=versions")
    compiled("libnccl.so.2", NCCL)
    compiled("libtorch_cuda.so", TORCH, "-L", str(lib), "-l:libcublas.so.13", "-l:libnccl.so.2", "-Wl,-rpath,$ORIGIN")
    for name in ("libcublas.so.13", "libnccl.so.2"):
        (lib / name).unlink()

    without_cuda = load("without_cuda")
    for stand_in in without_cuda.missing(lib, kept):
        without_cuda.compile_into(lib, stand_in)
    without_cuda.drop_unneeded(lib, kept)

    library = ctypes.CDLL(str(lib / "libtorch_cuda.so"))
    library.why.restype = ctypes.c_char_p
    assert (library.multiply(21), library.create(), library.send(), library.version()) == (42, 1, 1, 0)
    assert library.why() == b"CUDA is left out of this image"
    assert not list(kept.iterdir())
