"""`vpgtrans cache RECIPE`: the vision and prompt caches of a recipe, what they take and what they save, built before the recipe runs."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from .data.captioned import open_captioned, open_training
from .data.feature_cache import (
    GIB,
    Identity,
    StoredFeatures,
    StoredPrompts,
    check_space,
    fill_ahead,
    prompt_identity,
    unused_tables,
    vision_identity,
)
from .data.feature_table import disk_free_bytes, present_rows, remove_table
from .data.features import LiveFeatures
from .data.packing import Subset, TokenisedCaptions
from .data.reading import DataError
from .kernel_choice import quantise_tower, uses_fp8
from .models.llm import load_tokenizer_only
from .models.tower import VisionTower
from .models.vision import build_tower_on_meta, load_tower
from .models.vpg import VPG
from .planning.devices import DEVICES, Device, find_device
from .planning.trace import Cost, Setting, trace_tower, trace_vpg
from .prompt_cache import AUTO_SHARE
from .recipe import RecipeError, Stage, TransferRecipe, load_recipe
from .runlog import RunLog, duration
from .runtime import Runtime, start, stop
from .transfer.initialise import Origins, build_vpg

TRACED_IMAGES = 8  # of the batch whose operations are counted


@dataclass
class Wanted:
    """One cache of a recipe.  source: what fills it; an_image: what a row costs; spared: how often the recipe's stages read instead."""

    name: str
    identity: Identity
    source: LiveFeatures | Wanted
    vpg: VPG | None
    an_image: Cost
    spared: float


def main(options: argparse.Namespace) -> int:
    """Exit code 0; a recipe or data that cannot be used are `ValueError`s, which the command line prints."""
    recipe = load_recipe(options.recipe, options.overrides, kinds=("transfer",))
    assert isinstance(recipe, TransferRecipe)
    runtime = start(recipe.device, recipe.precision, recipe.threads, recipe.seed)
    root = recipe.output.cache or recipe.output.folder.parent / "cache"
    try:
        log = RunLog(root, enabled=runtime.is_main, name="cache.jsonl", writes=not (options.check or options.dry_run))
    except OSError as error:
        stop()
        raise RecipeError(
            f"output.cache: expected a folder that can be written, got {root} ({error.strerror}); choose another"
        ) from error
    with contextlib.ExitStack() as ending:
        ending.callback(stop)
        ending.callback(log.close)
        wanted = _wanted(recipe, runtime, root, log)
        log.say(_table(wanted, root, runtime))
        if runtime.is_main and (lines := _unused(wanted, root)):
            log.say("\n".join(lines))
        if options.check:
            _check(wanted, root, runtime, log)
        elif not options.dry_run:
            _build(wanted, root, runtime, log, options.rebuild)
    return 0


