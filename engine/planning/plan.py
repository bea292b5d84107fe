"""The whole plan of a recipe on N devices, as plain data: `vpgtrans plan` prints it, `--json` writes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..data.feature_table import Layout
from ..data.packing import DataError, Subset
from ..dry_run import GIB, Plan, make_plan
from ..kernel_choice import MEASURED
from ..prompt_cache import AUTO_SHARE, spared_share
from ..recipe import RecipeError, TransferRecipe
from .communication import GPUS_A_NODE, scaling, traffic
from .costs import TOWER, VPG_, StageCosts, StageEstimate, compute_setting, estimate, in_fp8, largest_micro_batch
from .devices import DEVICES, RESERVED_BYTES, Device, find_device
from .layout import GATHERED_ITEM, frozen_blocks, rank_memory, shards_blocks
from .options import check_options
from .switches import flipped, more_rows, savings, switches
from .trace import Cost, trace_tower
from .workload import SetShape

DECODE_MS = 1.5  # CPU time of a photograph of 640 x 480 (benches/results, bench "decode")
PACKED_IMAGE_BYTES = 50_000  # a JPEG of 640 x 480, where no file is here to be measured
TOKEN_BYTES = 2  # in a token table


def plan_recipe(
    recipe: TransferRecipe, gpu: str, gpus: int, price: float | None = None, efficiency: float | None = None, with_switches: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """Plan a recipe; sizes in bytes, times in seconds or hours, money in the unit of `price` (of one GPU for one hour).

    clock: seconds by which the CPU is measured.

    Raises:
        ValueError: an unknown device, fewer than one, a negative price, an efficiency outside 0 to 1; ModelError, CheckpointError,
            DataError and RecipeError as `engine.dry_run.make_plan`.
    """
    check_options(gpus, price)
    recipe = recipe.model_copy(update={"device": "cpu" if gpu == "cpu" else "cuda"})
    devices: dict[torch.dtype, Device] = {}

    def device_of(dtype: torch.dtype) -> Device:
        if dtype not in devices:
            devices[dtype] = find_device(gpu, dtype, efficiency, threads=recipe.threads, clock=clock)
        return devices[dtype]

    if gpu != "cpu" or efficiency is not None:
        find_device(gpu, torch.bfloat16, efficiency)  # a wrong name before seconds of work
    recipe = _with_fp8_decided(recipe, gpu)
    plan = make_plan(recipe, with_tower=True)
    device = device_of(plan.compute_dtype)
    found = _describe(plan, device, gpus, price)
    found["switches"] = _switches(plan, device_of, found, gpus) if with_switches else []
    return found


def _with_fp8_decided(recipe: TransferRecipe, gpu: str) -> TransferRecipe:
    """`kernels.frozen_linear` as a run on `gpu` would take it: auto is kernel where that was measured to pay; RecipeError where it cannot run."""
    has_fp8 = gpu != "cpu" and DEVICES[gpu].fp8_tflops is not None
    asked = recipe.kernels.frozen_linear
    if asked == "kernel" and not has_fp8:
        raise RecipeError(
            f"kernels.frozen_linear: expected auto or torch on {gpu}, got kernel: FP8 products with row-wise scales need compute capability 9.0"
        )
    if asked == "auto":
        asked = "kernel" if has_fp8 and "frozen_linear" in MEASURED else "torch"
    return recipe.model_copy(update={"kernels": recipe.kernels.model_copy(update={"frozen_linear": asked})})


def _describe(plan: Plan, device: Device, gpus: int, price: float | None) -> dict[str, Any]:
    stages = [_stage(plan, index, device, gpus, price) for index in range(len(plan.stages))]
    hours = sum(s["gpu_hours"] for s in stages)
    fewest = min(s["largest_rows_per_micro_batch"] for s in stages)  # one setting for all stages
    for stage in stages:
        if not stage["fits"] and fewest >= 1:
            stage["remedy"] = f"set data.rows_per_micro_batch={fewest}"
    notes = list(plan.notes)
    if in_fp8(plan.recipe):
        notes.append(
            "Frozen linears in FP8: whole on a GPU each is kept twice, once a direction, which takes as much memory as bfloat16."
        )
    return {
        "recipe": plan.recipe.name,
        "device": {
            "name": device.name, "title": device.title, "count": gpus, "memory_bytes": device.memory_bytes, "rates": device.origin,
            "matmul_tflops": device.matmul_rates[-1][1] / 1e12, "copy_gb_s": device.copy_rates[-1][1] / 1e9,
            "peak_tflops": device.peak_flops_s and device.peak_flops_s / 1e12,
        },
        "compute_dtype": str(plan.compute_dtype).removeprefix("torch."),
        "parts": [{"name": p.name, "parameters": p.parameters, "origin": p.origin} for p in plan.parts],
        "data": [_data(s, plan) for s in plan.shapes.values()],
        "stages": stages,
        "gpu_hours": hours,
        "money": None if price is None else hours * price,
        "disk": _disk(plan),
        "notes": notes, "operation_us": 1e6 * device.operation_s,
    }  # fmt: skip


def _stage(plan: Plan, index: int, device: Device, gpus: int, price: float | None) -> dict[str, Any]:
    item, data = plan.stages[index], plan.recipe.data
    costs = item.costs
    load = costs.workload
    spared = _spared_by_prompts(plan, index)
    whole, costs = costs, _with_prompts(costs, spared)
    tower = _tower_of_update(plan, whole) if data.vision_cache else None
    build_s = 0.0
    if tower is not None and index == 0:  # all of it before the first stage, by all ranks together
        images = sum(_images_seen(plan, s) or 0 for s in plan.shapes) * data.views
        build_s = _tower_seconds(tower, device) * images / load.encodings / gpus
    made = estimate(costs, item.pairs, device, gpus, build_s, _telling_s(plan, costs, item.pairs, device, gpus))
    memory = rank_memory(plan, index, gpus, device)
    fixed = sum(v for k, v in memory.items() if "activations" not in k and "working" not in k)
    largest = largest_micro_batch(costs, fixed, device, data.rows_per_micro_batch)
    total = sum(memory.values()) + (RESERVED_BYTES if device.overlaps else 0)
    hours = made.stage_s * gpus / 3600
    fits = total <= device.memory_bytes
    parts = {
        name: {
            "flops_a_pair": cost.flops / load.pairs, "backward_flops_a_pair": cost.backward_flops / load.pairs,
            "bytes_a_pair": cost.moved_bytes / load.pairs, "seconds_an_update": made.seconds[name],
        }
        for name, cost in costs.update.items()
    }  # fmt: skip
    return {
        "name": item.stage.name, "trains": item.stage.trains, "trainable": item.trainable, "updates": item.updates, "pairs": item.pairs,
        "memory_bytes": {**memory, "total with what the device reserves": total}, "fits": fits,
        "rows_per_micro_batch": data.rows_per_micro_batch, "largest_rows_per_micro_batch": largest,
        "rows_an_update_and_gpu": load.rows / gpus, "remedy": None if fits else _remedy(fixed, largest, device, gpus, memory),
        "parts": parts, "flops_a_pair": costs.all_flops_a_pair, "exaflops": item.pairs * costs.all_flops_a_pair / 1e18,
        "micro_batches_an_update": load.micro_batches, "tokens_a_pair": load.tokens / load.pairs, "images_a_pair": load.encodings / load.pairs,
        "pairs_per_s": made.pairs_per_s, "pairs_per_s_per_gpu": made.pairs_per_s / gpus, "idle_share": made.idle_share,
        "issuing_decides": made.host_bound, "utilisation": _utilisation(made, device, gpus), "cache_build_s": build_s,
        "decoding_cores": 0.0 if data.vision_cache else (1 - spared) * made.pairs_per_s * load.encodings / load.pairs * DECODE_MS / 1e3,
        "hours": made.stage_s / 3600, "gpu_hours": hours, "money": None if price is None else hours * price,
        "savings": [
            {"name": s.name, "on": s.is_on, "flops_a_pair_without": s.flops_without, "why": s.why}
            for s in savings(plan.recipe, costs, tower, bool(plan.model.llm.config.is_encoder_decoder), whole if spared else None)
        ],
        "communication": _communication(plan, costs, item.pairs, device),
    }  # fmt: skip


def _spared_by_prompts(plan: Plan, index: int) -> float:
    """Share of a stage's encodings that its prompt cache spares; 0 where it has none, as `engine/prompt_cache.py` decides."""
    item, data = plan.stages[index], plan.recipe.data
    chosen = [e for e in data.train if e.name in (item.stage.data or [e.name])]
    shapes = [plan.shapes[e.name] for e in chosen]
    if (
        data.prompt_cache is False
        or plan.recipe.prompt_cache_fault(item.stage)
        or any(s.images is None for s in shapes)
    ):
        return 0.0
    subsets = []
    for entry, shape in zip(chosen, shapes, strict=True):
        an_image = shape.captions_per_image
        pairs = shape.images * (
            an_image if data.captions_per_image == "all" else min(data.captions_per_image, an_image)
        )
        subsets.append((Subset(0, shape.images, entry.weight or pairs), pairs))
    views = data.views if data.vision_cache and data.transform == "train" else 1
    spared = spared_share(subsets, item.pairs, views)
    return spared if data.prompt_cache is True or spared >= AUTO_SHARE else 0.0


