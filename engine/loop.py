"""The hand-written loop of a transfer: data, model, then stage after stage of updates that each count an exact number of pairs.

One update: deal out `batch_pairs` pairs -> pack them into rows -> forward and backward per micro-batch, each loss divided by the update's
global target count -> sum over ranks -> clip -> finite check on the device -> AdamW.  Evaluation, checkpoints and logging between updates.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cost, outcome
from .checkpoint import load_checkpoint, trainable_tensors
from .data.dealing import group_tokens
from .data.feature_cache import StoredPrompts
from .data.ffcv_loader import check_ffcv
from .data.packing import Batch, UpdateOrder
from .data.stream import Update, UpdateStream
from .distributed.frozen import check_layout
from .distributed.reduction import GradientReduction
from .distributed.seeding import seed_update
from .distributed.sharded_adamw import ShardedAdamW
from .guards import Guard, guarded
from .notice import StoppedOnNotice
from .optim import build_adamw, learning_rate, set_learning_rate, take_step
from .preflight import check_machine
from .prepare import Run, prepare
from .prompt_cache import stored_prompts
from .recipe import Stage, TransferRecipe, save_recipe
from .resume import Progress, check_same_recipe, common_checkpoint, read_progress
from .runlog import RunLog
from .runtime import Runtime
from .stage_data import next_multiple, stage_pairs, update_lengths, update_order


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
    found, passed_over = common_checkpoint(folder / "checkpoints", runtime)
    progress = read_progress(found) if found else Progress()
    if found:
        check_same_recipe(recipe, folder)
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
        this = prepare(recipe, runtime, log, progress)
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
        guard.at("final evaluation")
        return outcome.finish(this)
    finally:
        log.close()


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
        progress.tally = [0.0] * 4
    for tensor in _trained_so_far(this, index).values():
        this.runtime.broadcast_(tensor)  # machines may round a converter differently, and replicas never meet again
    order = update_order(this, stage)
    this.meter.stage_pairs = {s.name: stage_pairs(this, s) for s in recipe.stages}
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
    this.guard.saved()  # before hours of the next stage, or files of the result
    this.meter.lap(cost.CHECKPOINTS)
    progress.stage, progress.stage_done = index + 1, False


def _loop(
    this: Run, index: int, stage: Stage, order: UpdateOrder, optimizer, tensors: dict[str, Tensor], total: int
) -> None:
    recipe, progress, runtime = this.recipe, this.progress, this.runtime
    parameters = list(tensors.values())
    # Since the last log: sum of the losses, good updates, bad updates; and the bad updates in a row.
    tally = this.tally = torch.tensor(progress.tally, dtype=torch.float64, device=runtime.device)
    next_eval = next_multiple(progress.stage_pairs, stage.eval_every_pairs)
    next_save = next_multiple(progress.stage_pairs, recipe.output.checkpoint_every_pairs)
    if progress.evaluation_due and _evaluate_or_leave(this, index, stage, optimizer):
        return
    started = time.perf_counter()
    this.meter.begin_stage(stage.name, progress.stage_pairs, progress.seconds, isinstance(this.features, StoredPrompts))
    stream = UpdateStream(
        order, update_lengths(progress.stage_pairs, total, stage.batch_pairs),
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
            finite_loss = torch.nan_to_num(loss.double(), 0.0, 0.0, 0.0)
            in_a_row = (tally[3] + 1) * bad
            tally += torch.stack([finite_loss * (1 - bad), 1 - bad.double(), bad.double(), in_a_row - tally[3]])
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
                _log_train(this, index, stage, tally, norm, rate, total)
                this.meter.lap(cost.OTHER)
            if is_last or progress.stage_pairs >= next_eval:
                progress.seconds += time.perf_counter() - started
                enough = _evaluate_or_leave(this, index, stage, optimizer)
                this.meter.lap(cost.EVALUATION)
                next_eval = next_multiple(progress.stage_pairs, stage.eval_every_pairs)
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
                next_save = next_multiple(progress.stage_pairs, recipe.output.checkpoint_every_pairs)
                started = time.perf_counter()
            this.guard.after_update(lambda: _save(this, optimizer))


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


def _log_train(this: Run, index: int, stage: Stage, tally: Tensor, norm: Tensor, rate: float, total: int) -> None:
    progress, log = this.progress, this.log
    if this.recipe.data.bad_images == "skip":
        outcome.report_bad_images(this)
    loss_sum, counted, skipped, in_a_row = tally.tolist()
    grad_norm = norm.item()
    tally[:3] = 0
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
            this.guard.attempt(lambda: outcome.save_model(this, "best"))
        else:
            progress.stale_evals += 1
    return stage.patience is not None and progress.stale_evals >= stage.patience


def _save(this: Run, optimizer) -> None:
    watch = this.watch
    this.meter.settle()
    this.progress.tally = this.tally.tolist()
    this.progress.watch = {
        "first_loss": watch.first_loss, "warm_up_end": watch.warm_up_end, "diverged": watch.diverged, "regressed": watch.regressed
    }  # fmt: skip
    if isinstance(optimizer, ShardedAdamW):
        optimizer.consolidate()
    if this.runtime.is_main:
        tensors = _trained_so_far(this, this.progress.stage)
        state = asdict(this.progress)
        this.guard.attempt(lambda: this.guard.writer.save(this.progress.step, tensors, optimizer, state))


def _trained_so_far(this: Run, index: int) -> dict[str, Tensor]:
    """Every tensor that this stage or an earlier one trains: what cannot be had from the inputs again."""
    with_vpg = any(s.trains == "vpg_and_projector" for s in this.recipe.stages[: index + 1])
    return {
        k: p
        for k, p in this.model.named_parameters()
        if k.startswith("projector.") or (with_vpg and k.startswith("vpg."))
    }
