"""From a loaded model to a runner: the device, its threads, inputs, sampling, and the steps that are captured."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import torch
from tqdm import tqdm

from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.cache.layout import CacheLayout
from pagedserve_engine.cache.tensors import CacheTensors
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ConfigError
from pagedserve_engine.grammar import GrammarCompiler
from pagedserve_engine.graphs import CudaRecorder, GraphKey, Recorder, graph_sizes
from pagedserve_engine.inputs import InputBuilder, staging_bytes
from pagedserve_engine.limits import cpu_limit
from pagedserve_engine.model.loader import LoadedModel
from pagedserve_engine.runner import Draw, ModelRunner
from pagedserve_engine.sampling_state import SamplingState
from pagedserve_engine.staging import Staging

logger = logging.getLogger(__name__)


def choose_device(setting: str) -> torch.device:
    """The device that DEVICE names; raises ConfigError where it isn't there."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise ConfigError(f"DEVICE is {setting!r}: give auto, cpu, cuda or cuda:N", param="device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"DEVICE is {setting!r}: give auto, cpu, cuda or cuda:N", param="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"DEVICE is {setting!r} and {torch.cuda.device_count()} CUDA devices are visible", param="device"
        )
    return device


def prepare_threads(config: EngineConfig, world: int = 1) -> None:
    """Let the model use the container's processors, no more; what exceeds a quota is throttled.

    ``world`` ranks get equally many.
    """
    threads = cpu_limit() if config.num_threads == "auto" else config.num_threads
    torch.set_num_threads(max(1, threads // world))


def build_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    cache: CacheTensors,
    attention: AttentionBackend,
    *,
    layout: CacheLayout,
    max_batch_tokens: int,
    max_model_len: int,
    grammars: GrammarCompiler | None = None,
) -> ModelRunner:
    """A runner of ``loaded`` over ``cache``, for steps and sequences of so many tokens."""
    spec, device = loaded.spec, cache.keys[0].device
    capacity = staging_bytes(
        layout, max_num_seqs=config.max_num_seqs, max_batch_tokens=max_batch_tokens, max_model_len=max_model_len
    )
    staging = Staging(capacity, device)
    sampling = SamplingState(
        spec.vocab_size,
        config.max_num_seqs,
        eos_token_ids=spec.eos_token_ids,
        device=device,
        grammars=grammars,
        staging=staging,
    )
    inputs = InputBuilder(
        layout,
        cache,
        attention,
        staging,
        num_layers=spec.num_layers,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )
    return ModelRunner(loaded.model, inputs, sampling, max_num_seqs=config.max_num_seqs, draw=draw_for(device))


def capture(
    config: EngineConfig,
    runner: ModelRunner,
    *,
    recorder: Recorder | None = None,
    progress: bool = True,
) -> None:
    """Capture the decode steps that are to be replayed, where the settings and the device allow it.

    A ``recorder`` stands in for CUDA's. Without ``progress`` no bar is shown.
    """
    if not wants_graphs(config, runner, recorder):
        return
    sizes = graph_sizes(config.max_num_seqs)
    runner.capture(
        CudaRecorder(runner.device) if recorder is None else recorder,
        sizes,
        each=functools.partial(_show, disable=recorder is not None or not progress),
    )
    if runner.graphs is not None:
        graphs = runner.graphs
        logger.info(
            "captured %d steps of up to %d rows in %.1f s, %.0f MiB",
            graphs.num_captured,
            sizes[-1],
            graphs.seconds,
            graphs.num_bytes / 2**20,
        )


def wants_graphs(config: EngineConfig, runner: ModelRunner, recorder: Recorder | None = None) -> bool:
    """Whether steps are captured; says so where they were asked for and aren't."""
    if not config.use_cuda_graph:
        return False
    reasons = (
        (runner.device.type != "cuda" and recorder is None, f"there are none on {runner.device}"),
        (not runner.attention.plans_on_device, f"attention by {runner.attention.name} is planned on the host"),
    )
    for holds, reason in reasons:
        if holds:
            logger.warning("USE_CUDA_GRAPH has no effect: %s", reason)
            return False
    return True


def draw_for(device: torch.device) -> Draw | None:
    """How tokens are drawn on ``device`` where nothing more is asked: by our kernels, where they run."""
    if device.type != "cuda":
        return None
    from pagedserve_engine.kernels.sampling import sample

    def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        inverse_temperature, top_k, top_p, min_p, greedy, uniform = numbers.unbind(0)
        return sample(
            logits,
            inverse_temperature=inverse_temperature.float(),
            top_k=top_k.to(torch.int32),
            top_p=top_p.float(),
            min_p=min_p.float(),
            greedy=greedy.to(torch.bool),
            uniform=uniform,
        )

    return draw


def _show(keys: Iterable[GraphKey], *, disable: bool) -> Iterable[GraphKey]:
    bar: Iterable[GraphKey] = tqdm(list(keys), desc="capturing steps", unit="graph", disable=disable)
    return bar
