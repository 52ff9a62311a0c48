"""Services of a cluster elsewhere, reached at ports of a node.

Not by `kubectl port-forward`: that picks one pod and ends with it, so that no stream could show what a Service does
when a pod leaves. Each Service gets a twin of type NodePort with the same selector, which goes with its original.
"""

from __future__ import annotations

from collections.abc import Sequence

from control_client import JSON, ApiError, Client


class NodePorts:
    """Twins whose ports answer at ``host``; only ``ports`` are used where any are given."""

    def __init__(self, client: Client, *, host: str, ports: Sequence[int] = ()) -> None:
        self._client = client
        self._host = host
        self._ports = ports

    def address(self, namespace: str, service: str) -> str:
        """``host:port`` of the Service's first port."""
        found = self._client.find("v1", "Service", f"{service}-e2e", namespace=namespace)
        if found is None:
            found = self._create(self._client.get("v1", "Service", service, namespace=namespace))
        return f"{self._host}:{found['spec']['ports'][0]['nodePort']}"

    def _create(self, service: JSON) -> JSON:
        refusals = []
        for number in self._ports or (None,):
            try:
                return self._client.create(twin(service, number))
            except ApiError as error:
                # 422: another twin has the port.
                if error.code != 422:
                    raise
                refusals.append(str(error))
        raise LookupError(f"no port is left for {service['metadata']['name']}: {refusals[-1]}")


def twin(service: JSON, number: int | None = None) -> JSON:
    """A Service of type NodePort that leads where ``service`` does, at port ``number`` of the nodes."""
    metadata, first = service["metadata"], service["spec"]["ports"][0]
    owner = {"apiVersion": "v1", "kind": "Service", "name": metadata["name"], "uid": metadata["uid"]}
    port = {"name": "http", "port": first["port"], "targetPort": first["targetPort"]}
    if number is not None:
        port["nodePort"] = number
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": f"{metadata['name']}-e2e",
            "namespace": metadata["namespace"],
            "ownerReferences": [owner],
        },
        "spec": {"type": "NodePort", "selector": service["spec"]["selector"], "ports": [port]},
    }
