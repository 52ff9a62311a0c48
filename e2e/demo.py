"""`make demo`: the project's main job, from an empty cluster to an autoscaled service and back, told as it happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.installation import BUNDLE, Installation
from e2e.interrupts import end_in_order_on_sigterm
from e2e.narration import SECONDS, Broken, Narrator, failure
from e2e.pair import ENV
from e2e.stage import Stage, staged, strike
from e2e.streams import Crowd, Question, ask
from e2e.waiting import objects_in, wait_answers
from openai import OpenAI

from control_client import Client
from operator_world import World

JSON = dict[str, Any]
RESOURCE = Path(__file__).parent / "demo.yaml"
NAME = NAMESPACE = "demo"
PROMPTS = ("The river", "Once upon a time", "A good meal", "In the mountains")
TOKENS = 48
CLIENTS = 6
ROLLING = ("Ready", "Progressing")


@dataclass(frozen=True)
class Demo:
    """The story's parts, in order."""

    narrator: Narrator
    stage: Stage
    keep: bool

    @property
    def client(self) -> Client:
        """As an administrator."""
        return self.stage.cluster.client()

    @property
    def world(self) -> World:
        """The namespace of the story."""
        return World(self.client, NAMESPACE)

    def tell(self) -> None:
        """All of it; raises what goes wrong."""
        self.install()
        before = self.apply()
        self.chat()
        texts = {question: ask(self.address, question) for question in self.questions()}
        self.show_autoscaler("before the load")
        with Crowd(self.address, texts, clients=CLIENTS) as crowd:
            self.scale_up(crowd)
            self.update(crowd)
        self.settle(crowd)
        if self.keep:
            self.hand_over()
        else:
            self.delete(before)

    @property
    def address(self) -> str:
        """Of the Service."""
        return self.stage.address(NAMESPACE, NAME)

    @staticmethod
    def questions() -> list[Question]:
        """What the load asks."""
        return [Question(prompt, TOKENS) for prompt in PROMPTS]

    def install(self) -> None:
        """CRD and operator."""
        self.narrator.stage("The operator: kubectl apply --server-side -f manifests/install.yaml")
        installation = Installation(self.stage.cluster)
        installation.apply(BUNDLE.read_text(encoding="utf-8"), self.stage.images, settings={})
        self.narrator.say(self.kubectl("-n", installation.namespace, "get", "deployments,pods"))

    def apply(self) -> set[tuple[str, str]]:
        """The resource, until it is ready; gives what was in the namespace before."""
        self.narrator.stage("An InferenceService: kubectl apply -f e2e/demo.yaml")
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        self.client.create(namespace)
        self.client.wait(lambda: len(objects_in(self.client, NAMESPACE)) >= 2, "the namespace is set up")
        before = objects_in(self.client, NAMESPACE)
        self.narrator.say(RESOURCE.read_text(encoding="utf-8"))
        self.kubectl("-n", NAMESPACE, "apply", "-f", str(RESOURCE))
        self.narrator.follow(
            lambda: conditions(self.world.get(NAME)), until=lambda rows: any(" Ready=True" in r for r in rows)
        )
        self.narrator.say(self.kubectl("-n", NAMESPACE, "get", "psvc"))
        return before

    def chat(self) -> None:
        """One answer, streamed through the Service."""
        question = "Name three rivers of Europe."
        self.narrator.stage(f"A chat through the Service, {self.address}: {question!r}")
        wait_answers(self.client, self.address)
        asked: Any = [{"role": "user", "content": question}]
        with OpenAI(base_url=f"http://{self.address}/v1", api_key="none", timeout=SECONDS) as client:
            (model,) = client.models.list()
            stream: Any = client.chat.completions.create(
                model=model.id, messages=asked, max_tokens=60, temperature=0, stream=True
            )
            with stream as chunks:
                for chunk in chunks:
                    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
        print(flush=True)

    def show_autoscaler(self, moment: str) -> None:
        """What the HPA sees."""
        self.narrator.stage(f"The autoscaler's view, {moment}")
        self.world.wait(NAME, "ScalingActive", seconds=SECONDS)
        self.narrator.say(self.kubectl("-n", NAMESPACE, "get", "hpa"))

    def scale_up(self, crowd: Crowd) -> None:
        """One engine becomes three."""
        self.narrator.stage(f"Load: {CLIENTS} clients stream without pause, and requests wait")
        self.narrator.follow(self.scaling, until=lambda rows: "3 ready" in rows[0])
        self.narrator.say(self.kubectl("-n", NAMESPACE, "get", "hpa"))
        self.narrator.say(f"{crowd.tally.whole} streams whole so far, {len(crowd.faults)} broken")

    def update(self, crowd: Crowd) -> None:
        """Every engine is replaced while they stream."""
        self.narrator.stage("A rolling update under that load: spec.env changes, so every engine is replaced")
        begun = crowd.tally.started
        self.world.edit(NAME, env=[*ENV, {"name": "LOG_LEVEL", "value": "warning"}])
        self.narrator.follow(
            lambda: [*conditions(self.world.get(NAME), only=ROLLING), *self.scaling()], until=self.is_rolled
        )
        crowd.wait_started(1)
        self.narrator.say(f"{crowd.tally.started - begun} streams were started meanwhile")

    def settle(self, crowd: Crowd) -> None:
        """The load ends; every stream must have come whole."""
        tally = crowd.tally
        self.narrator.say(f"{tally.started} streams, {tally.whole} with their whole text, {len(crowd.faults)} broken")
        if crowd.faults or tally.whole != tally.started:
            raise Broken("; ".join(crowd.faults[:3]) or f"{tally.started - tally.whole} streams didn't end")

    def hand_over(self) -> None:
        """Everything stays, for whoever wants to try it."""
        self.narrator.stage("It stays up; `make demo-down` ends it")
        cluster = self.stage.cluster
        self.narrator.say(
            f"{cluster.kubectl_program} --kubeconfig {cluster.kubeconfig} -n {NAMESPACE} get psvc,hpa,pods"
        )
        self.narrator.say(f'curl http://{self.address}/v1/completions -d \'{{"prompt": "The river"}}\'')

    def delete(self, before: set[tuple[str, str]]) -> None:
        """Nothing is left."""
        self.narrator.stage("Deletion: kubectl delete psvc demo")
        self.kubectl("-n", NAMESPACE, "delete", "psvc", NAME)
        self.narrator.follow(self.left(before), until=lambda rows: rows == ["nothing is left"])

    def is_rolled(self, rows: list[str]) -> bool:
        """Whether the newest generation runs everywhere."""
        resource = self.world.get(NAME)
        rows_of = {row["type"]: row for row in resource["status"]["conditions"]}
        told = rows_of["Progressing"]
        return (told["reason"], told["observedGeneration"]) == ("Complete", resource["metadata"]["generation"])

    def scaling(self) -> list[str]:
        """Wanted and ready engines."""
        status = self.world.child("HorizontalPodAutoscaler", NAME).get("status", {})
        ready = self.world.child("Deployment", NAME).get("status", {}).get("readyReplicas", 0)
        return [f"engines: {status.get('desiredReplicas', '?')} wanted, {ready} ready"]

    def left(self, before: set[tuple[str, str]]) -> Callable[[], list[str]]:
        """What is still there of what the story made."""

        def found() -> list[str]:
            kinds = sorted(f"{kind} {name}" for kind, name in objects_in(self.client, NAMESPACE) - before)
            return [f"left: {', '.join(kinds)}"] if kinds else ["nothing is left"]

        return found

    def kubectl(self, *arguments: str) -> str:
        """What it prints."""
        return self.stage.cluster.kubectl(*arguments).stdout


