"""What the children depend on besides the resource and its tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagedserve_operator.engine_metrics import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the reconcile has found out; equal facts, spec and tuning give equal children."""

    secrets_hash: str = ""
    """Of the hub's token and of the Secrets and ConfigMaps that ``env`` refers to; empty where there are none."""
    surge: int | None = 0
    """Pods beyond the wanted number while rolling out, as decide_rollout() says; None: all old ones go first."""
    served_kinds: frozenset[str] = frozenset()
    """Which of kinds.OPTIONAL the cluster has."""
    targets: Targets = field(default_factory=Targets)
    """What autoscalers aim at where the resource doesn't say."""
    prometheus_url: str = ""
    """Where KEDA finds Prometheus; empty: nobody has said."""
    metrics_reader: str = ""
    """Namespace of an operator that reads the engines' metrics; empty: none does."""
