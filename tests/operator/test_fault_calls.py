"""Requests are read and numbered as Kubernetes names them."""

from __future__ import annotations

import pytest

from fault_calls import each_call, read_call

PODS = "/api/v1/namespaces/n/pods"
APPLY = {"Content-Type": "application/apply-patch+yaml"}

# method, target, content type -> verb, resource, subresource, namespace, name
READINGS = {
    "a list": ("GET", PODS, "", ("list", "pods", "", "n", "")),
    "a list of all namespaces": ("GET", "/api/v1/pods?limit=5", "", ("list", "pods", "", "", "")),
    "a get": ("GET", f"{PODS}/p", "", ("get", "pods", "", "n", "p")),
    "a watch": ("GET", f"{PODS}?watch=1&resourceVersion=5", "", ("watch", "pods", "", "n", "")),
    "a create": ("POST", PODS, "", ("create", "pods", "", "n", "")),
    "an eviction": ("POST", f"{PODS}/p/eviction", "", ("create", "pods", "eviction", "n", "p")),
    "an apply": ("PATCH", "/apis/apps/v1/namespaces/n/deployments/d", APPLY["Content-Type"],
                 ("apply", "deployments", "", "n", "d")),
    "a patch of a status": ("PATCH", f"{PODS}/p/status", "application/merge-patch+json",
                            ("patch", "pods", "status", "n", "p")),
    "an update": ("PUT", "/apis/coordination.k8s.io/v1/namespaces/n/leases/l", "", ("update", "leases", "", "n", "l")),
    "a delete": ("DELETE", f"{PODS}/p", "", ("delete", "pods", "", "n", "p")),
    "a delete of all": ("DELETE", PODS, "", ("deletecollection", "pods", "", "n", "")),
    "a node": ("GET", "/api/v1/nodes/m", "", ("get", "nodes", "", "", "m")),
    "all namespaces": ("GET", "/api/v1/namespaces", "", ("list", "namespaces", "", "", "")),
    "a namespace": ("GET", "/api/v1/namespaces/n", "", ("get", "namespaces", "", "n", "n")),
    "the end of a namespace": ("PUT", "/api/v1/namespaces/n/finalize", "",
                               ("update", "namespaces", "finalize", "n", "n")),
    "a discovery": ("GET", "/apis/apps/v1", "", ("get", "/apis/apps/v1", "", "", "")),
    "the version": ("GET", "/version", "", ("get", "/version", "", "", "")),
    "a name with an escape": ("GET", "/api/v1/nodes/a%2Fb", "", ("get", "nodes", "", "", "a/b")),
}  # fmt: skip


@pytest.mark.parametrize(("method", "target", "kind", "expected"), READINGS.values(), ids=READINGS)
def test_a_request_is_read_in_the_words_of_kubernetes(
    method: str, target: str, kind: str, expected: tuple[str, ...]
) -> None:
    call = read_call(0, "c", method, target, {"Content-Type": kind})
    assert (call.verb, call.resource, call.subresource, call.namespace, call.name) == expected


def test_addresses_count_each_sort_and_leave_watches_and_leases_out() -> None:
    targets = [("GET", PODS), ("GET", f"{PODS}?watch=true"), ("POST", PODS), ("GET", PODS)]
    lease = ("GET", "/apis/coordination.k8s.io/v1/namespaces/n/leases/l")
    calls = [read_call(number, "c", *target, {}) for number, target in enumerate([*targets, lease])]
    assert [str(address) for address in each_call(calls)] == ["list pods #0", "create pods #0", "list pods #1"]
