"""What a run shows and leaves: start-up tables, the saved model, scores, samples, and the summary."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import nn

from .checkpoint import remove_folder, write_json
from .cost import EVALUATION, cost_table
from .data.images import ImageRefused
from .data.packing import UpdateOrder
from .data.prompts import CAPTION_PROMPT, vqa_prompt
from .data.token_table import TokenTable
from .kernel_choice import Choice
from .models.opening import read_projector, read_vpg
from .models.vlm import VisionLanguageModel
from .models.vpg import save_parts
from .recipe import Stage, TransferRecipe
from .runlog import RunLog, duration
from .savings import savings
from .scoring.record import result_record
from .transfer.converter import ConverterReport
from .transfer.initialise import Origins

if TYPE_CHECKING:
    from .prepare import Run


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def freeze_table(
    model: VisionLanguageModel, origins: Origins, stage: Stage, order: UpdateOrder, pairs: int, stages: list[Stage]
) -> Table:
    """What trains and what is frozen in a stage, how many parameters, and where each part came from."""
    updates = -(-pairs // stage.batch_pairs)
    number = [s.name for s in stages].index(stage.name) + 1
    epochs = pairs / order.epoch_pairs
    table = Table(
        title=f"stage {number} of {len(stages)}, {stage.name}: {pairs:,} pairs ({epochs:.2f} epochs) in {updates:,} updates "
        f"of {stage.batch_pairs:,}, rate {stage.learning_rate:g} {stage.schedule}",
        title_justify="left",
    )
    for column in ("part", "parameters", "trains", "mode", "from"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    earlier = number > 1
    vpg_trained = earlier and any(s.trains == "vpg_and_projector" for s in stages[: number - 1])
    rows: list[tuple[str, Any, str]] = [
        ("ln_vision", model.vpg.ln_vision, origins.vpg),
        ("query tokens", model.vpg.query_tokens, origins.vpg),
        ("Q-Former", model.vpg.qformer, origins.vpg),
        ("projector", model.projector, origins.projector),
        ("language model", model.llm, origins.llm),
    ]
    for name, part, origin in rows:
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        trains = any(p.requires_grad for p in parameters)
        mode = "" if isinstance(part, nn.Parameter) else "train" if part.training else "eval"
        if earlier and (name == "projector" or (vpg_trained and name != "language model")):
            origin = "the stage before"
        table.add_row(name, f"{sum(p.numel() for p in parameters):,}", "yes" if trains else "frozen", mode, origin)
    table.add_row("vision tower", "", "frozen", "eval", origins.tower)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table.add_row("trainable in all", f"{total:,}", "", "", "", style="bold")
    return table


def converter_table(report: ConverterReport, before: float | None = None, after: float | None = None) -> Table:
    """Quality of a word converter on tokens that it has not seen."""
    table = Table(title=f"word converter ({report.method})", title_justify="left", show_header=False)
    table.add_row("shared tokens", f"{report.shared_tokens:,} ({report.held_out_tokens:,} held out)")
    table.add_row("cosine, held out (fitted)", f"{report.cosine:.3f} ({report.cosine_fitted:.3f})")
    table.add_row("nearest neighbour right", f"{report.nearest:.1%}")
    table.add_row("norm of converted over true", f"{report.norm_ratio:.2f}")
    if report.ridge is not None:
        table.add_row("ridge chosen", f"{report.ridge:g}")
    if before is not None and after is not None:
        table.add_row("norm of soft prompts over words, source", f"{before:.2f}")
        table.add_row("norm of soft prompts over words, merged", f"{after:.2f}")
    return table


def print_savings(log: RunLog, recipe: TransferRecipe, model: VisionLanguageModel, choices: list[Choice]) -> None:
    """The start-up table of savings: on or off, exact or not, why."""
    table = Table(title="savings", title_justify="left")
    for column in ("saving", "on", "exact", "why"):
        table.add_column(column)
    for row in savings(recipe, model, choices):
        state = {True: "on", False: "off", None: "auto"}[row.on]
        table.add_row(row.name, state, "-" if row.on is False else "yes" if row.exact else "no", row.why)
    log.say(table)


def live_line(live: dict[str, float], hours: float, devices: int) -> str:
    """The cost part of a progress line: what `CostMeter.live` returned, and device-hours so far."""
    to_go = live["gpu_hours_to_go"]
    return (
        f"{live['tokens_per_s']:,.0f} tokens/s  {live['flop_utilisation']:.0%} of peak  waiting {live['waiting_share']:.0%}  "
        f"ETA {duration(3600 * to_go / devices)}  {hours:.3f} + {to_go:.3f} device-hours"
    )


def report_refusals(log: RunLog, folder: Path, captions: TokenTable) -> None:
    """One line, and `refused-NAME.json` where anything was refused."""
    log.say(
        f"{captions.name}: {len(captions):,} images, {captions.pair_count:,} captions; {captions.refused.summary()}"
    )
    if captions.refused.named and log.enabled:
        captions.refused.write_json(folder / f"refused-{captions.name}.json")


def report_bad_images(this: Run) -> None:
    """Name the images that any rank has found unusable since the last call; every rank must call it."""
    unusable = list(this.features.unusable.items())
    found = this.runtime.gather({_image_file(this.data.records, image): why for image, why in unusable})
    for path, why in sorted((str(path), why) for of_rank in found for path, why in of_rank.items()):
        if path not in this.progress.bad_images:
            this.progress.bad_images[path] = why
            this.log.warn("bad_image", f"{why}; its captions are left out", step=this.progress.step, file=path)


def _image_file(records: Sequence[Any], image: int) -> str:
    """Where an unusable image lies; a record of a packed set may be damaged itself."""
    try:
        return str(records[image].path)
    except ImageRefused as fault:
        return fault.path


def save_model(this: Run, name: str) -> Path:
    """Write VPG and projector with their config to `output.folder/name`, which other runs can take as `source.vlm`."""
    folder = this.recipe.output.folder / name
    if this.runtime.is_main:
        vpg = this.model.vpg
        config = {
            "recipe": this.recipe.name,
            "image_width": vpg.image_width,
            "qformer": vpg.config.model_dump(),
            "llm": this.recipe.target.llm,
            "vision": this.recipe.vision.model_dump(mode="json"),
            "pairs": this.progress.pairs,
        }
        save_parts(folder, {"vpg": vpg, "projector": this.model.projector}, config)
    return folder


def finish(this: Run) -> dict[str, Any]:
    """Keep the selected model, score it, write captions, samples and the summary, and name the files."""
    recipe, progress, log, folder = this.recipe, this.progress, this.log, this.recipe.output.folder
    final_loss = this.validator.loss(this.model)
    last = save_model(this, "last")
    best = folder / "best" if (folder / "best").is_dir() else last
    if this.runtime.is_main:
        temporary = folder / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(best, temporary)
        remove_folder(folder / "model")
        temporary.rename(folder / "model")
    this.runtime.wait()  # for rank 0's copy
    _load_into(this.model, folder / "model")
    scores: dict[str, float] = {}
    if recipe.evaluation.generate_images:
        scores, captions = this.validator.captions(this.model)
        this.watch.captions(scores["distinct_captions"], len(captions), progress.step)
        answer_scores, answers = this.validator.answers(this.model)
        scores.update(answer_scores)
        if this.runtime.is_main:
            write_json(folder / "captions.json", captions)
            write_json(folder / "answers.json", answers)
            write_json(folder / "samples.json", _samples(this, captions))
    best_loss = this.validator.loss(this.model)
    this.meter.lap(EVALUATION)
    breakdown = this.meter.breakdown()
    summary = {
        "name": recipe.name, "arm": recipe.arm, "seed": recipe.seed, "device": this.runtime.describe(), "time": now(),
        "best_val_loss": best_loss, "best_val_pairs": progress.best_pairs, "final_val_loss": final_loss,
        "selected_by": recipe.evaluation.select, "pairs": progress.pairs, "updates": progress.step, "seconds": progress.seconds,
        "gpu_hours": progress.seconds * this.runtime.world_size / 3600, "skipped_updates": progress.skipped,
        "bad_images": len(progress.bad_images),
        "stages": [s.name for s in recipe.stages], "cost": breakdown, **scores,
        **_measured_with(this, folder / "model"),
    }  # fmt: skip
    log.event(
        "end", step=progress.step, pairs=progress.pairs, seconds=progress.seconds, final_val_loss=final_loss, **scores
    )
    if this.runtime.is_main:
        write_json(folder / "summary.json", summary)
    log.say(cost_table(breakdown, this.runtime.world_size))
    shown = "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
    log.say(
        f"{recipe.name}: validation loss {final_loss:.4f} (best {summary['best_val_loss']:.4f} at {progress.best_pairs:,} pairs)  {shown}"
    )
    log.say(
        f"{progress.pairs:,} pairs in {duration(progress.seconds)}; wrote {folder}/model, summary.json, log.jsonl"
        + (", captions.json, answers.json, samples.json" if recipe.evaluation.generate_images else "")
    )
    return summary


def _measured_with(this: Run, model: Path) -> dict[str, Any]:
    """What the scores of a summary were measured with: settings, prompts, transform, versions and the model's hash."""
    settings = this.recipe.evaluation
    size, norm = this.image_size, this.norm
    return {
        **result_record(
            generation=settings.generate.model_dump(), prompt=CAPTION_PROMPT,
            transform={"name": "eval", "image_size": size, "mean": list(norm.mean), "std": list(norm.std)}, checkpoint=model,
        ),
        "question_prompt": settings.question_prompt or vqa_prompt("{}", this.model.llm.is_encoder_decoder),
    }  # fmt: skip


def _load_into(model: VisionLanguageModel, folder: Path) -> None:
    vpg, _ = read_vpg(folder, model.vpg.image_width)
    model.vpg.load_state_dict(vpg.state_dict())
    model.projector.load_state_dict(read_projector(folder, vpg.config.hidden_size)[0].state_dict())


def _samples(this: Run, captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = {c["image_id"]: c["caption"] for c in captions}
    records = [r for r in this.validator.data.records if r.image_id in texts][: this.recipe.evaluation.samples]
    return [
        {"image_id": r.image_id, "file": str(r.path.resolve()), "references": r.captions, "caption": texts[r.image_id]}
        for r in records
    ]
