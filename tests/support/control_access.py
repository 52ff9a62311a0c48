"""How to reach a cluster: what a kubeconfig file says, reduced to an address, an authority and who asks."""

from __future__ import annotations

import base64
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml


class NoCredentials(Exception):
    """A kubeconfig's user can't be played; names the user and the cure."""


@dataclass(frozen=True)
class Access:
    """Where a cluster is and who asks."""

    url: str
    context: ssl.SSLContext
    token: str | None = None

    @classmethod
    def of(cls, kubeconfig: Path) -> Self:
        """What the current context of a kubeconfig file names; raises NoCredentials for a user of a plugin."""
        document = yaml.safe_load(kubeconfig.read_text())
        contexts = {entry["name"]: entry["context"] for entry in document["contexts"]}
        current = contexts[document["current-context"]]
        cluster = next(entry["cluster"] for entry in document["clusters"] if entry["name"] == current["cluster"])
        user = next(entry["user"] for entry in document["users"] if entry["name"] == current["user"])
        context = ssl.create_default_context()
        authority = _content(cluster, "certificate-authority", kubeconfig)
        if authority is not None:
            context.load_verify_locations(cadata=authority.decode())
        certificate, key = (_content(user, name, kubeconfig) for name in ("client-certificate", "client-key"))
        if certificate is not None and key is not None:
            with tempfile.NamedTemporaryFile() as both:
                both.write(certificate + b"\n" + key)
                both.flush()
                context.load_cert_chain(both.name)
        elif "token" not in user:
            raise NoCredentials(
                f"the user {current['user']!r} of {kubeconfig} has neither a token nor a client certificate "
                f"(but {', '.join(user) or 'nothing'}), and plugins aren't run: name a kubeconfig with the token of a "
                "service account (`kubectl create token`)"
            )
        return cls(cluster["server"], context, user.get("token"))


def _content(entry: Mapping[str, str], name: str, kubeconfig: Path) -> bytes | None:
    """A certificate or key of a kubeconfig, which holds it or names its file."""
    if inline := entry.get(f"{name}-data"):
        return base64.b64decode(inline)
    if path := entry.get(name):
        return (kubeconfig.parent / path).read_bytes()
    return None
