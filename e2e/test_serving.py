"""The sample of the small real model: applied, ready, asked through its Service, changed while it streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from e2e.installation import Installation
from e2e.providers.provider import LIFECYCLE, Provider
from e2e.streams import Question, Stream, ask
from e2e.waiting import namespaced, staying, uids, wait_answers, wait_served
from openai import OpenAI

from operator_world import World, condition_of

NAME = "cpu-small"
SAMPLE = Path(__file__).parents[1] / "manifests" / "samples" / f"{NAME}.yaml"
QUESTION = Question("The longest rivers of Europe are", 300)


@dataclass(frozen=True)
class Served:
    """The sample's resource, where it answers, and what it says to QUESTION undisturbed."""

    world: World
    address: str
    text: str


@pytest.fixture(scope="module")
def served(provider: Provider, installation: Installation) -> Iterator[Served]:
    with namespaced(provider, "serving") as world:
        sample = yaml.safe_load(SAMPLE.read_text())
        sample["metadata"]["namespace"] = world.namespace
        # In place, so that an update ends the one engine at once, in the middle of its streams.
        sample["spec"] |= {"lifecycle": LIFECYCLE, "rollout": {"strategy": "InPlace"}}
        provider.cluster.kubectl("apply", "-f=-", stdin=yaml.safe_dump(sample))
        wait_served(world, NAME)
        address = wait_answers(world.client, provider.address(world.namespace, NAME))
        yield Served(world, address, ask(address, QUESTION))


def test_an_applied_sample_gets_ready_and_the_official_client_chats_through_its_service(served: Served) -> None:
    resource = served.world.get(NAME)
    assert resource["status"]["url"] == f"http://{NAME}.{served.world.namespace}.svc"
    assert condition_of(resource, "TuningResolved")["status"] == "True"
    with OpenAI(base_url=f"http://{served.address}/v1", api_key="none", timeout=120) as client:
        (model,) = client.models.list()
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(
            model=model.id,
            messages=asked,  # type: ignore[arg-type]
            max_tokens=24,
            temperature=0,
        )
    assert "Paris" in str(answer.choices[0].message.content)


def test_a_stream_of_300_tokens_survives_a_rolling_update(served: Served) -> None:
    world = served.world
    (old,) = staying(world.pods(NAME))
    stream = Stream(served.address, QUESTION)
    world.edit(NAME, env=[{"name": "LOG_LEVEL", "value": "debug"}])
    world.client.wait(lambda: not uids([old]) & uids(staying(world.pods(NAME))), "the old engine leaves")
    assert _leaves(world, old)
    assert stream.runs
    assert stream.finish() == served.text
    wait_served(world, NAME)


def test_a_stream_of_300_tokens_survives_a_scale_down(provider: Provider, served: Served) -> None:
    world = served.world
    (old,) = staying(world.pods(NAME))
    stream = Stream(served.address, QUESTION)
    provider.cluster.kubectl("-n", world.namespace, "scale", f"psvc/{NAME}", "--replicas=0")
    world.client.wait(lambda: _leaves(world, old), "the engine leaves")
    assert stream.runs
    assert stream.finish() == served.text
    world.client.wait(lambda: not world.pods(NAME), "no engine is left", seconds=120)


def _leaves(world: World, pod: dict[str, dict[str, str]]) -> bool:
    found = world.client.find("v1", "Pod", pod["metadata"]["name"], namespace=world.namespace)
    return found is not None and "deletionTimestamp" in found["metadata"]
