"""A cluster as tests see it, whoever started it: where it is, who asks, and what only one of ours can do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import yaml

from control_access import Access
from control_audit import AuditLog
from control_certificates import Authority
from control_client import Client
from control_processes import Program


class Unsupported(Exception):
    """This cluster cannot do what a test needs, because the tests did not start it."""


class Cluster:
    """The cluster that ``kubeconfig`` names, entered and left without starting or stopping anything.

    ``kubeconfig`` is the administrator's file; ``kubectl``, later ``kubectl_program``, is what ``kubectl()`` runs.
    """

    started_here = False

    def __init__(self, kubeconfig: Path, *, kubectl: Path) -> None:
        self.kubeconfig = kubeconfig
        self.kubectl_program = kubectl

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None

    @property
    def url(self) -> str:
        return Access.of(self.kubeconfig).url

    @property
    def token(self) -> str | None:
        """The administrator's token; None where a client certificate stands for it."""
        return Access.of(self.kubeconfig).token

    @property
    def ca(self) -> Path:
        self._refuse("file of its certificate authority")

    @property
    def front_proxy(self) -> Authority:
        """Who signs the certificate by which the API server is known to the servers behind it."""
        self._refuse("key of its front proxy's authority")

    @property
    def audit(self) -> AuditLog:
        self._refuse("audit log")

    def client(self, kubeconfig: Path | None = None, *, user_agent: str = "tests") -> Client:
        """A blocking JSON client: the administrator's, or that of ``kubeconfig``."""
        return Client(Access.of(kubeconfig or self.kubeconfig), user_agent)

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        kubeconfig: Path | None = None,
        check: bool = True,
        seconds: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end; with ``check`` a failure raises AssertionError with what it said."""
        command = [str(self.kubectl_program), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stderr or done.stdout}"
        return done

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig of ``user`` in ``groups``, who may do what RBAC allows and nothing else."""
        self._refuse(f"user {user}")

    def start_program(self, name: str, *flags: str | Path) -> Program:
        """Start a program beside the control plane that ends with it, such as a fake kubelet."""
        self._refuse(f"place for {name} beside it")

    def stop_apiserver(self, *, kill: bool = False) -> None:
        """Stop the API server (by SIGKILL with ``kill``); its data and its port stay."""
        self._refuse("stop of its API server")

    def start_apiserver(self) -> None:
        """Start it again on the same port and data; returns when it is ready."""
        self._refuse("start of its API server")

    def restart_apiserver(self, *, kill: bool = False) -> None:
        self.stop_apiserver(kill=kill)
        self.start_apiserver()

    def pause_apiserver(self) -> None:
        """Hold the API server: its connections stay open and nobody answers."""
        self._refuse("pause of its API server")

    def resume_apiserver(self) -> None:
        self._refuse("pause of its API server")

    def _refuse(self, what: str) -> NoReturn:
        raise Unsupported(f"the cluster of {self.kubeconfig} offers no {what}: leave KUBECONFIG unset to run this test")


def write_kubeconfig(path: Path, *, url: str, ca: Path | None, user: str, token: str) -> Path:
    """A kubeconfig for one user; without ``ca`` the address is plain HTTP."""
    cluster = {"server": url} if ca is None else {"server": url, "certificate-authority": str(ca)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "local", "cluster": cluster}],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": user}}],
        "current-context": "local",
    }
    # Whole or not at all, and nobody else's to read.
    scratch = path.with_suffix(".new")
    scratch.touch(mode=0o600)
    scratch.write_text(yaml.safe_dump(document))
    os.replace(scratch, path)
    return path
