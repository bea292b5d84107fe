"""Out of memory: how much was asked for, how much there was, and which switches of the recipe to turn, with numbers from the plan's memory model."""

from __future__ import annotations

import gc
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from .data.packing import PackedBatch
from .dry_run import ACTIVATIONS_ITEM, GIB, WORKING_ITEM, Plan, StagePlan, make_plan
from .planning.costs import rows_that_fit
from .recipe import TransferRecipe

MODEL_ERROR = 1.1  # the memory model is within a tenth of what runs take (tests/test_plan.py)
# On the CPU malloc leaves holes besides: of runs with the same micro-batch, one took a tenth more of the address space than the others.
FRAGMENTATION_CPU = 1.2
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50, "EiB": 2**60}


@dataclass(frozen=True)
class Shortage:
    """An allocation that failed: bytes asked for and free at that moment, None where the allocator does not say."""

    device: str
    asked_bytes: float | None
    free_bytes: float | None


def shortage(error: BaseException) -> Shortage | None:
    """What an exception says of memory that could not be had; None where it is about something else."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        free = re.search(r"of which ([\d.]+) (\w+) is free", text)
        return Shortage("GPU", _bytes(re.search(r"Tried to allocate ([\d.]+) (\w+)", text)), _bytes(free))
    asked = re.search(r"you tried to allocate (\d+) bytes", text)  # torch's allocator of the CPU: a plain RuntimeError
    if asked is None and not isinstance(error, MemoryError) and "bad_alloc" not in text:
        return None
    numpys = re.search(r"Unable to allocate ([\d.]+) (\w+)", text)
    return Shortage("CPU", float(asked[1]) if asked else _bytes(numpys), available_bytes(torch.device("cpu")))


def _bytes(found: re.Match[str] | None) -> float | None:
    return None if found is None or found[2] not in _UNITS else float(found[1]) * _UNITS[found[2]]


def available_bytes(device: torch.device) -> float:
    """What this process could still take now: on the CPU the lesser of the machine's and what a limit of the process leaves."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    told = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    room = 1024.0 * int(told["MemAvailable"])
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        room = min(room, float(limit - used))
    return room


def explain(recipe: TransferRecipe, found: Shortage) -> str:
    """One message.  To be called once the run's tensors are gone: what is available then is what another run would have."""
    gc.collect()
    if found.device == "GPU":
        torch.cuda.empty_cache()
        room = available_bytes(torch.device("cuda", torch.cuda.current_device()))
    else:
        room = available_bytes(torch.device("cpu"))
    asked = "an amount that the allocator does not name" if found.asked_bytes is None else _gib(found.asked_bytes)
    free = "" if found.free_bytes is None else f", {_gib(found.free_bytes)} were free"
    lines = [f"out of {found.device} memory: {asked} asked for{free}; without this run {_gib(room)} are."]
    try:
        plan = make_plan(recipe)
    except (ValueError, RuntimeError, MemoryError) as error:
        lines.append(f"What it would need cannot be told ({error}); try data.rows_per_micro_batch={_half(recipe)}.")
    else:
        lines += remedies(plan, room / (1.0 if found.device == "GPU" else FRAGMENTATION_CPU))
    return "\n  ".join(lines)


def remedies(plan: Plan, room_bytes: float) -> list[str]:
    """Switches to turn, the first enough by itself where there is one; room_bytes: all that a run can have."""
    data = plan.recipe.data
    worst = max(plan.stages, key=lambda s: sum(s.memory.values()))
    fixed, activations = _parts(worst)
    rows = data.rows_per_micro_batch
    fitting = min(rows_that_fit(s.costs, room_bytes / MODEL_ERROR - _parts(s)[0], _rows(s, rows)) for s in plan.stages)
    told = (
        f"The plan counts {_gib(fixed)} of weights, gradients and moments and {_gib(activations)} for a micro-batch of {rows} rows of "
        f"{data.row_tokens} tokens (stage {worst.stage.name})."
    )
    lines = [told]
    needed = _rows(worst, rows)
    if fitting >= needed:
        lines.append(f"By the plan that would have fitted; try data.rows_per_micro_batch={max(1, needed // 2)}.")
    elif fitting >= 1:
        lines.append(
            f"data.rows_per_micro_batch={fitting} in place of {rows} is the most that fits for sure: the same result in more micro-batches."
        )
    else:
        lines.append(f"Not even data.rows_per_micro_batch=1 fits: a row takes {_gib(activations / needed)}.")
    return lines + _others(plan, worst)


def _others(plan: Plan, worst: StagePlan) -> list[str]:
    costs, data, lines = worst.costs, plan.recipe.data, []
    text = costs.kept_bytes + costs.head_bytes
    if not data.vision_cache and costs.tower_bytes > text:
        lines.append(
            f"data.vision_cache=true: the tower works on {_gib(costs.tower_bytes)} at a time in every update, the rest on {_gib(text)}."
        )
    if plan.recipe.kernels.linear_cross_entropy != "kernel" and costs.head_bytes > 0.05 * text:
        lines.append(
            f"kernels.linear_cross_entropy=kernel (where Triton runs): the gradient of the logits takes {_gib(costs.head_bytes)}, and the logits "
            "are kept beside it."
        )
    if plan.compute_dtype == torch.float32:
        frozen = sum(v for k, v in worst.memory.items() if "compute dtype" in k)
        lines.append(f"precision=bf16: {_gib(frozen / 2)} less of frozen weights, and activations of half the size.")
    return lines


def _parts(item: StagePlan) -> tuple[float, float]:
    """Bytes that do not depend on the micro-batch, and those that do."""
    moving = item.memory[ACTIVATIONS_ITEM] + item.memory[WORKING_ITEM]
    return float(sum(item.memory.values()) - moving), float(moving)


def _rows(item: StagePlan, asked: int) -> int:
    """Rows of the micro-batch that was planned: an update may have fewer than asked for."""
    batch = item.costs.workload.batch
    return len(batch.ids) if isinstance(batch, PackedBatch) else asked


def _half(recipe: TransferRecipe) -> int:
    return max(1, recipe.data.rows_per_micro_batch // 2)


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:,.1f} MiB"
