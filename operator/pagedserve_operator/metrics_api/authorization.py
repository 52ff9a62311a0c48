"""Whether a caller may read a metric: the API server's own answer, kept for a moment."""

from __future__ import annotations

from functools import partial
from typing import Final, Protocol

from pagedserve_operator.errors import ApiError
from pagedserve_operator.metrics_api.answers import Answers
from pagedserve_operator.metrics_api.authentication import Caller
from pagedserve_operator.metrics_api.documents import GROUP, VERSION
from pagedserve_operator.metrics_api.refusals import Forbidden, NotAvailable
from pagedserve_operator.spec import Json

KEPT_SECONDS: Final = 10.0
"""How long a right that was granted, or withdrawn, may go unnoticed."""
MOST: Final = 4_000
_ALWAYS: Final = "system:masters"
"""Members of this group may do anything, by what Kubernetes says of it."""


class Reviews(Protocol):
    """Where rights are asked for."""

    async def review_access(self, spec: Json) -> Json:
        """The ``status`` of a SubjectAccessReview of this ``spec``; raises ApiError."""


class Authorizer:
    """Asks for each caller, namespace, pod and metric once in a while."""

    def __init__(self, reviews: Reviews) -> None:
        self._reviews = reviews
        self._allowed: Answers[tuple[Caller, str, str, str], bool] = Answers(seconds=lambda _: KEPT_SECONDS, most=MOST)

    async def close(self) -> None:
        """Stop asking."""
        await self._allowed.close()

    async def require(self, caller: Caller, *, namespace: str, pod: str, metric: str) -> None:
        """Return where the caller may read the metric; raises Forbidden, or NotAvailable where nobody knows."""
        if _ALWAYS in caller.groups:
            return
        place = (caller, namespace, pod, metric)
        try:
            allowed = await self._allowed.get(place, partial(self._review, *place))
        except ApiError as error:
            raise NotAvailable(f"whether {caller.user} may read {metric} can't be asked: {error}") from error
        if not allowed:
            raise Forbidden(
                f'User "{caller.user}" cannot get resource "pods/{metric}" in API group "{GROUP}" in the namespace '
                f'"{namespace}"'
            )

    async def _review(self, caller: Caller, namespace: str, pod: str, metric: str) -> bool:
        status = await self._reviews.review_access(
            {
                "user": caller.user,
                "uid": caller.uid,
                "groups": list(caller.groups),
                "extra": {key: list(values) for key, values in caller.extra},
                "resourceAttributes": {
                    "verb": "get",
                    "group": GROUP,
                    "version": VERSION,
                    "resource": "pods",
                    "subresource": metric,
                    "namespace": namespace,
                    "name": pod,
                },
            }
        )
        return status.get("allowed") is True and status.get("denied") is not True
