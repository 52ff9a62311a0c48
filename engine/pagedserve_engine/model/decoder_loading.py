"""From a configuration to a fused decoder with its weights on the device, or to the reason why there is none.

transformers' own model, built without storage, is the measure: a recipe that doesn't expect exactly its parameters is
not used, and rotary tables are computed by its module.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig

from pagedserve_engine.model.decoder import Collective, FusedDecoder
from pagedserve_engine.model.decoder_rotary import rotary_tables
from pagedserve_engine.model.ops import choose_ops
from pagedserve_engine.model.products import MakeLinear, choose_products
from pagedserve_engine.model.progress import Progress
from pagedserve_engine.model.recipes import NotCovered, Recipe, read_recipe
from pagedserve_engine.model.shards import Share, TensorPlan, plan_tensors
from pagedserve_engine.model.spec import ModelSpec
from pagedserve_engine.model.weights import WeightFiller, fill_random, load_weights

logger = logging.getLogger(__name__)

_AUTO_MODEL: Any = AutoModelForCausalLM
_TEXT_PARTS = {"gemma3": "gemma3_text"}
"""Multimodal model types whose text part alone is served, and that part's type."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model that the fused decoder covers."""

    config: Any
    """transformers' configuration of the model, and of its text part."""
    text: Any
    spec: ModelSpec
    recipe: Recipe
    skeleton: torch.nn.Module
    """transformers' model on the meta device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How a decoder is to be built."""

    device: torch.device
    dtype: torch.dtype
    positions: int
    """Length of the rotary tables, tokens."""
    quantize: MakeLinear | None = None
    """Makes each product but the output layer small once its weights are there."""
    rank: int = 0
    world: int = 1
    collective: Collective | None = None
    """Puts the ranks' parts together where ``world`` is more than one."""


def draw_blueprint(config: Any, spec: ModelSpec) -> Blueprint | NotCovered:
    """What a transformers configuration asks of the fused decoder, or why that can't serve it."""
    text = config.get_text_config(decoder=True)
    if text.model_type not in (config.model_type, _TEXT_PARTS.get(config.model_type)):
        return NotCovered(f"the family {config.model_type} has no fused decoder")
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or not type(text).__module__.startswith("transformers."):
        return NotCovered("its configuration comes with code of its own")
    recipe = read_recipe(text, spec)
    if isinstance(recipe, NotCovered):
        return recipe
    with torch.device("meta"):
        skeleton = _AUTO_MODEL.from_config(text)
    found = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in skeleton.named_parameters()}
    expected = {name: plan.shape for name, plan in plan_tensors(recipe, Share.of(spec), spec).items()}
    unlike = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if unlike:
        return NotCovered(f"the fused decoder and transformers' modules differ in the parameter {unlike[0]}")
    return Blueprint(config, text, spec, recipe, skeleton)


def read_decoder(
    blueprint: Blueprint, build: Build, files: Sequence[Path], *, progress: Progress, what: str
) -> FusedDecoder:
    """The decoder with the weights of those safetensors ``files``; raises ModelLoadError naming what is wrong there."""
    decoder, filler, plans = _start(blueprint, build)
    load_weights(filler, plans, files, progress=progress, what=what)
    folder = files[0].parent
    if (folder / "generation_config.json").is_file():
        decoder.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return decoder


def random_decoder(blueprint: Blueprint, build: Build, *, seed: int) -> FusedDecoder:
    """The decoder with random weights, the same for the same ``seed``, made where they stay."""
    decoder, filler, _ = _start(blueprint, build)
    fill_random(filler, decoder, deviation=float(blueprint.text.initializer_range), seed=seed)
    return decoder


def _start(blueprint: Blueprint, build: Build) -> tuple[FusedDecoder, WeightFiller, dict[str, TensorPlan]]:
    recipe, spec = blueprint.recipe, blueprint.spec
    share = Share.of(spec, build.rank, build.world)
    rotary = rotary_tables(blueprint.skeleton, recipe, spec, positions=build.positions, device=build.device)
    ops = choose_ops(build.device)
    with torch.device("meta"):
        decoder = FusedDecoder(
            recipe,
            share,
            ops,
            dtype=build.dtype,
            rotary=rotary,
            collective=build.collective,
        )
    decoder.config = blueprint.config
    products = choose_products(ops, build.dtype, build.device, quantize=build.quantize)
    filler = WeightFiller(decoder, build.device, products)
    return decoder.train(False), filler, plan_tensors(recipe, share, spec)
