"""The hand-written loop of a transfer: data, model, then stage after stage of updates that each count an exact number of pairs.

One update: deal out `batch_pairs` pairs -> pack them into rows -> forward and backward per micro-batch, each loss divided by the update's
global target count -> sum over ranks -> clip -> finite check on the device -> AdamW.  Evaluation, checkpoints and logging between updates.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from . import cost, outcome
from .checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, trainable_tensors
from .data.captioned import open_captioned, open_training
from .data.coco import read_questions
from .data.dealing import group_tokens
from .data.feature_cache import StoredPrompts, open_features
from .data.features import FeatureSource
from .data.ffcv_loader import FFCVFeatures, check_ffcv
from .data.packing import Batch, Group, Position, Subset, TokenisedCaptions, UpdateOrder
from .data.stream import Update, UpdateStream
from .data.token_table import TokenTable
from .diagnostics import Watch
from .distributed.frozen import check_layout, place
from .distributed.reduction import GradientReduction
from .distributed.seeding import seed_update
from .distributed.sharded_adamw import ShardedAdamW
from .evaluation import Validator
from .guards import Guard, guarded
from .kernel_choice import use_kernels
from .models.tower import PixelNorm
from .models.vision import load_tower
from .models.vlm import VisionLanguageModel
from .notice import StoppedOnNotice
from .optim import build_adamw, learning_rate, set_learning_rate, take_step
from .preflight import check_attributes, check_machine, check_rows
from .prompt_cache import stored_prompts
from .recipe import ImageData, Stage, TransferRecipe, save_recipe
from .regions import use_regions
from .runlog import RunLog
from .runtime import Runtime
from .transfer.initialise import Origins, build_model
from .transfer.merge import norm_ratio, scale_


@dataclass
class Progress:
    """What a checkpoint remembers besides tensors.  `pairs`, `step` and `seconds` run on over the stages."""

    stage: int = 0
    stage_pairs: int = 0
    pairs: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_pairs: int = 0
    stale_evals: int = 0
    skipped: int = 0
    bad_images: dict[str, str] = field(default_factory=dict)
    captioned_at: int = 0
    stage_done: bool = False
    evaluation_due: bool = False
    position: dict[str, Any] | None = None
    unlogged: list[float] = field(default_factory=lambda: [0.0] * 3)
    watch: dict[str, Any] = field(default_factory=dict)
    cost_seconds: dict[str, float] = field(default_factory=dict)


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
    unlogged: Tensor | None = None


def run(recipe: TransferRecipe) -> dict[str, Any]:
    """Train, score and save; returns the summary that is also written to `output.folder/summary.json`.

    Raises RecipeError, DataError, ModelError, CheckpointError, StartError (before any training), RunStopped (too many non-finite updates, a
    full disk, lost ranks) and StoppedOnNotice (SIGTERM or SIGUSR1; saved).
    """
    check_machine(recipe)
    about_loader = check_ffcv(recipe.data) if recipe.data.loader == "ffcv" else None
    with guarded(recipe) as (runtime, guard):
        return _run(recipe, runtime, guard, about_loader)


def _run(recipe: TransferRecipe, runtime: Runtime, guard: Guard, about_loader: str | None) -> dict[str, Any]:
    check_layout(recipe.distribution, runtime)
    folder = recipe.output.folder
    found, passed_over = _common_checkpoint(folder / "checkpoints", runtime)
    progress = Progress(**_state(found)) if found else Progress()
    if found:
        _check_same_recipe(recipe, folder)
    log = RunLog(
        folder,
        enabled=runtime.is_main,
        tensorboard=recipe.output.tensorboard,
        resume_at=progress.step if found else None,
        rank_log=guard.rank_log,
        wandb=recipe.output.wandb,
    )
    for line in passed_over:
        log.warn("checkpoint_passed_over", line)
    try:
        if runtime.is_main:
            save_recipe(recipe, folder / "recipe.yaml")
        if about_loader:
            log.say(about_loader)
        guard.at("preparation", progress.step)
        this = _prepare(recipe, runtime, log, progress)
        this.guard = guard
        if found:
            log.say(f"resumed at update {progress.step:,} ({progress.pairs:,} pairs) from {found}")
        else:
            log.event(
                "start",
                name=recipe.name,
                arm=recipe.arm,
                seed=recipe.seed,
                device=runtime.describe(),
                time=outcome.now(),
            )
        first = progress.stage
        for index in range(first, len(recipe.stages)):
            _train_stage(this, index, found if index == first else None)
        guard.writer.finish()
        guard.at("final evaluation")
        return outcome.finish(this)
    finally:
        log.close()


def _common_checkpoint(root: Path, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """`latest_checkpoint`; CheckpointError on all ranks, told by rank 0, where one of them finds none that is whole, or another one."""
    problem, found, passed_over = None, None, []
    try:
        found, passed_over = latest_checkpoint(root)
    except CheckpointError as error:
        problem = str(error)
    of_ranks = runtime.gather((problem, found.name if found else "none"))
    names = [name for _, name in of_ranks]
    wrong = next((problem for problem, _ in of_ranks if problem), None)
    if wrong is None and len(set(names)) > 1:
        wrong = f"{root}: expected one newest checkpoint, found {', '.join(f'{n} on rank {r}' for r, n in enumerate(names))}; see whether all ranks "
        wrong += "have the same output.folder, and start again"
    if wrong is not None:
        error = CheckpointError(wrong)
        error.quiet = not runtime.is_main
        raise error
    return found, passed_over


def _check_same_recipe(recipe: TransferRecipe, folder: Path) -> None:
    """A folder with checkpoints goes on only with the recipe that made them; `output`, `threads`, `guards` and `distribution` may differ."""
    path = folder / "recipe.yaml"
    before = yaml.safe_load(path.read_text()) if path.is_file() else {}
    now = recipe.model_dump(mode="json")
    changed = [
        k
        for k in now
        if k not in ("output", "threads", "inputs_from", "guards", "distribution") and before.get(k, now[k]) != now[k]
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: holds checkpoints of another recipe; {', '.join(changed)} differ. "
            "Give another output.folder, go on with the recipe.yaml that lies there, or delete the folder"
        )


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def _prepare(recipe: TransferRecipe, runtime: Runtime, log: RunLog, progress: Progress) -> Run:
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


def _train_stage(this: Run, index: int, checkpoint: Path | None) -> None:
    recipe, stage, progress, log = this.recipe, this.recipe.stages[index], this.progress, this.log
    this.model.freeze_for(stage.trains, stage.frozen_dropout)
    tensors = trainable_tensors(this.model)
    optimizer = build_adamw(tensors.items(), stage.optimizer)
    if recipe.distribution.optimizer == "sharded" and this.runtime.world_size > 1:
        optimizer = ShardedAdamW(optimizer, this.runtime)
    if checkpoint:
        load_checkpoint(checkpoint, _trained_so_far(this, index), optimizer)
        if progress.stage_done:
            progress.stage, progress.stage_done = index + 1, False
            return
    else:
        progress.stage, progress.stage_pairs, progress.position, progress.best, progress.stale_evals = (
            index,
            0,
            None,
            None,
            0,
        )
        progress.unlogged = [0.0] * 3
    for tensor in _trained_so_far(this, index).values():
        this.runtime.broadcast_(tensor)  # machines may round a converter differently, and replicas never meet again
    order = _order(this, stage)
    this.meter.stage_pairs = {s.name: _stage_pairs(this, s) for s in recipe.stages}
    total = this.meter.stage_pairs[stage.name]
    log.say(outcome.freeze_table(this.model, this.origins, stage, order, total, recipe.stages))
    if not checkpoint:
        trainable = sum(p.numel() for p in tensors.values())
        log.event(
            "stage",
            stage=stage.name,
            index=index,
            step=progress.step,
            pairs=progress.pairs,
            trainable_parameters=trainable,
            stage_pairs=total,
        )
        if index == 0:
            this.guard.at("evaluation")
            this.meter.lap(cost.OTHER)
            _evaluate(this, index, stage)
            this.meter.lap(cost.EVALUATION)
    with stored_prompts(this, stage, order, total):
        _loop(this, index, stage, order, optimizer, tensors, total)
    log.end_progress()
    progress.stage_done = True
    _save(this, optimizer)
    this.meter.lap(cost.CHECKPOINTS)
    progress.stage, progress.stage_done = index + 1, False


def _order(this: Run, stage: Stage) -> UpdateOrder:
    chosen = [this.subsets[name] for name in stage.data or this.subsets]
    subsets = [s for s, _ in chosen]
    if all(weight is None for _, weight in chosen):
        subsets = _contiguous(subsets)
    position = Position(**this.progress.position) if this.progress.position else None
    return UpdateOrder(
        this.data.counts,
        subsets,
        stage.batch_pairs,
        this.recipe.seed,
        this.recipe.data.captions_per_image,
        position,
        this.recipe.data.order,
    )


def _stage_pairs(this: Run, stage: Stage) -> int:
    return stage.pairs or round(stage.epochs * _order(this, stage).epoch_pairs)


def _contiguous(subsets: list[Subset]) -> list[Subset]:
    """Neighbouring sets without weights are one set with one order; others are drawn in proportion to their size."""
    merged = [subsets[0]]
    for subset in subsets[1:]:
        if subset.start == merged[-1].stop:
            merged[-1] = Subset(merged[-1].start, subset.stop)
        else:
            merged.append(subset)
    return [Subset(s.start, s.stop, s.stop - s.start) for s in merged]


def _loop(
    this: Run, index: int, stage: Stage, order: UpdateOrder, optimizer, tensors: dict[str, Tensor], total: int
) -> None:
    recipe, progress, runtime = this.recipe, this.progress, this.runtime
    parameters = list(tensors.values())
    # Since the last log: sum of the losses, good updates, bad updates.
    losses = this.unlogged = torch.tensor(progress.unlogged, dtype=torch.float64, device=runtime.device)
    skipped_in_a_row = torch.zeros((), device=runtime.device)
    next_eval = _next(progress.stage_pairs, stage.eval_every_pairs)
    next_save = _next(progress.stage_pairs, recipe.output.checkpoint_every_pairs)
    if progress.evaluation_due and _evaluate_or_leave(this, index, stage, optimizer):
        return
    started = time.perf_counter()
    this.meter.begin_stage(stage.name, progress.stage_pairs, progress.seconds, isinstance(this.features, StoredPrompts))
    stream = UpdateStream(
        order, _lengths(progress.stage_pairs, total, stage.batch_pairs),
        lambda groups: this.model.pack(
            groups, this.data, recipe.data, fixed_shape=runtime.device.type == "cuda", split_seed=recipe.seed
        ),
        this.features, rank=runtime.rank, world_size=runtime.world_size, depth=recipe.data.prefetch_batches,
        tokens=lambda g: group_tokens(g, this.data, this.model.queries, not this.model.llm.is_encoder_decoder),
    )  # fmt: skip
    reduction = GradientReduction(parameters, runtime) if runtime.world_size > 1 else None
    with contextlib.closing(stream), contextlib.closing(reduction) if reduction else contextlib.nullcontext():
        for update, batches in stream:
            this.meter.lap(cost.WAITING)
            rate = learning_rate(
                progress.stage_pairs, total, stage.learning_rate, schedule=stage.schedule, minimum=stage.min_learning_rate,
                warmup=stage.warmup_pairs, warmup_start=stage.warmup_learning_rate,
            )  # fmt: skip
            set_learning_rate(optimizer, rate)
            this.guard.at("update", progress.step + 1)
            loss = _accumulate(this, update, batches, parameters, reduction)
            result = take_step(optimizer, stage.optimizer.clip_norm, loss, this.fuses_adamw)
            norm, bad = result.norm, result.skipped
            optimizer.zero_grad(set_to_none=True)
            skipped_in_a_row = (skipped_in_a_row + 1) * bad
            finite_loss = torch.nan_to_num(loss.double(), 0.0, 0.0, 0.0)
            losses += torch.stack([finite_loss * (1 - bad), 1 - bad.double(), bad.double()])
            progress.stage_pairs += update.pairs
            progress.pairs += update.pairs
            progress.step += 1
            progress.position = update.position
            this.guard.record(progress.step, loss, norm, update.groups)
            is_last = progress.stage_pairs >= total
            this.meter.lap(cost.OPTIMISER)
            if (
                is_last or progress.step % recipe.output.log_every_updates == 0
            ):  # the only place that waits for the device
                progress.seconds += time.perf_counter() - started
                started = time.perf_counter()
                _log_train(this, index, stage, losses, norm, skipped_in_a_row, rate, total)
                this.meter.lap(cost.OTHER)
            if is_last or progress.stage_pairs >= next_eval:
                progress.seconds += time.perf_counter() - started
                enough = _evaluate_or_leave(this, index, stage, optimizer)
                this.meter.lap(cost.EVALUATION)
                next_eval = _next(progress.stage_pairs, stage.eval_every_pairs)
                started = time.perf_counter()
                if enough:
                    this.log.say(
                        f"{stage.name}: {stage.patience} evaluations without a better {recipe.evaluation.select}; the stage ends here"
                    )
                    break
            if not is_last and progress.stage_pairs >= next_save:
                progress.seconds += time.perf_counter() - started
                _save(this, optimizer)
                this.meter.lap(cost.CHECKPOINTS)
                next_save = _next(progress.stage_pairs, recipe.output.checkpoint_every_pairs)
                started = time.perf_counter()
            this.guard.after_update(lambda: _save(this, optimizer))


def _lengths(done: int, total: int, batch_pairs: int) -> Iterator[int]:
    """Pairs of each update to come; the last is shorter where the stage's length asks for it."""
    while done < total:
        yield min(batch_pairs, total - done)
        done += min(batch_pairs, total - done)


