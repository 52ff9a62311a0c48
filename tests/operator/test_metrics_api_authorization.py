from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pagedserve_operator.errors import Unavailable
from pagedserve_operator.metrics_api.authentication import Caller
from pagedserve_operator.metrics_api.authorization import Authorizer
from pagedserve_operator.metrics_api.refusals import Forbidden, NotAvailable

ALICE = Caller(user="alice", uid="17", groups=("devs",), extra=(("scopes", ("a", "b")),))
PLACE = {"namespace": "models", "pod": "*", "metric": "pagedserve_requests_waiting"}


class Reviews:
    """An API server that allows what ``status`` says."""

    def __init__(self, **status: Any) -> None:
        self.status = status
        self.asked: list[dict[str, Any]] = []
        self.away = False

    async def review_access(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(spec)
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("no answer")
        return self.status


def require(reviews: Reviews, *callers: Caller, **place: str) -> None:
    async def main() -> None:
        authorizer = Authorizer(reviews)
        try:
            await asyncio.gather(*(authorizer.require(caller, **{**PLACE, **place}) for caller in callers))
        finally:
            await authorizer.close()

    asyncio.run(main())


def test_the_api_server_is_asked_for_the_caller_and_the_metric() -> None:
    reviews = Reviews(allowed=True)
    require(reviews, ALICE)
    assert reviews.asked == [
        {
            "user": "alice",
            "uid": "17",
            "groups": ["devs"],
            "extra": {"scopes": ["a", "b"]},
            "resourceAttributes": {
                "verb": "get",
                "group": "custom.metrics.k8s.io",
                "version": "v1beta2",
                "resource": "pods",
                "subresource": "pagedserve_requests_waiting",
                "namespace": "models",
                "name": "*",
            },
        }
    ]


@pytest.mark.parametrize("status", [{}, {"allowed": False}, {"allowed": True, "denied": True}, {"allowed": "yes"}])
def test_what_is_not_plainly_allowed_is_forbidden(status: dict[str, Any]) -> None:
    with pytest.raises(Forbidden, match=r'"alice" cannot get resource "pods/pagedserve_requests_waiting".*"models"'):
        require(Reviews(**status), ALICE)


def test_many_requests_of_one_caller_ask_once() -> None:
    reviews = Reviews(allowed=True)
    require(reviews, *[ALICE] * 20)
    assert len(reviews.asked) == 1


def test_another_callers_answer_is_another_answer() -> None:
    reviews = Reviews(allowed=True)
    require(reviews, ALICE, Caller(user="alice", uid="17", groups=("others",)), Caller(user="bob"))
    assert len(reviews.asked) == 3


def test_masters_need_no_question() -> None:
    reviews = Reviews(allowed=False)
    require(reviews, Caller(user="system:kube-aggregator", groups=("system:masters",)))
    assert reviews.asked == []


def test_nobody_passes_while_nobody_can_be_asked() -> None:
    reviews = Reviews(allowed=True)
    reviews.away = True
    with pytest.raises(NotAvailable, match="alice"):
        require(reviews, ALICE)
