"""Real engines behind a resource, as their clients see them: ready addresses, long streams, questions without pause."""

from __future__ import annotations

import http.client
import json
import shlex
import sys
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from control_cluster import Cluster
from models import tiny_chat_model
from node_stand_in import NodeStandIn
from operator_world import World, condition_of, install_crd
from operators import QUICK, OperatorThread

JSON = dict[str, Any]

COMMAND = (sys.executable, "-m", "pagedserve_engine", "serve")
"""What the engine's image runs."""
SLOW_IMAGE = "pagedserve/engine:slow"
SLOW_SECONDS = 3
"""For so long an engine of that image answers nobody, not even its probes: what big libraries take on slow disks."""
LONG = 1800
"""Tokens of an answer that takes seconds, however fast the machine."""
SECONDS = 180.0
"""Several engines that start together share two cores."""
HURRY = 50.0
"""So fast come the probes that liveness would kill what is slow to answer, were it asked."""
PAUSE_SECONDS = 0.05
"""Between two short questions."""
QUESTION: JSON = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
LIFECYCLE: JSON = {"startupTimeoutSeconds": 86400, "preStopSeconds": 2, "drainSeconds": 120}
"""A stand-in that hurries hurries the startup's budget, too."""


@contextmanager
def engine_world(control_plane: Cluster) -> Iterator[tuple[World, NodeStandIn]]:
    """A namespace with an operator that looks at Secrets often, and a node whose engines are real.

    An engine that fails isn't started a third time.
    """
    client, name = control_plane.client(), f"test-{uuid.uuid4().hex[:8]}"
    client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    client.wait(lambda: client.find("v1", "ServiceAccount", "default", namespace=name), "its service account")
    install_crd(control_plane)
    slow = ["/bin/sh", "-c", f"sleep {SLOW_SECONDS}; exec {shlex.join(COMMAND)}"]
    images = {QUICK.engine_image: COMMAND, SLOW_IMAGE: slow}
    node = NodeStandIn(client, f"node-{name}", images=images, hurry=HURRY, backoff=600.0 * HURRY, subnet=78)
    with node, OperatorThread(control_plane.kubeconfig, QUICK.derive(secret_resync_seconds=0.5)):
        yield World(client, name), node
    client.delete("v1", "Namespace", name)


def tiny(**fields: Any) -> JSON:
    """``spec.model`` of a random model that chats, named ``tiny``, and its true shape."""
    config, folder = tiny_chat_model()
    embeddings = 2 * config.vocab_size * config.hidden_size
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    architecture = {
        "layers": config.num_hidden_layers,
        "kvHeads": config.num_key_value_heads,
        "headDim": config.head_dim,
        "hiddenSize": config.hidden_size,
        "intermediateSize": config.intermediate_size,
        "vocabSize": config.vocab_size,
        "parameters": embeddings
        + config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size),
        "maxPositionEmbeddings": config.max_position_embeddings,
    }
    return {"uri": str(folder), "servedName": "tiny", "architecture": architecture, **fields}


def wait_served(world: World, name: str) -> JSON:
    """The resource, once its newest generation is ready and every replica has the newest template."""

    def served() -> JSON | None:
        resource = world.get(name)
        told = [condition_of(resource, kind) for kind in ("Ready", "Progressing")]
        seen = [(row.get("reason"), row.get("observedGeneration")) for row in told]
        generation = resource["metadata"]["generation"]
        return resource if seen == [("Available", generation), ("Complete", generation)] else None

    return world.client.wait(served, f"{name} is served", seconds=SECONDS)


def addresses(world: World, name: str) -> list[str]:
    """host:port of every engine to which the Service sends new requests."""
    slices = world.client.list(
        "discovery.k8s.io/v1", "EndpointSlice", namespace=world.namespace, labels=f"kubernetes.io/service-name={name}"
    )
    return [
        f"{address}:{port['port']}"
        for part in slices
        for endpoint in part.get("endpoints") or ()
        if endpoint["conditions"].get("ready")
        for address in endpoint["addresses"]
        for port in part["ports"]
    ]


def only_address(world: World, name: str) -> str:
    """The address of a resource with one replica that is ready."""
    (address,) = world.client.wait(lambda: addresses(world, name), f"the Service {name} has an endpoint")
    return address


def openai_at(address: str, *, key: str = "none") -> OpenAI:
    """The official client; it tries nothing twice."""
    return OpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0, timeout=SECONDS)


def health(address: str, page: str = "ready") -> int:
    """The status of a health page; 0 where nobody answers."""
    return _ask(address, "GET", f"/health/{page}")[0]


def samples(address: str) -> dict[tuple[str, str], float]:
    """What /metrics says, by name and ``kind`` (empty where there is none); one of each other label's values."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SECONDS) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, sample.labels.get("kind", "")): sample.value for each in families for sample in each.samples}


def _ask(address: str, method: str, path: str, body: JSON | None = None, *, key: str = "none") -> tuple[int, str]:
    """(Status, text) on a connection of its own; (0, why) where there is no answer."""
    place = urllib.parse.urlsplit(f"//{address}")
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=SECONDS)
    try:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error)
    finally:
        connection.close()


class Stream:
    """A long answer, streamed in a thread of its own; made, its first tokens are there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._tokens: int | None = None
        self._failure: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(SECONDS), f"no stream began at {address}"

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def finish(self) -> int:
        """Wait for the end, and give the number of tokens that the engine says it sent; raises what broke it."""
        self._thread.join(SECONDS)
        assert not self.runs, f"the stream at {self.address} doesn't end"
        if self._failure is not None:
            raise self._failure
        assert self._tokens is not None, f"the stream at {self.address} was cut"
        return self._tokens

    def _run(self) -> None:
        try:
            with openai_at(self.address) as client, self._open(client) as chunks:
                for chunk in chunks:
                    self._begun.set()
                    self._tokens = chunk.usage.completion_tokens if chunk.usage else None
        except Exception as error:
            self._failure = error
        finally:
            self._begun.set()

    @staticmethod
    def _open(client: OpenAI) -> Any:
        return client.completions.create(
            model="tiny",
            prompt="Once upon a time",
            max_tokens=LONG,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )


class Asking:
    """A client that asks one short question after the other, each on a new connection to an engine that is ready."""

    def __init__(self, world: World, name: str, *, key: str = "none") -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._world, self._name, self._key = world, name, key
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(SECONDS)

    def wait_answers(self, count: int) -> None:
        """Until so many more questions have been answered."""
        wanted = self.answered + count
        self._world.client.wait(lambda: self.answered >= wanted, "questions are answered", seconds=SECONDS)

    def _run(self) -> None:
        turn = 0
        while not self._over.wait(PAUSE_SECONDS):
            turn += 1
            ready = addresses(self._world, self._name)
            if not ready:
                self.failures.append("no engine is ready")
                continue
            address = ready[turn % len(ready)]
            code, text = _ask(address, "POST", "/v1/chat/completions", QUESTION, key=self._key)
            if code == 200:
                self.answered += 1
            else:
                self.failures.append(f"{address}: {code} {text}")
