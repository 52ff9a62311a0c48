from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from pagedserve_operator.config import ConfigError, OperatorConfig, read_config

GIVEN: dict[str, tuple[dict[str, str], Any]] = {
    "watch_namespace": ({"WATCH_NAMESPACE": "models"}, "models"),
    "operator_namespace": ({"OPERATOR_NAMESPACE": "ops"}, "ops"),
    "engine_image": ({"ENGINE_IMAGE": "registry.example.com/engine:1"}, "registry.example.com/engine:1"),
    "engine_min_compute_capability": ({"ENGINE_MIN_COMPUTE_CAPABILITY": "8.0"}, "8.0"),
    "read_nodes": ({"READ_NODES": "false"}, False),
    "fetch_model_config": ({"FETCH_MODEL_CONFIG": "off"}, False),
    "hub_endpoint": ({"HUB_ENDPOINT": "https://hub.example.com"}, "https://hub.example.com"),
    "hub_timeout_seconds": ({"HUB_TIMEOUT_SECONDS": "2.5"}, 2.5),
    "workers": ({"WORKERS": "3"}, 3),
    "request_seconds": ({"REQUEST_SECONDS": "3"}, 3.0),
    "gather_seconds": ({"GATHER_SECONDS": "0.05"}, 0.05),
    "resync_seconds": ({"RESYNC_SECONDS": "60"}, 60.0),
    "secret_resync_seconds": ({"SECRET_RESYNC_SECONDS": "5"}, 5.0),
    "lease_seconds": ({"LEASE_SECONDS": "30"}, 30.0),
    "renew_deadline_seconds": ({"RENEW_DEADLINE_SECONDS": "12"}, 12.0),
    "renew_seconds": ({"RENEW_SECONDS": "1"}, 1.0),
    "identity": ({"IDENTITY": "me"}, "me"),
    "metrics_host": ({"METRICS_HOST": "127.0.0.1"}, "127.0.0.1"),
    "metrics_port": ({"METRICS_PORT": "0"}, 0),
    "metrics_api": ({"METRICS_API": "false"}, "false"),
    "metrics_api_host": ({"METRICS_API_HOST": "::"}, "::"),
    "metrics_api_port": ({"METRICS_API_PORT": "8443"}, 8443),
    "metrics_api_requests_per_second": ({"METRICS_API_REQUESTS_PER_SECOND": "2.5"}, 2.5),
    "target_queue_wait_seconds": ({"TARGET_QUEUE_WAIT_SECONDS": "2"}, "2"),
    "target_cache_use": ({"TARGET_CACHE_USE": "0.7"}, "0.7"),
    "target_waiting_requests": ({"TARGET_WAITING_REQUESTS": "8"}, "8"),
    "target_running_requests": ({"TARGET_RUNNING_REQUESTS": "32"}, "32"),
    "prometheus_url": ({"PROMETHEUS_URL": "http://prometheus:9090"}, "http://prometheus:9090"),
    "watch_silence_seconds": ({"WATCH_SILENCE_SECONDS": "30.5"}, 30.5),
    "watch_stale_seconds": ({"WATCH_STALE_SECONDS": "90"}, 90.0),
    "log_format": ({"LOG_FORMAT": "json"}, "json"),
    "log_level": ({"LOG_LEVEL": "debug"}, "debug"),
    "kubeconfig": ({"KUBECONFIG": "/etc/kube/config"}, "/etc/kube/config"),
}


def test_every_setting_has_a_case_here() -> None:
    assert set(GIVEN) == {setting.name for setting in fields(OperatorConfig)}


@pytest.mark.parametrize("name", GIVEN)
def test_each_setting_is_read_from_the_variable_of_its_name(name: str) -> None:
    environment, value = GIVEN[name]
    assert getattr(OperatorConfig(), name) != value
    assert getattr(read_config(environment), name) == value


@pytest.mark.parametrize("name", GIVEN)
def test_an_empty_variable_counts_as_absent(name: str) -> None:
    assert read_config({name.upper(): ""}) == OperatorConfig()


def test_without_a_mapping_the_processes_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKERS", "5")
    assert read_config().workers == 5


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on"])
def test_a_switch_takes_common_words_for_on(text: str) -> None:
    assert read_config({"READ_NODES": text, "WATCH_NAMESPACE": "models"}).read_nodes is True


@pytest.mark.parametrize("text", ["false", "No", "0", "off"])
def test_a_switch_takes_common_words_for_off(text: str) -> None:
    assert read_config({"READ_NODES": text}).read_nodes is False


def test_one_namespace_means_no_nodes_unless_they_are_allowed() -> None:
    assert read_config({}).read_nodes is True
    assert read_config({"WATCH_NAMESPACE": "models"}).read_nodes is False
    assert read_config({"WATCH_NAMESPACE": "models", "READ_NODES": "true"}).read_nodes is True