def _wanted(recipe: TransferRecipe, runtime: Runtime, root: Path, log: RunLog) -> list[Wanted]:
    layout = recipe.data
    stages = _prompt_stages(recipe)
    if not layout.vision_cache and not stages:
        raise RecipeError(
            "data.vision_cache, data.prompt_cache: expected a cache to build, got a recipe without one; set data.vision_cache=true, or see why "
            "no stage can keep prompts: "
            + "; ".join(f"{s.name}: {recipe.prompt_cache_fault(s)}" for s in recipe.stages)
        )
    llm = load_tokenizer_only(recipe.target.llm)
    opening = {
        "max_text_tokens": layout.max_text_tokens, "seed": recipe.seed, "verify_images": layout.verify_images, "cache_root": root, "log": log,
    }  # fmt: skip
    data, subsets, fixed = open_training(layout.train, lambda entry: open_captioned(entry, llm, **opening))
    tower = load_tower(recipe.vision).to(runtime.device, runtime.compute_dtype)
    quantise_tower(recipe.kernels, tower, runtime)
    tower_cost = trace_tower(
        build_tower_on_meta(recipe.vision), TRACED_IMAGES, _setting(runtime, uses_fp8(recipe.kernels, runtime.device))
    ) * (1 / TRACED_IMAGES)
    live = LiveFeatures(data, tower, layout.transform, recipe.seed, runtime, fixed, layout.decode, layout.bad_images)
    views = layout.views if layout.transform == "train" else 1
    found, source = [], live
    if layout.vision_cache:
        spared = _spared(recipe, recipe.stages, data, subsets, views)
        identity = vision_identity(live, views, layout.cache_precision)
        source = Wanted("vision", identity, live, None, tower_cost, spared)
        val = open_captioned(layout.val, llm, **opening, name=f"{layout.val.name}-val")
        val_live = LiveFeatures(val, tower, "eval", recipe.seed, runtime)
        val_identity = vision_identity(val_live, 1, layout.cache_precision)
        found = [source, Wanted("vision, validation", val_identity, val_live, None, tower_cost, 0.0)]
    if stages:
        if not layout.vision_cache and layout.transform == "train":
            source = live.as_eval()
        vpg = build_vpg(recipe, tower.width, Origins("", "", "", "")).to(runtime.device).eval().requires_grad_(False)
        before = source.identity if isinstance(source, Wanted) else vision_identity(source, 1)
        identity = prompt_identity(before, vpg, layout.cache_precision)
        cost = _vpg_cost(vpg, tower, runtime)
        spared = _spared(recipe, stages, data, subsets, before.layout.views)
        total = spared + before.layout.rows
        if layout.prompt_cache is True or spared / total >= AUTO_SHARE:
            an_image = cost if layout.vision_cache else cost + tower_cost
            found.append(Wanted("prompt", identity, source, vpg, an_image, spared))
        else:
            log.say(
                f"prompt cache: not built, because it would spare {spared / total:.0%} of the encodings of {', '.join(s.name for s in stages)}; "
                "data.prompt_cache=true builds it"
            )
    return found


def _prompt_stages(recipe: TransferRecipe) -> list[Stage]:
    """The stages before the VPG trains that can keep prompts; a VPG drawn at random is known to the run alone."""
    found: list[Stage] = []
    if recipe.data.prompt_cache is False or recipe.initialise.vpg == "random":
        return found
    for stage in recipe.stages:
        if stage.trains != "projector":
            break
        if recipe.prompt_cache_fault(stage) is None:
            found.append(stage)
    return found


def _spared(
    recipe: TransferRecipe, stages: list[Stage], data: TokenisedCaptions, subsets: dict[str, tuple[Subset, float | None]], views: int
) -> float:  # fmt: skip
    """Encodings of the stages together that need not be computed; each row is computed once for all of them."""
    limit = None if recipe.data.captions_per_image == "all" else recipe.data.captions_per_image
    read = [0.0] * len(subsets)
    for stage in stages:
        chosen = {name: subsets[name] for name in stage.data or subsets}
        pairs = {name: data.counts.pairs(s.start, s.stop, limit) for name, (s, _) in chosen.items()}
        weights = {name: weight or pairs[name] for name, (_, weight) in chosen.items()}
        total = stage.pairs or round((stage.epochs or 0) * sum(pairs.values()))
        for at, (name, (subset, _)) in enumerate(subsets.items()):
            if name in chosen:
                passes = total * weights[name] / sum(weights.values()) / pairs[name]
                read[at] += (subset.stop - subset.start) * passes
    return sum(max(0.0, r - views * (s.stop - s.start)) for r, (s, _) in zip(read, subsets.values(), strict=True))


def _setting(runtime: Runtime, fp8: bool = False) -> Setting:
    return Setting(runtime.compute_dtype, runtime.device.type != "cpu", fp8)


def _vpg_cost(vpg: VPG, tower: VisionTower, runtime: Runtime) -> Cost:
    with torch.device("meta"):
        shape = VPG(vpg.config, tower.width).eval().requires_grad_(False)
        projector = nn.Linear(vpg.config.hidden_size, 1)
    return trace_vpg(shape, projector, TRACED_IMAGES, tower.tokens, _setting(runtime))[0] * (1 / TRACED_IMAGES)


