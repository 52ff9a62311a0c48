"""What stands in an apply's way: fields that can't change once they are there, and items that others own."""

from __future__ import annotations

import json

from pagedserve_operator.fields import quantity
from pagedserve_operator.names import ENGINE_CONTAINER, MANAGER
from pagedserve_operator.spec import Json


def fitted(manifest: Json, existing: Json | None) -> tuple[Json, list[str]]:
    """The manifest as the existing object can take it, and a sentence for each wish that it can't."""
    if existing is not None and manifest["kind"] == "PersistentVolumeClaim":
        return _claim(manifest, existing)
    if existing is not None and manifest["kind"] == "Deployment":
        return _deployment(manifest, existing), []
    return manifest, []


def has_stuck_port(manifest: Json, existing: Json) -> bool:
    """Whether an apply would be refused for a port that somebody else owns.

    Number and protocol are a port's key: once edited by hand it is another port, which no apply of ours removes, and
    two ports may neither share a name nor lack one.
    """
    wanted = manifest["spec"]["ports"]
    keys, names = {_key_of_port(row) for row in wanted}, {row["name"] for row in wanted} | {None, ""}
    foreign = {
        _key_of_port(json.loads(key[2:]))
        for entry in existing["metadata"].get("managedFields") or ()
        if (entry.get("manager"), entry.get("operation")) != (MANAGER, "Apply")
        for key in entry.get("fieldsV1", {}).get("f:spec", {}).get("f:ports", {})
        if key.startswith("k:")
    }
    ports = existing["spec"].get("ports") or ()
    return any(_key_of_port(row) in foreign - keys and row.get("name") in names for row in ports)


def _key_of_port(row: Json) -> tuple[int, str]:
    return row["port"], row.get("protocol", "TCP")


def _deployment(manifest: Json, existing: Json) -> Json:
    """Takes its name from another port of the engine that bears ours: edited by hand, it is no port of ours any more.

    The next apply lets go of the name again, and the port stays, nameless and harmless.
    """
    pods = manifest["spec"]["template"]["spec"]
    numbers = {(row["containerPort"], row["protocol"]): row["name"] for row in pods["containers"][0]["ports"]}
    foreign = [
        {"containerPort": row["containerPort"], "protocol": row["protocol"], "name": f"other-{row['containerPort']}"}
        for container in existing["spec"]["template"]["spec"].get("containers") or ()
        for row in container.get("ports") or ()
        if container.get("name") == ENGINE_CONTAINER
        and row.get("name") in numbers.values()
        and (row["containerPort"], row["protocol"]) not in numbers
    ]
    if not foreign:
        return manifest
    engine, *others = pods["containers"]
    engine = {**engine, "ports": [*engine["ports"], *foreign]}
    template = {**manifest["spec"]["template"], "spec": {**pods, "containers": [engine, *others]}}
    return {**manifest, "spec": {**manifest["spec"], "template": template}}


def _claim(manifest: Json, existing: Json) -> tuple[Json, list[str]]:
    """A claim can only grow: whatever else an existing one can't become stays, and is said."""
    wanted, found = manifest["spec"], existing["spec"]
    notes = []
    spec = {**wanted, "accessModes": found.get("accessModes", wanted["accessModes"])}
    if spec["accessModes"] != wanted["accessModes"]:
        notes.append(_cannot(existing, "accessMode", found["accessModes"][0], wanted["accessModes"][0]))
    if found.get("storageClassName") is not None:
        spec["storageClassName"] = found["storageClassName"]
        asked = wanted.get("storageClassName", found["storageClassName"])
        if asked != found["storageClassName"]:
            notes.append(_cannot(existing, "storageClassName", found["storageClassName"], asked))
    size, present = wanted["resources"]["requests"]["storage"], found["resources"]["requests"]["storage"]
    if quantity(size) < quantity(present):
        spec["resources"] = {"requests": {"storage": present}}
        notes.append(_cannot(existing, "size", present, size))
    return {**manifest, "spec": spec}, notes


def _cannot(existing: Json, field: str, present: str, wanted: str) -> str:
    name = existing["metadata"]["name"]
    return (
        f"spec.cache.newClaim.{field}: PersistentVolumeClaim {name} has {present} and can't become {wanted}: delete "
        "the claim to have it made anew, which downloads the weights again"
    )