def conditions(resource: JSON, *, only: Sequence[str] = ()) -> list[str]:
    """Tuning first, then each condition with its reason; those of the types ``only`` alone where any are given."""
    status = resource.get("status") or {}
    tuning = status.get("tuning") or {}
    numbers = ", ".join(f"{name} {tuning[name]}" for name in ("numBlocks", "maxBatchTokens", "dtype") if name in tuning)
    rows = [f"tuning: {numbers}"] if numbers and not only else []
    for row in status.get("conditions", ()):
        if not only or row["type"] in only:
            rows.append(f"condition {row['type']}={row['status']} ({row['reason']}): {row['message'][:90]}")
    return rows


def main(arguments: list[str]) -> int:
    """The exit status: 0 for a story that was told to its end, and for one that ``down`` took down."""
    end_in_order_on_sigterm()
    down = arguments == ["down"]
    try:
        print(strike() if down else play(keep=os.environ.get("KEEP", "") not in ("", "0")))
    except KeyboardInterrupt:
        print(f"\nInterrupted; {'`make demo-down` again ends what is left' if down else 'everything is gone'}")
        return 130
    except Exception as error:
        print(f"\n{'demo-down' if down else 'The demo'} failed: {failure(error)}", file=sys.stderr)
        return 1
    return 0


def play(*, keep: bool) -> str:
    """The last line of the story."""
    narrator = Narrator()
    with staged(narrator, keep=keep) as stage:
        Demo(narrator, stage, keep).tell()
    return f"\nDone in {narrator.seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