def _with_prompts(costs: StageCosts, spared: float) -> StageCosts:
    update = {part: cost * (1 - spared) if part in (TOWER, VPG_) else cost for part, cost in costs.update.items()}
    return replace(costs, update=update)


def _telling_s(plan: Plan, costs: StageCosts, pairs: int, device: Device, gpus: int) -> float:
    """Seconds of an update that `gpus` devices spend telling each other things while nothing computes, as the recipe distributes them."""
    if gpus == 1:
        return 0.0
    settings = plan.recipe.distribution
    layout = "replicated"
    if shards_blocks(plan, gpus, device):
        layout = "node" if settings.shard_over == "node" or gpus <= GPUS_A_NODE else "world"
    seconds = estimate(costs, pairs, device, 1).seconds
    found = traffic(costs, seconds, frozen_blocks(plan), device, gpus, layout, optimizer=settings.optimizer)
    return found.exposed_s if device.overlaps else found.gather_s + found.reduce_s


def _communication(plan: Plan, costs: StageCosts, pairs: int, device: Device) -> list[dict[str, Any]]:
    """Rows for 8 to 64 GPUs; nothing on the CPU, which has no links of a known rate."""
    if not device.overlaps:
        return []
    alone = estimate(costs, pairs, device, 1)
    return scaling(
        costs, alone.seconds, alone.update_s, frozen_blocks(plan), device, optimizer=plan.recipe.distribution.optimizer
    )