def _accumulate(
    this: Run,
    update: Update,
    batches: Iterator[tuple[Batch, Tensor]],
    parameters: list[Tensor],
    reduction: GradientReduction | None,
) -> Tensor:
    """Gradients of the mean loss of the whole update; returns that mean.  Every rank plans the same update and computes its share.

    The mean is over the tokens of the update, or, with `loss_mean: micro_batch`, over its micro-batches' token means: those of all ranks that
    have targets, so that it depends on the number of ranks, as in the authors' code.  Where captions of unusable images are left out, which only
    the rank that reads them knows, the mean is over the tokens that remain.
    """
    total = torch.zeros(2, dtype=parameters[0].dtype, device=this.runtime.device)  # sum of the losses, targets
    seed_update(this.recipe.seed, this.progress.step, this.runtime)
    if reduction:
        reduction.begin()
    for number, (batch, prepared) in enumerate(batches, 1):
        this.meter.lap(cost.WAITING)
        features = this.features.finish(prepared)
        this.meter.count(batch, this.model.queries, this.features.computed)
        this.meter.lap(cost.TOWER)
        with this.runtime.autocast():
            count = (
                max(1, batch.target_count) * update.batch_count
                if this.recipe.loss_mean == "micro_batch"
                else update.targets
            )
            loss = this.model.loss_sum(features, batch.to(this.runtime.device)) / count
        this.meter.lap(cost.LANGUAGE_MODEL)
        total[0] += loss.detach()
        total[1] += batch.target_count
        if reduction and number == update.own_batches:
            reduction.last(total)
        loss.backward()
        this.meter.lap(cost.BACKWARD)
    if reduction:
        total = reduction.finish()
        this.meter.lap(cost.REDUCTION)
    if this.recipe.data.bad_images == "skip" and this.recipe.loss_mean == "global":
        planned_over_kept = update.targets / total[1].clamp(min=1)  # 1 where nothing was left out
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(planned_over_kept)
        total[0] *= planned_over_kept
    return total[0]