def _device(runtime: Runtime) -> Device | None:
    """What this device can do, where that is known."""
    if runtime.device.type == "cpu":
        return find_device("cpu", runtime.compute_dtype)
    title = torch.cuda.get_device_name(runtime.device).lower()
    memory = torch.cuda.get_device_properties(runtime.device).total_memory
    names = [n for n in DEVICES if n.partition("-")[0] in title and abs(DEVICES[n].memory_gb * 1e9 / memory - 1) < 0.3]
    return find_device(names[0], runtime.compute_dtype) if names else None


def _table(wanted: list[Wanted], root: Path, runtime: Runtime) -> Table:
    device = _device(runtime)

    def work(cost: Cost, images: float, processes: int) -> str:
        time = "" if device is None else f", {duration(device.seconds(cost) * images / processes)}"
        return f"{cost.flops * images / 1e12:,.3g} TFLOP{time}"

    free = disk_free_bytes(root) / GIB
    rates = "no rate is known of this device" if device is None else f"times from rates {device.origin}"
    table = Table(title=f"caches in {root} ({free:,.1f} GiB free); {rates}", title_justify="left")
    for column in ("cache", "rows there", "GiB whole", "still to build", "spares the recipe's stages", "exact"):
        table.add_column(column, overflow="fold")
    for item in wanted:
        shape, folder = item.identity.layout, item.identity.folder(root)
        there = present_rows(folder)
        exact = "no: fp8" if shape.precision == "fp8" else "yes" if shape.views == 1 else f"{shape.views} stored views"
        table.add_row(
            item.name, f"{there:,} of {shape.rows:,}", f"{shape.bytes / GIB:,.2f}",
            work(item.an_image, shape.rows - there, runtime.world_size), work(item.an_image, item.spared, runtime.world_size) if item.spared else "-",
            exact,
        )  # fmt: skip
    return table


def _opened(item: Wanted, root: Path, log: RunLog) -> StoredFeatures:
    table = item.identity.open(root)
    inner = _opened(item.source, root, log) if isinstance(item.source, Wanted) else item.source
    if item.vpg is not None:
        return StoredPrompts(item.identity, table, inner, log, item.vpg, must_store=True)
    return StoredFeatures(item.identity, table, inner, log, must_store=True)


def _build(wanted: list[Wanted], root: Path, runtime: Runtime, log: RunLog, rebuild: bool) -> None:
    if rebuild:
        if runtime.is_main:
            for item in wanted:
                remove_table(item.identity.folder(root))
        runtime.wait()
    for item in wanted:
        check_space(item.identity, item.identity.folder(root))
    for item in wanted:
        fill_ahead(_opened(item, root, log))
        folder = item.identity.folder(root)
        log.say(f"{item.name} cache: complete, {item.identity.layout.rows:,} rows in {folder}")


def _unused(wanted: list[Wanted], root: Path) -> list[str]:
    """Lines on the caches of the same sets that this recipe does not read on this machine: another recipe or machine may."""
    read = {item.identity.folder(root) for item in wanted}
    lines = []
    for item in wanted:
        for folder, differing in unused_tables(item.identity, root).items():
            if folder not in read:
                with contextlib.suppress(OSError):  # somebody deletes it
                    size = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) / GIB
                    lines.append(f"  {folder}: {size:,.2f} GiB, made of other {', '.join(differing)}")
    return (
        ["not read by this recipe here; delete what no other recipe, nor this one on another machine, reads:", *lines]
        if lines
        else []
    )


def _check(wanted: list[Wanted], root: Path, runtime: Runtime, log: RunLog) -> None:
    failed = []
    for item in wanted:
        folder = item.identity.folder(root)
        if not folder.is_dir():
            log.say(f"{item.name} cache: none at {folder}")
            continue
        table = item.identity.open(root)
        bad = [row for of_rank in runtime.gather(table.failing(runtime.rank, runtime.world_size)) for row in of_rank]
        there = table.layout.rows - table.missing()
        log.say(
            f"{item.name} cache: {there:,} of {table.layout.rows:,} rows, {len(bad):,} fail their checksums: {folder}"
        )
        if bad:
            failed.append(f"{folder}: {len(bad):,} rows fail their checksums, the first row {min(bad):,}")
    if failed:
        raise DataError("; ".join(failed) + "; build again with --rebuild")