_ORDER = "RENEW_SECONDS, RENEW_DEADLINE_SECONDS and LEASE_SECONDS must grow in this order"
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "a switch that is no word for on or off": (
        {"READ_NODES": "maybe"},
        "READ_NODES must be true or false, not 'maybe'",
    ),
    "text for a whole number": ({"WORKERS": "many"}, "WORKERS must be a whole number, not 'many'"),
    "a fraction for a whole number": ({"METRICS_PORT": "80.5"}, "METRICS_PORT must be a whole number, not '80.5'"),
    "text for a number": ({"RESYNC_SECONDS": "5m"}, "RESYNC_SECONDS must be a number, not '5m'"),
    "no worker": ({"WORKERS": "0"}, "WORKERS must be above 0 and finite, not 0"),
    "no time for an answer": ({"REQUEST_SECONDS": "0"}, "REQUEST_SECONDS must be above 0"),
    "no time to gather": ({"GATHER_SECONDS": "0"}, "GATHER_SECONDS must be above 0"),
    "no pause between resyncs": ({"RESYNC_SECONDS": "0"}, "RESYNC_SECONDS must be above 0"),
    "no pause between looks at secrets": ({"SECRET_RESYNC_SECONDS": "-1"}, "SECRET_RESYNC_SECONDS must be above 0"),
    "no time for the hub": ({"HUB_TIMEOUT_SECONDS": "0"}, "HUB_TIMEOUT_SECONDS must be above 0"),
    "watches that are stale at once": ({"WATCH_STALE_SECONDS": "0"}, "WATCH_STALE_SECONDS must be above 0"),
    "a lease shorter than its deadline": ({"LEASE_SECONDS": "5"}, f"{_ORDER}, not 2, 10, 5"),
    "a deadline as long as the lease": ({"RENEW_DEADLINE_SECONDS": "15"}, _ORDER),
    "renewals rarer than the deadline": ({"RENEW_SECONDS": "10"}, _ORDER),
    "no pause between renewals": ({"RENEW_SECONDS": "0"}, _ORDER),
    "an unknown log format": ({"LOG_FORMAT": "xml"}, "LOG_FORMAT must be one of text, json, not 'xml'"),
    "an unknown log level": ({"LOG_LEVEL": "loud"}, "LOG_LEVEL must be one of debug, info, warning, error, not 'loud'"),
    "a capability without minor": (
        {"ENGINE_MIN_COMPUTE_CAPABILITY": "8"},
        r"ENGINE_MIN_COMPUTE_CAPABILITY must be like 7\.5, not '8'",
    ),
    "a capability that is no number": (
        {"ENGINE_MIN_COMPUTE_CAPABILITY": "sm_80"},
        "ENGINE_MIN_COMPUTE_CAPABILITY must be like",
    ),
    "not a number at all": ({"RESYNC_SECONDS": "nan"}, "RESYNC_SECONDS must be above 0 and finite, not nan"),
    "for ever": ({"HUB_TIMEOUT_SECONDS": "inf"}, "HUB_TIMEOUT_SECONDS must be above 0 and finite, not inf"),
    "a lease for ever": ({"LEASE_SECONDS": "inf"}, "LEASE_SECONDS must be above 0 and finite, not inf"),
    "a port beyond all ports": ({"METRICS_PORT": "65536"}, "METRICS_PORT must be 0 to 65535, not 65536"),
    "a port below all ports": ({"METRICS_PORT": "-1"}, "METRICS_PORT must be 0 to 65535, not -1"),
    "another port beyond all ports": ({"METRICS_API_PORT": "70000"}, "METRICS_API_PORT must be 0 to 65535, not 70000"),
    "a switch with a third word": ({"METRICS_API": "maybe"}, "METRICS_API must be auto, true or false, not 'maybe'"),
    "one namespace and the API of all": (
        {"METRICS_API": "true", "WATCH_NAMESPACE": "models"},
        "METRICS_API=true needs an operator of all namespaces",
    ),
    "no request at all": (
        {"METRICS_API_REQUESTS_PER_SECOND": "0"},
        "METRICS_API_REQUESTS_PER_SECOND must be above 0",
    ),
    "a target of nothing": ({"TARGET_CACHE_USE": "0"}, "TARGET_CACHE_USE must be a quantity above 0"),
    "a target that is no quantity": ({"TARGET_WAITING_REQUESTS": "few"}, "TARGET_WAITING_REQUESTS must be a quantity"),
    "an address without a scheme": ({"PROMETHEUS_URL": "prometheus:9090"}, "PROMETHEUS_URL must begin with http://"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_setting_is_refused_by_its_variable(name: str) -> None:
    environment, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        read_config(environment)


def test_deriving_changes_nothing_else_and_checks_again() -> None:
    config = OperatorConfig()
    derived = config.derive(workers=2)
    assert (derived.workers, config.workers) == (2, 8)
    assert derived.derive(workers=8) == config
    with pytest.raises(ConfigError, match="WORKERS"):
        config.derive(workers=0)


@pytest.mark.parametrize(
    ("environment", "serves"),
    [
        ({}, True),
        ({"METRICS_API": "auto"}, True),
        ({"METRICS_API": "True"}, True),
        ({"METRICS_API": "off"}, False),
        ({"WATCH_NAMESPACE": "models"}, False),
        ({"WATCH_NAMESPACE": "models", "METRICS_API": "auto"}, False),
        ({"WATCH_NAMESPACE": "models", "METRICS_API": "false"}, False),
    ],
)
def test_the_metrics_api_is_served_for_all_namespaces_or_not_at_all(environment: dict[str, str], serves: bool) -> None:
    assert read_config(environment).serves_metrics_api is serves


def test_the_compute_capability_is_two_numbers() -> None:
    assert read_config({"ENGINE_MIN_COMPUTE_CAPABILITY": "12.1"}).min_compute_capability == (12, 1)
