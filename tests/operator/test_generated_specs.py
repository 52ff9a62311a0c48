"""Whatever the schema lets through is served or refused in words, and what is made of it is what the server takes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from children import FakeServer, gpu_tuning, resource
from crd import schema, strict, with_defaults
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.desired import Facts, child_keys, desired
from pagedserve_operator.errors import SpecError, UserError
from pagedserve_operator.kinds import OPTIONAL
from pagedserve_operator.parsing import parse
from pagedserve_operator.plan import plan
from pagedserve_operator.spec import InferenceService, Json
from pagedserve_operator.status import Observation, compute, differs
from pagedserve_operator.tuner import Tuner
from pagedserve_operator.tuning import Tuning, inputs_hash
from spec_strategies import feasible_specs, specs
from tuning_cases import gfd, node

QUICK = settings(
    deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMA = schema()["properties"]
SPEC = jsonschema_rs.validator_for(strict(SCHEMA["spec"]))
STATUS = jsonschema_rs.validator_for(strict(SCHEMA["status"]))
NODES = [node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=8), node("n2", labels=gfd("Unheard-Of", 48000), gpu=1)]
JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "-1",
    "\ud800",
    [],
    [1],
    {},
    {"x": 1},
    {"": None},
]


class Nodes:
    """What a tuner lists."""

    def __init__(self, nodes: list[Json]) -> None:
        self._nodes = nodes

    async def list(self, kind: str) -> list[Json]:
        return self._nodes if kind == "Node" else []


def tuned(service: InferenceService, nodes: list[Json] = NODES) -> Tuning:
    async def no_config(_: InferenceService) -> None:
        return None

    return asyncio.run(Tuner(Nodes(nodes), OperatorConfig(), no_config).tune(service, None))


def judged(spec: Json) -> tuple[InferenceService, Tuning | None, UserError | None]:
    """What the operator makes of a spec as the server stores it."""
    service = parse(resource(with_defaults(SCHEMA["spec"], spec)))
    try:
        tuning = tuned(service)
    except UserError as problem:
        return service, None, problem
    return service, tuning, None


@given(specs())
@QUICK
def test_any_spec_is_sized_or_refused_in_a_sentence_and_its_status_is_valid(spec: Json) -> None:
    service, tuning, problem = judged(spec)
    if tuning is not None:
        assert Tuning.from_json(tuning.to_json()) == tuning
    else:
        assert "\n" not in str(problem)
        assert len(str(problem)) < 1000
    observation = Observation(deployment=None, pods=(), hpa=None, foreign_hpas=(), service=None)
    outcome = compute(service.raw, service=service, tuning=tuning, problem=problem, observation=observation, now=NOW)
    STATUS.validate(outcome.status)
    reported = {**service.raw, "status": outcome.status}
    again = compute(reported, service=service, tuning=tuning, problem=problem, observation=observation, now=NOW)
    assert not differs(outcome.status, again.status)
    assert again.events == ()


@given(specs())
@QUICK
def test_any_specs_children_are_planned_once(spec: Json) -> None:
    service, tuning, _ = judged(spec)
    # What can't be sized has children too: they came before the change that it can't be sized for.
    facts = Facts(served_kinds=OPTIONAL, secrets_hash="0123")
    try:
        manifests = desired(service, tuning or gpu_tuning(), facts)
    except SpecError:
        return
    server, keys = FakeServer(), child_keys(service.key.name)
    server.execute(plan(service, manifests, server.observe(keys)))
    again = plan(service, manifests, server.observe(keys))
    assert again.empty, again.summary


@given(specs())
@QUICK
def test_a_spec_has_one_hash_however_its_fields_are_ordered(spec: Json) -> None:
    def reversed_fields(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: reversed_fields(value[name]) for name in reversed(value)}
        return [reversed_fields(row) for row in value] if isinstance(value, list) else value

    assert inputs_hash(parse(resource(spec))) == inputs_hash(parse(resource(reversed_fields(spec))))


@pytest.mark.parametrize("key", [".", "..", "..data", "a/b", "a b"])
def test_a_key_that_no_secret_can_have_is_refused_by_the_schema(key: str) -> None:
    spec: Json = {
        "model": {"uri": "a"},
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": ".a.b-c_d"}}}],
    }
    SPEC.validate(spec)
    spec["env"][0]["valueFrom"]["secretKeyRef"]["key"] = key
    with pytest.raises(jsonschema_rs.ValidationError):
        SPEC.validate(spec)


@given(feasible_specs(), st.data())
@QUICK
def test_a_file_with_anything_in_it_is_refused_by_its_field(spec: Json, data: st.DataObject) -> None:
    broken = copy.deepcopy(spec)
    *path, last = data.draw(st.sampled_from(list(places(broken))))
    holder = broken
    for step in path:
        holder = holder[step]
    holder[last] = data.draw(st.sampled_from(JUNK))
    # Anything else that is raised is a bug.
    with suppress(UserError):
        tuned(parse(resource(broken)))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a spec."""
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, below in rows:
        yield (*at, step)
        yield from places(below, (*at, step))