def _utilisation(made: StageEstimate, device: Device, gpus: int) -> float | None:
    """Share of the datasheet's peak over a whole update."""
    if device.peak_flops_s is None:
        return None
    return made.costs.all_flops_a_pair * made.pairs_per_s / gpus / device.peak_flops_s


def _tower_of_update(plan: Plan, costs: StageCosts) -> Cost:
    load = costs.workload
    setting = compute_setting(plan.recipe, plan.compute_dtype)
    images = len(load.batch.groups)
    return trace_tower(plan.tower, images, setting) * (load.encodings / images)


def _tower_seconds(tower: Cost, device: Device) -> float:
    on_device = device.seconds(tower)
    issuing = tower.count * device.operation_s
    return max(on_device, issuing) if device.overlaps else on_device + issuing


def _remedy(fixed: float, largest: int, device: Device, gpus: int, memory: dict[str, int]) -> str:
    if largest >= 1:
        return f"set data.rows_per_micro_batch={largest}"
    frozen = sum(v for k, v in memory.items() if k.startswith("frozen"))
    text = f"weights, gradients and moments alone take {fixed / GIB:.1f} GiB of {device.memory_bytes / GIB:.1f} GiB; "
    if (
        device.overlaps
        and GATHERED_ITEM not in memory
        and fixed - frozen + frozen / max(gpus, 8) < 0.8 * device.memory_bytes
    ):
        text += f"sharding the frozen parts ({frozen / GIB:.1f} GiB) over {max(gpus, 8)} GPUs would fit them (distribution.frozen=sharded, or auto); "
    return (
        text
        + f"choose a {'GPU' if device.overlaps else 'machine'} with more memory, a smaller target.llm, or fewer data.row_tokens"
    )


def _data(shape: SetShape, plan: Plan) -> dict[str, Any]:
    return {
        "name": shape.name, "images": shape.images, "captions_an_image": shape.captions_per_image, "tokens_a_caption": shape.caption_tokens,
        "origin": shape.origin, "images_seen": _images_seen(plan, shape.name),
    }  # fmt: skip


