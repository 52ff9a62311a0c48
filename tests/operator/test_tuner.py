"""What was decided is kept, whatever the operator, its catalogue and its default image have become meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from children import gpu_tuning, service
from pagedserve_operator.config import OperatorConfig
from pagedserve_operator.errors import GPUTypeRequired
from pagedserve_operator.names import ANNOTATION_INPUTS, ANNOTATION_TUNING
from pagedserve_operator.tuner import Tuner
from pagedserve_operator.tuning import Tuning
from tuning_cases import gfd, node

Json = dict[str, Any]
L4 = node("n1", labels=gfd("NVIDIA-L4", 23034), gpu=1)

# As release 0.1.0 wrote it on a Deployment. Newer operators must go on reading it: see CONTRACT_VERSION.
WRITTEN = (
    '{"gpu":{"bandwidth_gbs":300,"compute_capability":[8,9],"count":1,"memory_mib":23034,"notes":[],'
    '"pin":{"nvidia.com/gpu.product":["NVIDIA-L4"]},"product":"NVIDIA-L4","reason":"spec.gpu.type names NVIDIA-L4",'
    '"resource":"nvidia.com/gpu","source":"spec","tflops":121.0},"image":"pagedserve/engine:0.1.0",'
    '"shape_source":"config.json","sizing":{"block_bytes":4194304,"block_size":32,"breakdown":{"activations":700,'
    '"cache":2800,"graphs":600,"left_over":2304,"runtime":1024,"total":23034,"weights":15606},"dtype":"bfloat16",'
    '"kv_cache_dtype":"bfloat16","max_batch_tokens":2048,"max_model_len":8192,"notes":[],"num_blocks":716},'
    '"sources":{"dtype":"computed","maxBatchTokens":"computed","maxModelLen":"computed","numBlocks":"computed",'
    '"useCudaGraph":"computed"},"use_cuda_graph":true,"weights_mib":15300}'
)
HASH = "ad0a2c0660bfc422"


class Lists:
    """Nodes as they are listed; ``meanwhile`` runs while a list is on its way."""

    def __init__(self, *answers: list[Json], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.answers = list(answers)
        self.meanwhile = meanwhile
        self.asked = 0

    async def list(self, kind: str) -> list[Json]:
        self.asked += 1
        await asyncio.sleep(0)
        self.meanwhile()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def no_config(_: Any) -> None:
    return None


def tuner_of(lists: Lists, **settings: Any) -> Tuner:
    return Tuner(lists, OperatorConfig(**settings), no_config)


def deployment(**annotations: str) -> Json:
    return {"metadata": {"annotations": annotations}}


def kept(text: str = WRITTEN, inputs: str = HASH) -> Json:
    return deployment(**{ANNOTATION_TUNING: text, ANNOTATION_INPUTS: inputs})


def test_a_decision_of_an_earlier_release_is_kept() -> None:
    async def work() -> None:
        tuner = tuner_of(Lists([]), engine_image="pagedserve/engine:9.9.9")
        assert await tuner.tune(service(), kept()) == Tuning.from_json(WRITTEN) == gpu_tuning()

    asyncio.run(work())


@pytest.mark.parametrize("annotations", [kept(inputs="another"), kept(text="{}"), deployment(), None])
def test_without_a_readable_decision_for_this_spec_there_is_a_new_one(annotations: Json | None) -> None:
    async def work() -> None:
        tuner = tuner_of(Lists([L4]), engine_image="pagedserve/engine:9.9.9")
        found = await tuner.tune(service(), annotations)
        assert (found.gpu.product, found.image) == ("NVIDIA-L4", "pagedserve/engine:9.9.9")

    asyncio.run(work())


def test_many_that_come_at_once_list_the_nodes_once() -> None:
    async def work() -> None:
        lists = Lists([L4])
        tuner = tuner_of(lists)
        await asyncio.gather(*(tuner.tune(service(name=f"chat-{number}"), None) for number in range(20)))
        assert lists.asked == 1

    asyncio.run(work())


def test_a_node_that_comes_while_nodes_are_listed_is_seen_by_the_next_who_asks() -> None:
    async def work() -> None:
        lists = Lists([], [L4])
        tuner = tuner_of(lists)
        lists.meanwhile = tuner.forget_nodes
        with pytest.raises(GPUTypeRequired):
            await tuner.tune(service(), None)
        assert (await tuner.tune(service(), None)).gpu.product == "NVIDIA-L4"

    asyncio.run(work())
