from __future__ import annotations

import json
from typing import Any

import pytest

from pagedserve_operator.metrics_api.authentication import (
    Caller,
    FrontProxy,
    NoFrontProxy,
    identify,
    read_front_proxy,
)
from pagedserve_operator.metrics_api.refusals import Unauthenticated

DATA = {
    "requestheader-client-ca-file": "-----BEGIN CERTIFICATE-----\n…",
    "requestheader-allowed-names": '["front-proxy-client", "aggregator"]',
    "requestheader-username-headers": '["X-Remote-User", "X-User"]',
    "requestheader-group-headers": '["X-Remote-Group"]',
    "requestheader-uid-headers": '["X-Remote-Uid"]',
    "requestheader-extra-headers-prefix": '["X-Remote-Extra-"]',
}
TRUSTED = {"subject": ((("organizationName", "k8s"),), (("commonName", "front-proxy-client"),))}
USER = ("X-Remote-User", "alice")


def front_proxy(**changes: Any) -> FrontProxy:
    data = {**DATA, **{f"requestheader-{name.replace('_', '-')}": value for name, value in changes.items()}}
    return read_front_proxy({"data": {name: value for name, value in data.items() if value is not None}})


def test_the_config_map_says_whom_to_trust() -> None:
    found = front_proxy()
    assert found.authority == DATA["requestheader-client-ca-file"]
    assert found.names == {"front-proxy-client", "aggregator"}
    assert found.user_headers == ("X-Remote-User", "X-User")
    assert (found.group_headers, found.uid_headers) == (("X-Remote-Group",), ("X-Remote-Uid",))
    assert found.extra_prefixes == ("X-Remote-Extra-",)


@pytest.mark.parametrize(
    "config_map",
    [
        None,
        {},
        {"data": None},
        {"data": {**DATA, "requestheader-client-ca-file": ""}},
        {"data": {**DATA, "requestheader-client-ca-file": "no certificate"}},
        {"data": {**DATA, "requestheader-username-headers": "[]"}},
        {"data": {**DATA, "requestheader-username-headers": "X-Remote-User"}},
    ],
    ids=["none", "empty", "null", "no authority", "a bad authority", "no header", "headers that are no list"],
)
def test_a_server_without_aggregation_layer_is_told_with_the_flag_that_it_lacks(config_map: Any) -> None:
    with pytest.raises(NoFrontProxy, match="requestheader-"):
        read_front_proxy(config_map)


def test_older_servers_name_no_header_for_the_uid() -> None:
    assert front_proxy(uid_headers=None).uid_headers == ()


def test_the_front_proxy_says_who_asks() -> None:
    headers = [
        ("Host", "x"),
        ("x-remote-user", "alice"),
        ("X-Remote-Group", "devs"),
        ("X-Remote-Group", "system:authenticated"),
        ("X-Remote-Uid", "17"),
        ("X-Remote-Extra-Scopes", "a"),
        ("X-Remote-Extra-Scopes", "b"),
        ("X-Remote-Extra-example.org%2fColour", "red"),
    ]
    assert identify(front_proxy(), TRUSTED, headers) == Caller(
        user="alice",
        uid="17",
        groups=("devs", "system:authenticated"),
        extra=(("example.org/colour", ("red",)), ("scopes", ("a", "b"))),
    )


def test_the_first_header_that_has_a_value_names_the_user() -> None:
    assert identify(front_proxy(), TRUSTED, [("X-User", "bob"), ("X-Remote-User", "")]).user == "bob"


@pytest.mark.parametrize("certificate", [None, {}, {"subject": ()}], ids=["none", "not verified", "without a name"])
def test_without_a_verified_certificate_nobody_is_believed(certificate: Any) -> None:
    with pytest.raises(Unauthenticated, match="client certificate"):
        identify(front_proxy(), certificate, [USER])


def test_a_certificate_of_another_name_is_not_the_front_proxys() -> None:
    other = {"subject": ((("commonName", "kubelet"),),)}
    with pytest.raises(Unauthenticated, match="kubelet"):
        identify(front_proxy(), other, [USER])
    assert identify(front_proxy(allowed_names="[]"), other, [USER]).user == "alice"


@pytest.mark.parametrize("headers", [[], [("X-Remote-Group", "system:masters")], [("X-Remote-User", "")]])
def test_a_front_proxy_that_names_nobody_speaks_for_nobody(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated, match="X-Remote-User"):
        identify(front_proxy(), TRUSTED, headers)


def test_lists_that_hold_other_things_than_names_are_read_without_them() -> None:
    assert front_proxy(group_headers=json.dumps(["X-Remote-Group", 1, None, ""])).group_headers == ("X-Remote-Group",)
