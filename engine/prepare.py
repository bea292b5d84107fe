"""From a recipe to what its stages train with: tower, model, data, features, validation, measured peak; each checked before training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import cost, outcome
from .data.captioned import open_captioned, open_training
from .data.coco import read_questions
from .data.feature_cache import open_features
from .data.features import FeatureSource
from .data.ffcv_loader import FFCVFeatures
from .data.packing import Group, Subset, TokenisedCaptions
from .data.token_table import TokenTable
from .diagnostics import Watch
from .distributed.frozen import place
from .evaluation import Validator
from .guards import Guard
from .kernel_choice import use_kernels
from .models.tower import PixelNorm
from .models.vision import load_tower
from .models.vlm import VisionLanguageModel
from .preflight import check_attributes, check_rows
from .recipe import ImageData, TransferRecipe
from .regions import use_regions
from .resume import Progress
from .runlog import RunLog
from .runtime import Runtime
from .transfer.initialise import Origins, build_model
from .transfer.merge import norm_ratio, scale_


@dataclass
class Run:
    """Everything that the stages of one run share."""

    recipe: TransferRecipe
    runtime: Runtime
    log: RunLog
    model: VisionLanguageModel
    origins: Origins
    data: TokenisedCaptions
    subsets: dict[str, tuple[Subset, float | None]]
    features: FeatureSource
    image_size: int
    norm: PixelNorm
    validator: Validator
    watch: Watch
    progress: Progress
    meter: cost.CostMeter
    fuses_adamw: bool = False
    guard: Guard | None = None
    tally: Tensor | None = None


def prepare(recipe: TransferRecipe, runtime: Runtime, log: RunLog, progress: Progress) -> Run:
    """Load, open and check everything that `recipe` names; `progress` says whether the run is a new one.

    Raises RecipeError, DataError, ModelError and CacheError.
    """
    meter = cost.CostMeter(runtime, progress.cost_seconds)
    meter.peak_flops_s = cost.measured_peak(runtime.device, runtime.compute_dtype)
    log.event("peak", step=progress.step, matmul_flops_s=meter.peak_flops_s)
    tower = load_tower(recipe.vision)
    model, origins = build_model(recipe, tower, runtime.compute_dtype, runtime.device, progress.step > 0)
    for path in dict.fromkeys(report.path for report in origins.loaded):
        lines = dict.fromkeys(line for report in origins.loaded if report.path == path for line in report.lines())
        # What the recipe has from elsewhere is neither missing nor worth a line.
        said = [line for line in lines if not line.startswith("missing") and "not asked for" not in line]
        log.say(f"{path}:\n  " + "\n  ".join(said))
    layout = recipe.data
    caches = recipe.output.cache or recipe.output.folder.parent / "cache"
    opening = {
        "max_text_tokens": layout.max_text_tokens, "seed": recipe.seed, "verify_images": layout.verify_images, "cache_root": caches, "log": log,
    }  # fmt: skip

    def opened(entry: ImageData) -> TokenTable:
        captions = open_captioned(entry, model.llm, **opening)
        outcome.report_refusals(log, recipe.output.folder, captions)
        return captions

    data, subsets, fixed = open_training(layout.train, opened)
    val_data = open_captioned(layout.val, model.llm, **opening, name=f"{layout.val.name}-val")
    outcome.report_refusals(log, recipe.output.folder, val_data)
    check_rows([data, val_data], model.llm, model.queries, layout)
    if recipe.evaluation.attributes:
        check_attributes(val_data, recipe.evaluation.generate_images)
    meter.rates = {s.name: cost.work_rates(model, tower, s, data, layout) for s in recipe.stages}
    model.after_prompts = meter.prompts_made
    place(model, tower, recipe, runtime, log)
    choices = use_kernels(recipe.kernels, model, tower, runtime, log, recipe.attention)
    choices += use_regions(recipe.step, model, tower, layout, runtime)
    common = {
        "seed": recipe.seed,
        "runtime": runtime,
        "cache_root": caches if layout.vision_cache else None,
        "log": log,
        "fill": layout.cache_fill,
        "precision": layout.cache_precision,
    }
    if layout.loader == "ffcv":
        features: FeatureSource = FFCVFeatures(data, tower, layout.transform, recipe.seed, runtime, fixed)
    else:
        features = open_features(
            data, tower, transform=layout.transform, views=layout.views, fixed=fixed, decode=layout.decode, bad_images=layout.bad_images,
            **common
        )  # fmt: skip
    val_features = open_features(val_data, tower, transform="eval", **common)
    questions = recipe.evaluation.questions
    asked = read_questions(questions, recipe.evaluation.answers).records if questions else []
    validator = Validator(val_data, val_features, recipe.evaluation, runtime, asked)
    validator.pack(model, layout)
    outcome.print_savings(log, recipe, model, choices)
    watch = Watch(log, **progress.watch)
    _measure_converter(model, origins, features, len(data.ids), watch, log, recipe)
    meter.lap(cost.START_UP)
    return Run(
        recipe, runtime, log, model, origins, data, subsets, features, tower.image_size, tower.norm, validator, watch, progress, meter,
        fuses_adamw=any(c.on for c in choices if c.name == "adamw_step") and recipe.distribution.optimizer != "sharded",
    )  # fmt: skip


@torch.no_grad()
def _measure_converter(
    model: VisionLanguageModel,
    origins: Origins,
    features: FeatureSource,
    image_count: int,
    watch: Watch,
    log: RunLog,
    recipe: TransferRecipe,
) -> None:
    """Print the converter's quality and the norms around it, on the first training images; scale the projector where the recipe asks for it."""
    if origins.converter is None or origins.source_projector is None or origins.source_words is None:
        return
    model.eval()
    images = [Group(i, 0, ()) for i in range(min(16, image_count))]
    found = features(images)
    usable = [place for place, group in enumerate(images) if group.image not in features.unusable]
    visual = model.vpg(found[usable].to(model.vpg.query_tokens.dtype))
    source = origins.source_projector.to(visual.device)
    before = norm_ratio(source(visual), origins.source_words)
    after = norm_ratio(model.projector(visual), model.llm.word_embeddings())
    if recipe.converter.match_prompt_norm:
        scale_(model.projector, before / after)
        log.say(
            f"converter: projector scaled by {before / after:.3f} so that soft prompts keep their norm relative to words"
        )
        after = before
    log.say(outcome.converter_table(origins.converter, before, after))
    log.event("converter", step=0, prompt_norm_before=before, prompt_norm_after=after, **origins.converter.to_dict())
    watch.converter(origins.converter, before, after)
    origins.source_projector = origins.source_words = None
