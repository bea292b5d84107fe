"""A dry run of a transfer at full size: every part on torch's meta device, so neither weights nor data nor a network are needed.

    vpgtrans train recipes/vl_llama.yaml --dry-run

It prints the parts with their parameters and where each would come from; for each stage what trains, how many updates of how many pairs,
and at which rate; and the memory of one GPU.  Sizes come from what is on this machine, else from the recipe: `vision.architecture` or
`vision.config`, `target.config`, `qformer`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from .checkpoint import CheckpointError, trainable_tensors
from .data.coco import read_image_data
from .models.llm import ModelError, attention_of
from .models.sources import describe_source
from .models.tower import VisionTower
from .models.vision import build_tower_on_meta
from .models.vlm import VisionLanguageModel
from .models.vpg import VPG
from .recipe import WEIGHT_SUFFIXES, QFormerConfig, RecipeError, Stage, TransferRecipe, missing_files

GIB = 2**30
CAPTION_TOKENS = 13  # of a COCO caption, BOS and newline counted
ANSWER_TOKENS = 160  # of a conversation's answer at most, as in the authors' code
ACTIVATIONS = (
    "Activations: what is kept for the backward pass of one micro-batch of row_tokens x rows_per_micro_batch tokens, with captions of "
    f"{CAPTION_TOKENS} tokens, one an image (answers of {ANSWER_TOKENS} in conversations).  With c bytes a value in the compute dtype:\n"
    "  language model   tokens x (c x (outputs of its linear layers, gates once more) + 4 x widths of its norms), + tokens x row x 6 x heads "
    "a layer where attention is eager\n"
    "  head             text tokens x vocabulary x (2c + 8)\n"
    "  Q-Former         where it trains: tokens x c x (inputs + outputs of its linear layers) + 4 x widths of its norms; keys and values "
    "of the image count its tokens\n"
    "  casts            c x what trains (autocast keeps its casts through a micro-batch)\n"
    "or the widest moment of the tower, images x tokens x (4c x widest layer + 8 x width), where that is more.  "
    "An estimate: the CUDA context, fragmentation and beam search come on top."
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


@dataclass
class Plan:
    recipe: TransferRecipe
    compute_dtype: torch.dtype
    tower: VisionTower
    model: VisionLanguageModel
    parts: list[Part]
    stages: list[StagePlan]
    notes: list[str] = field(default_factory=list)


def dry_run(recipe: TransferRecipe) -> Plan:
    """Build everything on the meta device, print the plan to stdout (rank 0), and return it.  Writes no file.

    Raises ModelError or CheckpointError when sizes are not known or do not fit, RecipeError when a stage's length cannot be told.
    """
    plan = make_plan(recipe)
    if os.environ.get("RANK", "0") == "0":
        _print(plan)
    return plan


def make_plan(recipe: TransferRecipe) -> Plan:
    """The plan of a recipe; raises as `dry_run`."""
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
    stages = []
    for index, stage in enumerate(recipe.stages):
        model.freeze_for(stage.trains, stage.frozen_dropout)
        trainable = sum(p.numel() for p in trainable_tensors(model).values())
        pairs = stage.pairs or _pairs_of_epochs(recipe, index)
        memory = _memory(recipe, stage, tower, model, trainable, compute_dtype.itemsize)
        stages.append(StagePlan(stage, trainable, pairs, -(-pairs // stage.batch_pairs), memory))
    return Plan(recipe, compute_dtype, tower, model, parts, stages, notes)


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


def _memory(
    recipe: TransferRecipe, stage: Stage, tower: VisionTower, model: VisionLanguageModel, trainable: int, c: int
) -> dict[str, int]:
    """Bytes on one GPU, each part of which is whole on each GPU; c: bytes of a value in the compute dtype."""
    frozen_vpg = sum(p.numel() for p in model.vpg.parameters() if not p.requires_grad)
    return {
        "frozen weights: vision tower, compute dtype": c * tower.parameter_count,
        "frozen weights: language model, compute dtype": c * _parameter_count(model.llm),
        "frozen weights: VPG, float32": 4 * frozen_vpg,
        "what trains: master weights, float32": 4 * trainable,
        "gradients, float32": 4 * trainable,
        "AdamW moments, 2 x float32": 8 * trainable,
        "activations (estimate)": activation_bytes(recipe, stage, tower, model, c),
    }


def activation_bytes(
    recipe: TransferRecipe, stage: Stage, tower: VisionTower, model: VisionLanguageModel, c: int
) -> int:
    """The estimate that `ACTIVATIONS` states, in bytes, for a model frozen as in `stage`; c: bytes of a value in the compute dtype."""
    queries, tokens = model.queries, recipe.data.row_tokens * recipe.data.rows_per_micro_batch
    chosen = [e for e in recipe.data.train if e.name in (stage.data or [e.name])]
    talks = [e.max_text_tokens or ANSWER_TOKENS for e in chosen if e.style == "conversation"]
    text = max(talks, default=CAPTION_TOKENS)
    llm, config = model.llm, model.llm.config
    if config.is_encoder_decoder:
        images = max(1, tokens // (queries + text))
        sides = [(llm.get_encoder(), images * queries), (llm.get_decoder(), images * text)]
    else:
        images = recipe.data.rows_per_micro_batch * max(1, recipe.data.row_tokens // (queries + text))
        sides = [(llm.base_model, tokens)]
    kept = sum(n * (c * _linear_outputs(m) + 4 * _norm_widths(m, config.num_attention_heads)) for m, n in sides)
    if attention_of(config) == "eager":
        layers = config.num_hidden_layers
        kept += sum(n * layers * config.num_attention_heads * (queries + text) * 6 for _, n in sides)
    kept += images * text * config.vocab_size * (2 * c + 8)
    trains_vpg = any(p.requires_grad for p in model.vpg.parameters())
    if trains_vpg:
        kept += images * _vpg_bytes(model.vpg, tower.tokens, c)
    kept += c * sum(p.numel() for p in trainable_tensors(model).values())
    widest = max((max(m.in_features, m.out_features) for _, m in _linears(tower)), default=0)
    return max(kept, images * tower.tokens * (4 * c * widest + 8 * tower.width))


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))


def _linear_outputs(module: nn.Module) -> int:
    """Values a token; the product of a gate (LLaMA's and T5's names) is one more of its width."""
    total = 0
    for name, linear in _linears(module):
        total += linear.out_features
        if name.endswith(("gate_proj", "wi_0")):
            total += linear.out_features
        elif name.endswith("gate_up_proj"):
            total += linear.out_features // 2
    return total


def _norm_widths(module: nn.Module, heads: int) -> int:
    """Values a token; a norm much narrower than the widest is of one head (Qwen3)."""
    norms = (m for m in module.modules() if type(m).__name__.endswith("Norm"))
    widths = [m.weight.numel() for m in norms if getattr(m, "weight", None) is not None]
    return sum(w * heads if w * heads <= 2 * max(widths) else w for w in widths)


def _vpg_bytes(vpg: VPG, image_tokens: int, c: int) -> int:
    """Of one image: inputs and outputs of the Q-Former's linear layers, and the inputs of its norms."""
    queries, total = vpg.config.num_query_tokens, 4 * image_tokens * vpg.image_width
    for name, linear in _linears(vpg.qformer):
        reads_image = "crossattention" in name and name.endswith(("key", "value"))
        total += c * (image_tokens if reads_image else queries) * (linear.in_features + linear.out_features)
    return total + 4 * queries * _norm_widths(vpg.qformer, vpg.config.num_attention_heads)


def _print(plan: Plan) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
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
    return lines