def _log_train(
    this: Run, index: int, stage: Stage, losses: Tensor, norm: Tensor, skipped_in_a_row: Tensor, rate: float, total: int
) -> None:
    progress, log = this.progress, this.log
    if this.recipe.data.bad_images == "skip":
        outcome.report_bad_images(this)
    loss_sum, counted, skipped = losses.tolist()
    in_a_row, grad_norm = skipped_in_a_row.item(), norm.item()
    losses.zero_()
    if skipped:
        progress.skipped += int(skipped)
        log.warn(
            "update_skipped",
            f"non-finite loss or gradient; {progress.skipped} updates skipped so far",
            step=progress.step,
            value=skipped,
        )
    if in_a_row >= this.recipe.output.max_skipped_updates:
        raise this.guard.stopped(
            f"{int(in_a_row)} updates in a row were not finite, the last at update {progress.step}; lower the learning rate, or use precision=fp32",
            this.data.records,
        )
    this.guard.inspect(log, this.data.records)
    loss = loss_sum / max(counted, 1)
    speed = progress.pairs / max(progress.seconds, 1e-9)
    hours = progress.seconds * this.runtime.world_size / 3600
    live = this.meter.live(progress.stage_pairs, progress.seconds)
    log.event(
        "train", stage=stage.name, step=progress.step, pairs=progress.pairs, seconds=progress.seconds, loss=loss, learning_rate=rate,
        grad_norm=grad_norm, pairs_per_s=speed, gpu_hours=hours, **live,
    )  # fmt: skip
    log.progress(
        f"{this.recipe.arm} {stage.name}", progress.stage_pairs, total,
        f"{progress.pairs:,} pairs  {speed:.0f} pairs/s  loss {loss:.3f}  {outcome.live_line(live, hours, this.runtime.world_size)}",
    )  # fmt: skip
    this.watch.train_loss(index, loss, progress.step, rate)


