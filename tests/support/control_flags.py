"""How the programs of a test's control plane are told to run: on loopback, unhurried by limits, without waiting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from control_certificates import FRONT_PROXY

_CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "deployment-controller",
    "disruption-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "horizontal-pod-autoscaler-controller",
    "namespace-controller",
    "node-lifecycle-controller",
    "persistentvolume-binder-controller",
    "persistentvolumeclaim-protection-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "statefulset-controller",
)
_WORKERS = ("deployment", "gc", "horizontal-pod-autoscaler", "namespace", "replicaset", "service-endpoint")


@dataclass(frozen=True)
class Files:
    """Where the programs find what they share, below ``folder``."""

    folder: Path

    @property
    def certificates(self) -> Path:
        """A folder: the API server writes its own certificate here, once."""
        return self.folder / "certificates"

    @property
    def authority(self) -> Path:
        return self.certificates / "apiserver.crt"

    @property
    def signing_key(self) -> Path:
        return self.folder / "service-accounts.key"

    @property
    def front_proxy_authority(self) -> Path:
        return self.folder / "front-proxy-ca.crt"

    @property
    def front_proxy_certificate(self) -> Path:
        return self.folder / "front-proxy-client.crt"

    @property
    def front_proxy_key(self) -> Path:
        return self.folder / "front-proxy-client.key"

    @property
    def webhook(self) -> Path:
        return self.folder / "webhook.kubeconfig"

    @property
    def audit_policy(self) -> Path:
        return self.folder / "audit-policy.yaml"

    @property
    def audit_log(self) -> Path:
        return self.folder / "audit.log"


def etcd(files: Files, *, port: int, peer_port: int) -> list[str]:
    """Flags of etcd, which need not survive a power cut."""
    url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        f"--data-dir={files.folder / 'etcd'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--unsafe-no-fsync",
        f"--quota-backend-bytes={4 * 2**30}",
        "--log-level=warn",
    ]


def apiserver(files: Files, *, port: int, etcd_port: int) -> list[str]:
    """Flags of the API server: RBAC is real, and no limit disturbs a thousand resources."""
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={files.certificates}",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.96.0.0/12",
        "--authorization-mode=RBAC",
        f"--authentication-token-webhook-config-file={files.webhook}",
        "--authentication-token-webhook-version=v1",
        # A token never changes hands, and a paused test process could not answer again.
        "--authentication-token-webhook-cache-ttl=24h",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={files.signing_key}",
        f"--service-account-signing-key-file={files.signing_key}",
        f"--audit-policy-file={files.audit_policy}",
        f"--audit-log-path={files.audit_log}",
        "--audit-log-maxsize=0",
        *_aggregation(files),
        "--enable-priority-and-fairness=false",
        "--max-requests-inflight=4000",
        "--max-mutating-requests-inflight=2000",
        "--allow-privileged=true",
    ]


def controller_manager(files: Files, *, port: int, kubeconfig: Path, autoscaler_seconds: float = 2.0) -> list[str]:
    """Flags of the controllers that a served model meets, with many workers and, by default, a quick autoscaler."""
    return [
        *_client(files, port=port, kubeconfig=kubeconfig),
        f"--controllers={','.join(_CONTROLLERS)}",
        *(f"--concurrent-{kind}-syncs=20" for kind in _WORKERS),
        f"--service-account-private-key-file={files.signing_key}",
        f"--root-ca-file={files.authority}",
        f"--horizontal-pod-autoscaler-sync-period={autoscaler_seconds:g}s",
        # A fake node renews no lease in a hurry, and one that a test holds is not dead.
        "--node-monitor-grace-period=1h",
    ]


def scheduler(files: Files, *, port: int, kubeconfig: Path) -> list[str]:
    """Flags of the scheduler."""
    return _client(files, port=port, kubeconfig=kubeconfig)


def _aggregation(files: Files) -> list[str]:
    """The aggregation layer as kubeadm sets it up; the servers behind it are asked at their pods, as no proxy runs."""
    return [
        f"--requestheader-client-ca-file={files.front_proxy_authority}",
        f"--requestheader-allowed-names={FRONT_PROXY}",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={files.front_proxy_certificate}",
        f"--proxy-client-key-file={files.front_proxy_key}",
        "--enable-aggregator-routing=true",
    ]


def _client(files: Files, *, port: int, kubeconfig: Path) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={files.folder / 'own-certificates'}",
        "--leader-elect=false",
        "--kube-api-qps=2000",
        "--kube-api-burst=4000",
    ]
