"""What kind and docker are told, as values: rendered and checked where no daemon runs, executed where one does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml
from e2e.providers.provider import Images

CONFIG = Path(__file__).parents[1] / "kind-config.yaml"
FIRST_RELEASE = Path(__file__).parents[1] / "fixtures" / "first-release"
LIGHT_ENGINE = Path(__file__).parents[1] / "fixtures" / "light-engine"
SUPPORT = Path(__file__).parents[2] / "tests" / "support"
GPUS = "nvidia.com/gpu"
GPU_COUNT = f"{GPUS}.count"
NOTHING_RUNS = 3
"""Exit status of a kill that finds no container."""
_KUBEADM = ("kubeadm.k8s.io/v1beta3", "kubeadm.k8s.io/v1beta4")
"""Versions of kubeadm's configuration; a patch of one is left alone by the other."""


class BadVariable(Exception):
    """A variable can't be read; names it and the cure."""


@dataclass(frozen=True)
class Step:
    """One command with its standard input, and what it is for."""

    why: str
    command: tuple[str, ...]
    stdin: str = ""


@dataclass(frozen=True, kw_only=True)
class KindPlan:
    """A cluster of that name; see e2e/README.md for the variables."""

    cluster: str = "pagedserve-e2e"
    images: Images = field(default_factory=Images)
    reachable: bool = True
    """Whether Services answer at ports of this machine, which only one cluster can have."""
    small: bool = False
    """One worker instead of those that scenarios change: each node takes inotify watches of the machine's few."""
    node_image: str = ""
    kubelet_config: str = ""
    """A YAML mapping of KubeletConfiguration fields, such as ``{failCgroupV1: false}``."""
    kubelet_args: str = ""
    """``name=value`` flags of the kubelet, separated by blanks."""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The plan that the KIND_ variables ask for."""
        return cls(
            cluster=environment.get("KIND_CLUSTER") or "pagedserve-e2e",
            node_image=environment.get("KIND_NODE_IMAGE", ""),
            kubelet_config=environment.get("KIND_KUBELET_CONFIG", ""),
            kubelet_args=environment.get("KIND_KUBELET_ARGS", ""),
        )

    def config(self) -> str:
        """kind's configuration; raises BadVariable."""
        document: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        if self.small:
            document["nodes"] = document["nodes"][:2]
        if not self.reachable:
            for node in document["nodes"]:
                node.pop("extraPortMappings", None)
        if patches := [*self._config_patches(), *self._argument_patches()]:
            document["kubeadmConfigPatches"] = patches
        return yaml.safe_dump(document, sort_keys=False)

    def needs(self) -> list[Step]:
        """What fails where something is missing that the cluster needs."""
        return [self._image_is_built(image) for image in (self.images.operator, self.images.engine)]

    def up(self, kubeconfig: Path) -> list[Step]:
        """From nothing to a cluster with both images, its kubeconfig in that file."""
        image = ("--image", self.node_image) if self.node_image else ()
        create = ("kind", "create", "cluster", "--name", self.cluster, "--config", "-", "--wait", "180s")
        return [
            Step("create the cluster", (*create, *image, "--kubeconfig", str(kubeconfig)), self.config()),
            self.load((self.images.operator, self.images.engine)),
        ]

    def down(self) -> Step:
        return Step("delete the cluster", ("kind", "delete", "cluster", "--name", self.cluster))

    def load(self, images: Sequence[str]) -> Step:
        """Copy images of this machine's daemon to every node."""
        return Step("load images into the nodes", ("kind", "load", "docker-image", "--name", self.cluster, *images))

    def build(self, image: str) -> Step:
        """One of the images that only scenarios need, made from today's operator; raises LookupError for any other."""
        # `kind load` fails where an image's attestations are missing, which Docker's containerd store adds (kind#3795).
        plain = ("--provenance=false", "--sbom=false", f"--build-arg=BASE_IMAGE={self.images.operator}")
        folder, context = {
            self.images.first_operator: (FIRST_RELEASE, FIRST_RELEASE),
            self.images.light_engine: (LIGHT_ENGINE, SUPPORT),
        }[image]
        file = f"--file={folder / 'Dockerfile'}"
        return Step(f"build {image}", ("docker", "build", *plain, "--tag", image, file, str(context)))

    def lose(self, node: str) -> Step:
        return Step("cut the node's power", ("docker", "kill", node))

    def kill_apiserver(self) -> Step:
        """The kubelet starts it again."""
        shell = "kill -9 $(pidof kube-apiserver)"
        return Step("kill the API server", ("docker", "exec", f"{self.cluster}-control-plane", "sh", "-c", shell))

    def kill_pod(self, node: str, namespace: str, pod: str) -> Step:
        """SIGKILL to the first process of each container; inside the container it would be ignored."""
        which = f"--label=io.kubernetes.pod.name={pod} --label=io.kubernetes.pod.namespace={namespace}"
        # One by one: asked about no container, or about two, crictl answers with what is no process id.
        pid = "$(crictl inspect --output go-template --template '{{.info.pid}}' \"$id\")"
        shell = (
            f'ids=$(crictl ps --quiet {which}) || exit; [ -n "$ids" ] || exit {NOTHING_RUNS}; '
            f'for id in $ids; do kill -9 "{pid}" || exit; done'
        )
        return Step("kill the pod's processes", ("docker", "exec", node, "sh", "-c", shell))

    def _config_patches(self) -> list[str]:
        if not self.kubelet_config:
            return []
        try:
            given = yaml.safe_load(self.kubelet_config)
        except yaml.YAMLError as error:
            raise BadVariable(f"KIND_KUBELET_CONFIG is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise BadVariable("KIND_KUBELET_CONFIG must be a mapping such as {failCgroupV1: false}")
        head = {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration"}
        return [yaml.safe_dump({**head, **given})]

    def _argument_patches(self) -> list[str]:
        pairs = [argument.removeprefix("--").partition("=") for argument in self.kubelet_args.split()]
        if not pairs:
            return []
        if bad := [name for name, equals, _ in pairs if not equals]:
            raise BadVariable(f"KIND_KUBELET_ARGS has {bad[0]!r}: write name=value, separated by blanks")
        as_map = {name: value for name, _, value in pairs}
        as_list = [{"name": name, "value": value} for name, value in as_map.items()]
        return [
            yaml.safe_dump({"apiVersion": version, "kind": kind, "nodeRegistration": {"kubeletExtraArgs": arguments}})
            for version, arguments in zip(_KUBEADM, (as_map, as_list), strict=True)
            for kind in ("InitConfiguration", "JoinConfiguration")
        ]

    @staticmethod
    def _image_is_built(image: str) -> Step:
        return Step(
            f"look for {image}: `make images VARIANT=cpu` builds it", ("docker", "image", "inspect", "-f=ok", image)
        )


def set_gpus(gpus: int) -> list[dict[str, str]]:
    """JSON patch of a node's status: so many ``nvidia.com/gpu``, which the kubelet then offers."""
    return [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(gpus)}]