def _evaluate_or_leave(this: Run, index: int, stage: Stage, optimizer) -> bool:
    """Evaluate; a notice breaks it off: the update before is saved, and the evaluation is the first thing that the resumed run does."""
    captioned_at = this.progress.captioned_at
    this.progress.evaluation_due = False

    def save() -> None:
        this.progress.captioned_at, this.progress.evaluation_due = captioned_at, True
        _save(this, optimizer)
        this.progress.evaluation_due = False

    if isinstance(optimizer, ShardedAdamW):
        optimizer.consolidate()  # here, where all ranks are: then rank 0 can save by itself in the middle of the evaluation
    try:
        this.guard.at("evaluation", on_notice=save)  # follows what came in the update before
        enough = _evaluate(this, index, stage)
    except StoppedOnNotice:
        this.guard.save_and_leave(save)
    this.guard.at("update")
    return enough


def _evaluate(this: Run, index: int, stage: Stage) -> bool:
    """Score, log, keep the best; True when the stage's patience is used up."""
    progress, settings = this.progress, this.recipe.evaluation
    scores: dict[str, float] = {"val_loss": this.validator.loss(this.model)}
    every = settings.generate_every_pairs
    if (
        settings.generate_images
        and every
        and (progress.pairs == 0 or progress.pairs // every > progress.captioned_at // every)
    ):
        scores.update(this.validator.captions(this.model)[0])
        progress.captioned_at = progress.pairs
    scores = this.runtime.gather(scores)[
        0
    ]  # each rank has written captions of its own; all must take the same decisions
    this.guard.at("save")  # what follows is done or not done
    this.log.event(
        "eval", stage=stage.name, step=progress.step, pairs=progress.pairs, seconds=progress.seconds, **scores
    )
    this.watch.validation_loss(index, scores["val_loss"], progress.step)
    if settings.select in scores:
        score = scores[settings.select] if settings.select == "val_loss" else -scores[settings.select]
        if progress.best is None or score < progress.best:
            progress.best, progress.best_pairs, progress.stale_evals = score, progress.pairs, 0
            outcome.save_model(this, "best")
        else:
            progress.stale_evals += 1
    return stage.patience is not None and progress.stale_evals >= stage.patience


def _save(this: Run, optimizer) -> None:
    watch = this.watch
    this.meter.settle()
    this.progress.unlogged = this.unlogged.tolist()
    this.progress.watch = {
        "first_loss": watch.first_loss, "warm_up_end": watch.warm_up_end, "diverged": watch.diverged, "regressed": watch.regressed
    }  # fmt: skip
    if isinstance(optimizer, ShardedAdamW):
        optimizer.consolidate()
    if this.runtime.is_main:
        tensors = _trained_so_far(this, this.progress.stage)
        this.guard.writer.save(this.progress.step, tensors, optimizer, asdict(this.progress))


def _trained_so_far(this: Run, index: int) -> dict[str, Tensor]:
    """Every tensor that this stage or an earlier one trains: what cannot be had from the inputs again."""
    with_vpg = any(s.trains == "vpg_and_projector" for s in this.recipe.stages[: index + 1])
    return {
        k: p
        for k, p in this.model.named_parameters()
        if k.startswith("projector.") or (with_vpg and k.startswith("vpg."))
    }


def _next(done: int, every: int | None) -> float:
    """The next multiple of `every` after `done`; never without an `every`."""
    return (done // every + 1) * every if every else float("inf")
