"""A dry run of a transfer at full size: every part on torch's meta device, so neither weights nor data nor a network are needed.

    vpgtrans train recipes/vl_llama.yaml --dry-run

It prints the parts with their parameters and where each would come from; for each stage what trains, how many updates of how many pairs,
and at which rate; and the memory of one GPU.  Sizes come from what is on this machine, else from the recipe: `vision.architecture` or
`vision.config`, `target.config`, `qformer`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from .checkpoint import CheckpointError
from .data.coco import read_image_data
from .kernel_choice import fuses_cross_attention_on_cpu
from .models.llm import ModelError, attention_of
from .models.sources import describe_source
from .models.tower import VisionTower
from .models.vision import build_tower_on_meta
from .models.vlm import VisionLanguageModel
from .models.vpg import VPG
from .planning.costs import StageCosts, compute_setting, stage_costs
from .planning.workload import SetShape, local_tokenizer, set_shape
from .preflight import machine_problems
from .recipe import WEIGHT_SUFFIXES, QFormerConfig, RecipeError, Stage, TransferRecipe, missing_files

GIB = 2**30
TOWER_ITEM, LLM_ITEM = (f"frozen weights: {part}, compute dtype" for part in ("vision tower", "language model"))
MASTER_ITEM, MOMENTS_ITEM = "what trains: master weights, float32", "AdamW moments, 2 x float32"
ACTIVATIONS_ITEM, WORKING_ITEM = "activations kept for backward", "working memory (estimate)"
ACTIVATIONS = (
    "Activations are what one micro-batch keeps for its backward pass: the engine's own code was run on tensors without data and asked.\n"
    "Working memory is the gradient of the logits, or, where that is more, what the widest moment of the tower takes beyond the activations.\n"
    "The CUDA context, fragmentation and beam search come on top."
)


@dataclass(frozen=True)
class Part:
    name: str
    parameters: int
    origin: str


@dataclass(frozen=True)
class StagePlan:
    """What a stage trains and how long; `memory` in bytes on one GPU, in the order of the printed table."""

    stage: Stage
    trainable: int
    pairs: int
    updates: int
    memory: dict[str, int]
    costs: StageCosts


@dataclass
class Plan:
    recipe: TransferRecipe
    compute_dtype: torch.dtype
    tower: VisionTower
    model: VisionLanguageModel
    parts: list[Part]
    stages: list[StagePlan]
    shapes: dict[str, SetShape] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def dry_run(recipe: TransferRecipe) -> Plan:
    """Build everything on the meta device, print the plan to stdout (rank 0), and return it.  Writes no file.

    Raises ModelError or CheckpointError when sizes are not known or do not fit, RecipeError when a stage's length cannot be told.
    """
    plan = make_plan(recipe)
    if os.environ.get("RANK", "0") == "0":
        _print(plan)
    return plan


def make_plan(recipe: TransferRecipe, with_tower: bool = False) -> Plan:
    """The plan of a recipe; raises as `dry_run`.  with_tower: count what the tower's forward pass costs too."""
    compute_dtype = torch.float32 if recipe.precision == "fp32" or recipe.device == "cpu" else torch.bfloat16
    if recipe.precision == "bf16":
        compute_dtype = torch.bfloat16
    notes: list[str] = []
    absent = dict(missing_files(recipe))
    has_sizes = {"vision.path": recipe.vision.architecture or recipe.vision.config, "target.llm": recipe.target.config}
    for key, sizes in has_sizes.items():
        if key in absent and not sizes and absent[key].suffix not in WEIGHT_SUFFIXES:
            made = (
                f"; make it with `{recipe.inputs_from}`"
                if recipe.inputs_from
                else "; correct the path, or give its sizes in the recipe"
            )
            raise ModelError(
                f"{key}: expected a folder whose sizes can be read, found none at {str(absent[key])!r}{made}"
            )
    tower = build_tower_on_meta(recipe.vision)
    llm = language_model_on_meta(recipe, notes)
    qformer, source = _qformer(recipe, tower)
    with torch.device("meta"):
        vpg = VPG(qformer, tower.width)
        projector = nn.Linear(qformer.hidden_size, int(llm.config.hidden_size))
        model = VisionLanguageModel(vpg, projector, llm)  # type: ignore[arg-type]  # counted, never called
    parts = _parts(recipe, tower, model, source)
    tokenizer = local_tokenizer(recipe)
    used = {n for s in recipe.stages for n in s.data or [e.name for e in recipe.data.train]}
    shapes = {e.name: set_shape(e, recipe, tokenizer) for e in recipe.data.train if e.name in used}
    setting = compute_setting(recipe, compute_dtype)
    # Traces run on fake tensors of the CPU, so the forms that a GPU would take are not in them.
    vpg.cross_attention_impl = "reference"
    vpg.fuses_cross_attention = not setting.on_gpu and fuses_cross_attention_on_cpu(recipe.kernels, vpg, tower.tokens)
    stages = []
    for index, stage in enumerate(recipe.stages):
        pairs = stage.pairs or _pairs_of_epochs(recipe, index)
        costs = stage_costs(recipe, stage, tower, model, shapes, setting, with_tower=with_tower)
        memory = _memory(tower, model, costs, compute_dtype.itemsize)
        stages.append(StagePlan(stage, costs.trainable, pairs, -(-pairs // stage.batch_pairs), memory, costs))
    return Plan(recipe, compute_dtype, tower, model, parts, stages, shapes, notes)


def language_model_on_meta(recipe: TransferRecipe, notes: list[str] | None = None) -> PreTrainedModel:
    """The target language model without weights: sizes of its own config where that is on this machine, else of `target.config`.

    Raises ModelError when neither is there, or the sizes are none of a language model.
    """
    target, notes = recipe.target, [] if notes is None else notes
    config = _local_config(target.llm)
    if config is None and target.config is None:
        raise ModelError(
            f"target.config: expected the sizes of {target.llm!r}, because that is not on this machine, got nothing; give a transformers "
            "config in the recipe, name a folder that exists, or fetch the model's config.json first"
        )
    try:
        if config is None:
            config = AutoConfig.for_model(**target.config)
        else:
            differing = [k for k, v in (target.config or {}).items() if getattr(config, k, v) != v]
            if differing:
                notes.append(f"target.config: {', '.join(differing)} differ from {target.llm}; its own config counts")
        with torch.device("meta"):
            kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_config(config, attn_implementation=attention_of(config))
            # transformers makes every T5 with a tied head and unties it once the file has a head of its own, as Flan-T5's has.
            if getattr(config, "scale_decoder_outputs", None) is False:
                model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"target.config: expected model_type and sizes of a language model that transformers knows, got {target.config or target.llm}: "
            f"{error}; correct it"
        ) from error
    return model


def _local_config(name: str) -> PreTrainedConfig | None:
    """The config of a folder or of a hub id that was fetched before; never asks the network."""
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def _qformer(recipe: TransferRecipe, tower: VisionTower) -> tuple[QFormerConfig, str]:
    """The sizes of the Q-Former, and where they come from: what it is inherited from where that is here, the recipe, BLIP-2's."""
    choice = recipe.initialise.vpg
    place = {"vlm": recipe.source.vlm, "vpg": recipe.source.vpg, "random": None}[choice]
    if place is not None and Path(place).exists():
        info = describe_source(place, recipe.source.files if choice == "vlm" else [])
        if info.image_width not in (None, tower.width):
            raise CheckpointError(
                f"{place}: expected a VPG for image tokens of width {tower.width}, got one for {info.image_width}; use its own tower"
            )
        if info.qformer is not None:
            return info.qformer, f"sizes of {place}"
    return recipe.qformer or QFormerConfig(), "sizes of the recipe" if recipe.qformer else "sizes of BLIP-2"


def _parts(recipe: TransferRecipe, tower: VisionTower, model: VisionLanguageModel, sizes: str) -> list[Part]:
    start, source = recipe.initialise, recipe.source
    vpg = "random" if start.vpg == "random" else _whereabouts(source.vlm if start.vpg == "vlm" else source.vpg)
    projector = "random" if start.projector == "random" else _whereabouts(source.vlm)
    if start.projector == "converter":
        projector += f", merged with the {recipe.converter.method} word converter"
    count = _parameter_count
    return [
        Part("vision tower", tower.parameter_count, _whereabouts(recipe.vision.path)),
        Part("ln_vision", count(model.vpg.ln_vision), vpg),
        Part("query tokens", model.vpg.query_tokens.numel(), vpg),
        Part("Q-Former", count(model.vpg.qformer), f"{vpg}; {sizes}"),
        Part(f"projector to {model.projector.out_features:,}", count(model.projector), projector),
        Part(f"language model ({model.llm.config.model_type})", count(model.llm), _whereabouts(recipe.target.llm)),
    ]


def _whereabouts(place: Any) -> str:
    _, variable, rest = str(place).partition("${")
    if variable:
        return f"${{{rest} (variable not set)"
    if Path(place).exists():
        return f"{place} (here)"
    return f"{place} (not here)" if isinstance(place, Path) or str(place).startswith("/") else f"{place} (hub id)"


def _parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _pairs_of_epochs(recipe: TransferRecipe, index: int) -> int:
    """Captions that a stage of so many epochs sees, counted in its files; RecipeError where those are not here."""
    stage, limit = recipe.stages[index], recipe.data.captions_per_image
    total = 0
    for entry in recipe.data.train:
        if entry.name not in (stage.data or [entry.name]):
            continue
        if not Path(entry.captions).exists():
            raise RecipeError(
                f"stages.{index}.epochs: expected pairs for the stage {stage.name!r}, because the captions of {entry.name!r} are not at "
                f"{str(entry.captions)!r} and cannot be counted; give pairs, or set the path"
            )
        records = read_image_data(entry, "none").records
        total += sum(len(r.captions) if limit == "all" else min(limit, len(r.captions)) for r in records)
    return round(stage.epochs * total)


def _memory(tower: VisionTower, model: VisionLanguageModel, costs: StageCosts, c: int) -> dict[str, int]:
    """Bytes on one GPU, each part of which is whole on each GPU, for a model frozen as in the stage; c: bytes of a value in the compute dtype."""
    frozen_vpg = sum(p.numel() for p in model.vpg.parameters() if not p.requires_grad)
    kept, trainable = round(costs.kept_bytes), costs.trainable
    return {
        TOWER_ITEM: c * tower.parameter_count,
        LLM_ITEM: c * _parameter_count(model.llm),
        "frozen weights: VPG, float32": 4 * frozen_vpg,
        MASTER_ITEM: 4 * trainable,
        "gradients, float32": 4 * trainable,
        MOMENTS_ITEM: 8 * trainable,
        ACTIVATIONS_ITEM: kept,
        WORKING_ITEM: round(costs.activation_bytes) - kept,
    }


def _print(plan: Plan) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=150)
    recipe = plan.recipe
    console.print(f"{recipe.name}: dry run, nothing is read into memory and nothing is written", markup=False)
    parts = Table(title="parts", title_justify="left")
    for column in ("part", "parameters", "would come from"):
        parts.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for part in plan.parts:
        parts.add_row(part.name, f"{part.parameters:,}", part.origin)
    parts.add_row("total", f"{sum(p.parameters for p in plan.parts):,}", "")
    console.print(parts)
    console.print(_stage_table(plan))
    total_pairs, total_updates = sum(s.pairs for s in plan.stages), sum(s.updates for s in plan.stages)
    console.print(
        f"In all {total_updates:,} updates, {total_pairs:,} pairs ({total_pairs / 1e6:,.2f} M).  An update is batch_pairs pairs, however "
        "many GPUs and micro-batches they are spread over.\n"
    )
    console.print(_memory_table(plan))
    data, dtype = recipe.data, str(plan.compute_dtype).removeprefix("torch.")
    rows = f"{data.rows_per_micro_batch} rows of {data.row_tokens} tokens"
    console.print(f"Compute dtype {dtype}; micro-batches of {rows}; every part is whole on every GPU.")
    console.print(ACTIVATIONS, markup=False)
    for line in [*plan.notes, *_absent(recipe)]:
        console.print(line, markup=False)


def _stage_table(plan: Plan) -> Table:
    table = Table(title="stages", title_justify="left")
    numbers = ("trainable parameters", "updates", "pairs an update", "pairs")
    for column in ("stage", "trains", *numbers, "learning rate", "data"):
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for number, item in enumerate(plan.stages, 1):
        stage = item.stage
        table.add_row(
            f"{number} {stage.name}", stage.trains.replace("_", " "), f"{item.trainable:,}", f"{item.updates:,}", f"{stage.batch_pairs:,}",
            f"{item.pairs:,}", _rate(stage), _mix(plan.recipe, stage),
        )  # fmt: skip
    return table


def _rate(stage: Stage) -> str:
    text = f"{stage.learning_rate:g} constant"
    if stage.schedule == "cosine":
        text = f"{stage.learning_rate:g} to {stage.min_learning_rate:g}, cosine"
    if not stage.warmup_pairs:
        return f"{text}, no warm-up"
    return f"{text}, after {stage.warmup_pairs:,} pairs from {stage.warmup_learning_rate:g}"


def _mix(recipe: TransferRecipe, stage: Stage) -> str:
    chosen = [e for e in recipe.data.train if e.name in (stage.data or [e.name])]
    total = sum(e.weight or 0.0 for e in chosen)
    return " + ".join(f"{e.weight / total:.2f} {e.name}" if e.weight else e.name for e in chosen)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="memory of one GPU, GiB", title_justify="left")
    table.add_column("")
    for item in plan.stages:
        table.add_column(item.stage.name, justify="right")
    for name in plan.stages[0].memory:
        table.add_row(name, *(f"{item.memory[name] / GIB:.2f}" for item in plan.stages))
    table.add_section()
    table.add_row("total", *(f"{sum(item.memory.values()) / GIB:.2f}" for item in plan.stages))
    return table


def _absent(recipe: TransferRecipe) -> list[str]:
    """What the run itself will ask for and is not here."""
    lines = []
    unset = [n for n in re.findall(r"\$\{(\w+)\}", recipe.model_dump_json()) if n not in os.environ]
    if unset:
        lines.append(f"The run itself needs these environment variables: {', '.join(dict.fromkeys(unset))}.")
    files = [key for key, path in missing_files(recipe) if "${" not in str(path)]
    if files:
        lines.append(f"The run itself needs files that are not here: {', '.join(files)}.")
    return lines + [f"This machine could not run it: {line}" for line in machine_problems(recipe)]
