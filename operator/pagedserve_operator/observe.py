"""What is there around one resource, read from the API server: children, pods, and whoever else scales it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from pagedserve_operator.cluster import Cluster
from pagedserve_operator.desired import child_keys
from pagedserve_operator.kinds import AUTOSCALER, KEDA_AUTOSCALER
from pagedserve_operator.names import Key, Owner, selector_labels
from pagedserve_operator.plan import ChildKey
from pagedserve_operator.spec import Json
from pagedserve_operator.status import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """As it was read, one object after another; ``children`` holds None where there is none."""

    owner: Owner
    children: Mapping[ChildKey, Json | None]
    pods: tuple[Json, ...]
    strange_autoscalers: tuple[Json, ...]
    """Of other names, with our Deployment as target; what KEDA makes for us isn't among them."""
    made_by_keda: Json | None
    """The autoscaler that KEDA has made of our ScaledObject."""

    @property
    def key(self) -> Key:
        """The resource."""
        return self.owner.key

    @property
    def deployment(self) -> Json | None:
        """The Deployment."""
        return self.children["Deployment", self.key.name]

    def after(self, children: Mapping[ChildKey, Json | None]) -> World:
        """The world with the children as the writes left them."""
        return replace(self, children=children)

    def observation(self) -> Observation:
        """What the status is computed from."""
        return Observation(
            deployment=self.deployment,
            pods=self.pods,
            hpa=self.children[AUTOSCALER, self.key.name] or self.made_by_keda,
            scaled_object=_own_scaled_object(self.children, self.owner),
            foreign_hpas=tuple(scaler["metadata"]["name"] for scaler in self.strange_autoscalers),
            service=self.children["Service", self.key.name],
        )


async def observe(cluster: Cluster, owner: Owner, *, autoscalers: Collection[str]) -> World:
    """Read the world around a resource; ``autoscalers`` names those that may scale its Deployment."""
    key = owner.key
    selector = ",".join(f"{label}={value}" for label, value in selector_labels(key.name).items())
    places = child_keys(key.name, await cluster.served_kinds())
    strangers = [(AUTOSCALER, name) for name in sorted(autoscalers) if name != key.name]
    pods, children, scalers = await asyncio.gather(
        cluster.list("Pod", key.namespace, selector=selector),
        _get_all(cluster, key, places),
        _get_all(cluster, key, strangers),
    )
    others = [scaler for scaler in scalers.values() if scaler and _targets(scaler, key.name)]
    kedas = [scaler for scaler in others if _is_kedas(scaler, _own_scaled_object(children, owner))]
    return World(
        owner=owner,
        children=children,
        pods=tuple(pods),
        strange_autoscalers=tuple(scaler for scaler in others if scaler not in kedas),
        made_by_keda=kedas[0] if kedas else None,
    )


async def _get_all(cluster: Cluster, key: Key, places: Iterable[ChildKey]) -> dict[ChildKey, Json | None]:
    places = tuple(places)
    found = await asyncio.gather(*(cluster.get(kind, key.namespace, name) for kind, name in places))
    return dict(zip(places, found, strict=True))


def _own_scaled_object(children: Mapping[ChildKey, Json | None], owner: Owner) -> Json | None:
    """None where somebody else's has the name: what KEDA makes of that one is a stranger's."""
    found = children.get((KEDA_AUTOSCALER, owner.key.name))
    return found if found is not None and owner.owns(found) else None


def _is_kedas(scaler: Json, scaled_object: Json | None) -> bool:
    """Whether KEDA has made the autoscaler of this ScaledObject."""
    owners = scaler["metadata"].get("ownerReferences") or ()
    return scaled_object is not None and any(owner["uid"] == scaled_object["metadata"]["uid"] for owner in owners)


def _targets(scaler: Json, deployment: str) -> bool:
    target = scaler["spec"]["scaleTargetRef"]
    return bool(target["kind"] == "Deployment" and target["name"] == deployment)