def _images_seen(plan: Plan, name: str) -> int | None:
    """Different images of a set that the whole run touches: all that there are, or as many as its pairs need."""
    shape, recipe = plan.shapes[name], plan.recipe
    limit = recipe.data.captions_per_image
    an_image = shape.captions_per_image if limit == "all" else min(limit, shape.captions_per_image)
    seen = 0.0
    for item in plan.stages:
        chosen = [e for e in recipe.data.train if e.name in (item.stage.data or [e.name])]
        weights = {e.name: e.weight or plan.shapes[e.name].pairs or 1.0 for e in chosen}
        if name in weights:
            seen += item.pairs * weights[name] / sum(weights.values()) / an_image
    return round(seen) if shape.images is None else min(shape.images, round(seen))


def _disk(plan: Plan) -> dict[str, Any]:
    """Bytes of the vision cache, of packed JPEGs and of token tables for the training images that the run touches."""
    views = plan.recipe.data.views
    images = {name: _images_seen(plan, name) or 0 for name in plan.shapes}
    total = sum(images.values())
    precision = plan.recipe.data.cache_precision
    one = Layout(1, 1, plan.tower.tokens, plan.tower.width, plan.compute_dtype, precision).row_bytes
    config = plan.model.vpg.config
    prompt = Layout(1, 1, config.num_query_tokens, config.hidden_size, plan.compute_dtype, precision).row_bytes
    captions = {name: images[name] * s.captions_per_image * s.caption_tokens for name, s in plan.shapes.items()}
    return {
        "images": total, "vision_cache": plan.recipe.data.vision_cache, "vision_cache_bytes": total * views * one,
        "vision_cache_bytes_an_image": one, "views": views, "precision": precision,
        "prompt_cache": any(_spared_by_prompts(plan, index) for index in range(len(plan.stages))), "prompt_cache_bytes": total * views * prompt,
        "pack_bytes": sum(images[n] * (s.image_bytes or PACKED_IMAGE_BYTES) for n, s in plan.shapes.items()),
        "token_table_bytes": TOKEN_BYTES * sum(captions.values()),
    }  # fmt: skip


def _switches(plan: Plan, device_of: Any, now: dict[str, Any], gpus: int) -> list[dict[str, Any]]:
    """Each switch flipped and planned again, the one that saves most first."""
    largest = min(s["largest_rows_per_micro_batch"] for s in now["stages"])
    useful = max(1, min(largest, math.ceil(max(s["rows_an_update_and_gpu"] for s in now["stages"]))))
    has_fp8, rows = device_of(plan.compute_dtype).fp8_rates is not None, []
    waiting = switches(plan.recipe, useful, plan.recipe.device != "cpu", has_fp8)
    while waiting:
        switch = waiting.pop(0)
        row: dict[str, Any] = {"settings": list(switch.settings), "note": switch.note}
        try:
            other = make_plan(flipped(plan.recipe, switch), with_tower=True)
        except DataError as error:
            rows.append({**row, "gpu_hours": None, "saves_gpu_hours": 0.0, "impossible": str(error)})
            continue
        device = device_of(other.compute_dtype)
        stages = [_stage(other, index, device, gpus, None) for index in range(len(other.stages))]
        fits = all(s["fits"] for s in stages)
        fewer = min(s["largest_rows_per_micro_batch"] for s in stages)
        # What fits was reckoned from the recipe's own micro-batch; traced at its own size it may be some rows less.
        if not fits and 1 < fewer < switch.changes.get("rows_per_micro_batch", 0):
            waiting.insert(0, more_rows(fewer))
            continue
        hours = sum(s["gpu_hours"] for s in stages)
        rows.append({
            **row, "gpu_hours": hours, "saves_gpu_hours": now["gpu_hours"] - hours, "fits": fits,
            "memory_bytes": max(s["memory_bytes"]["total with what the device reserves"] for s in stages),
            "disk_bytes": _disk(other)["vision_cache_bytes"] if other.recipe.data.vision_cache else 0, "impossible": None,
        })  # fmt: skip
    return sorted(rows, key=lambda r: -r["saves_gpu_hours"])
