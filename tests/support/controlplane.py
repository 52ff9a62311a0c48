"""A real control plane on the loopback interface: etcd, API server, controllers and scheduler, started in seconds.

Nothing here is simulated, so that what the operator's tests say of server-side apply, CEL, RBAC, garbage collection
or a lost watch holds in a cluster. Only kubelets are missing: see fake_nodes.py and the node stand-in.
"""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from e2e.controlplane.build import built, is_complete

import control_flags as flags
from control_audit import AuditLog, policy
from control_certificates import Authority
from control_client import ApiError
from control_cluster import Cluster, write_kubeconfig
from control_identities import Identities, signing_key
from control_processes import Program, ProgramFailed, free_port

_DRAINING_SECONDS = 2.0
_ATTEMPTS = 3
"""A port that was free may be taken by the time it is used; then all starts again on others."""


class NoControlPlane(Exception):
    """There is none to run against; the message says how to get one."""


def find_control_plane(environment: Mapping[str, str] = os.environ, *, autoscaler_seconds: float = 2.0) -> Cluster:
    """The user's cluster (KUBECONFIG), else programs of KUBEBUILDER_ASSETS, else the built ones; to be entered."""
    if given := environment.get("KUBECONFIG"):
        return Cluster(Path(given), kubectl=Path(shutil.which("kubectl") or built() / "kubectl"))
    assets = environment.get("KUBEBUILDER_ASSETS")
    for folder in [*([Path(assets)] if assets else []), built()]:
        if is_complete(folder):
            return ControlPlane(folder, autoscaler_seconds=autoscaler_seconds)
    raise NoControlPlane("no control plane: run `python e2e/controlplane/build.py` once, or set KUBECONFIG")


class ControlPlane(Cluster):
    """A control plane of the programs in ``programs``, running while entered; its folder goes when it is left.

    Autoscalers look every ``autoscaler_seconds``; Kubernetes' own default is 15.
    """

    started_here = True

    def __init__(self, programs: Path | None = None, *, autoscaler_seconds: float = 2.0) -> None:
        self.program_folder = programs or built()
        self.folder = Path(tempfile.gettempdir()) / f"pagedserve-control-plane-{uuid.uuid4().hex[:12]}"
        super().__init__(self.folder / "admin.kubeconfig", kubectl=self.program_folder / "kubectl")
        self._files = flags.Files(self.folder)
        self._identities = Identities()
        self._autoscaler_seconds = autoscaler_seconds
        self._front_proxy = Authority.new()
        self._url = ""
        self._running: dict[str, Program] = {}
        self._audit = AuditLog(self._files.audit_log, self.client)

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700)
        self._identities.start()
        try:
            self._prepare()
            self._start_server()
            self._start_controllers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop_all()
        self._identities.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return self._url

    @property
    def ca(self) -> Path:
        return self._files.authority

    @property
    def front_proxy(self) -> Authority:
        return self._front_proxy

    @property
    def audit(self) -> AuditLog:
        return self._audit

    @property
    def programs(self) -> Mapping[str, Program]:
        """Every program that was started here, by its name: for their logs, and to pause one."""
        return self._running

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A service account is the user ``system:serviceaccount:<namespace>:<name>``; its groups come by themselves."""
        if user.startswith("system:serviceaccount:"):
            groups = [*groups, "system:serviceaccounts", f"system:serviceaccounts:{user.split(':')[2]}"]
        token = self._identities.add(user, [*groups, "system:authenticated"])
        path = self.folder / f"{uuid.uuid4().hex}.kubeconfig"
        return write_kubeconfig(path, url=self.url, ca=self.ca, user=user, token=token)

    def start_program(self, name: str, *flags: str | Path) -> Program:
        program = Program(name, [self.program_folder / name, *flags], folder=self.folder)
        self._running[name] = program
        program.start()
        return program

    def stop_apiserver(self, *, kill: bool = False) -> None:
        # It would wait a minute for the watches of the controllers, who keep theirs.
        self._running["kube-apiserver"].stop(kill=kill, seconds=_DRAINING_SECONDS)

    def start_apiserver(self) -> None:
        server = self._running["kube-apiserver"]
        server.start()
        server.await_ready(self._answers)

    def pause_apiserver(self) -> None:
        self._running["kube-apiserver"].pause()

    def resume_apiserver(self) -> None:
        self._running["kube-apiserver"].resume()

    def _prepare(self) -> None:
        self._files.audit_policy.write_text(policy())
        self._files.signing_key.touch(mode=0o600)
        self._files.signing_key.write_text(signing_key())
        self._files.front_proxy_authority.write_bytes(self._front_proxy.pem)
        self._front_proxy.client().write(self._files.front_proxy_certificate, self._files.front_proxy_key)
        write_kubeconfig(self._files.webhook, url=self._identities.url, ca=None, user="apiserver", token="unused")

    def _start_server(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._start_server_once()
            except ProgramFailed as failure:
                if "address already in use" not in str(failure) or attempt == _ATTEMPTS:
                    raise
                self._stop_all()

    def _start_server_once(self) -> None:
        etcd_port, port = free_port(), free_port()
        self._url = f"https://127.0.0.1:{port}"
        store = self.start_program("etcd", *flags.etcd(self._files, port=etcd_port, peer_port=free_port()))
        store.await_ready(partial(_is_healthy, f"http://127.0.0.1:{etcd_port}/health"))
        server = self.start_program("kube-apiserver", *flags.apiserver(self._files, port=port, etcd_port=etcd_port))
        server.await_ready(self.ca.exists)
        token = self._identities.add("admin", ["system:masters", "system:authenticated"])
        write_kubeconfig(self.kubeconfig, url=self.url, ca=self.ca, user="admin", token=token)
        server.await_ready(self._answers)

    def _start_controllers(self) -> None:
        controllers = partial(flags.controller_manager, autoscaler_seconds=self._autoscaler_seconds)
        chosen = {"kube-controller-manager": controllers, "kube-scheduler": flags.scheduler}
        ports = {name: free_port() for name in chosen}
        for name, flags_of in chosen.items():
            kubeconfig = self.kubeconfig_for(f"system:{name}", ["system:masters"])
            self.start_program(name, *flags_of(self._files, port=ports[name], kubeconfig=kubeconfig))
        for name, port in ports.items():
            self._running[name].await_ready(partial(_is_healthy, f"https://127.0.0.1:{port}/healthz"))
        # No pod can be created before the controllers made this.
        client = self.client()
        client.wait(
            lambda: client.find("v1", "ServiceAccount", "default", namespace="default"),
            "the controllers made the default service account",
        )

    def _stop_all(self) -> None:
        # Nothing of theirs is kept, so none needs to end in order.
        for program in reversed(self._running.values()):
            program.stop(kill=True)
        self._running.clear()

    def _answers(self) -> bool:
        try:
            return bool(self.client().request("GET", "/readyz") == "ok")
        except (OSError, ApiError):
            return False


def _is_healthy(url: str) -> bool:
    """Whether a program says so itself; its certificate, made a moment ago, proves nothing."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, context=context, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
