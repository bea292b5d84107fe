"""What one rank of several keeps, as a recipe's `distribution` has it: the memory rows of a plan, for N GPUs in place of one."""

from __future__ import annotations

from torch import nn

from ...kernels.frozen_linear import ALIGNMENT
from ..distributed.frozen import runs_of_blocks
from ..distributed.sharded_adamw import part_elements
from ..dry_run import LLM_ITEM, MASTER_ITEM, MOMENTS_ITEM, TOWER_ITEM, Plan
from .communication import GPUS_A_NODE, Frozen
from .costs import in_fp8
from .devices import RESERVED_BYTES, Device

GATHERED_ITEM = "frozen blocks gathered"


def rank_memory(plan: Plan, index: int, gpus: int, device: Device) -> dict[str, int]:
    """Bytes on one of `gpus` GPUs in stage `index`, by the rows of `StagePlan.memory`; with sharded blocks one more, for those gathered."""
    item, settings = plan.stages[index], plan.recipe.distribution
    memory = dict(item.memory)
    if gpus == 1:
        return memory
    if settings.optimizer == "sharded":
        part = part_elements(item.costs.tensor_sizes, gpus)
        memory |= {MASTER_ITEM: 4 * gpus * part, MOMENTS_ITEM: 8 * part}
    if not shards_blocks(plan, gpus, device):
        return memory
    ranks = gpus if settings.shard_over == "world" else min(gpus, GPUS_A_NODE)
    size, gathered = plan.compute_dtype.itemsize, 0
    fp8 = in_fp8(plan.recipe)
    parts: dict[str, nn.Module] = {LLM_ITEM: plan.model.llm}
    if not plan.recipe.data.vision_cache:  # then the tower stays whole: it encodes once, before training
        parts[TOWER_ITEM] = plan.tower
    for name, part in parts.items():
        for run in runs_of_blocks(part):
            whole = sum(
                _bytes(block, 1, size, fp8=False) for block in run
            )  # as `memory` has it: FP8 whole on a GPU is kept twice
            memory[name] -= whole - (
                0 if settings.cpu_offload else sum(_bytes(block, ranks, size, fp8) for block in run)
            )
            at_once = min(len(run), 1 + settings.prefetch_blocks)
            gathered = max(gathered, at_once * max(_bytes(block, 1, size, fp8) for block in run))
    return {**memory, GATHERED_ITEM: gathered}


def shards_blocks(plan: Plan, gpus: int, device: Device) -> bool:
    """As `engine/distributed/frozen.py` decides: where the recipe asks for it, or, with auto, where a stage does not fit whole on a GPU."""
    frozen = plan.recipe.distribution.frozen
    if gpus == 1 or frozen == "replicated":
        return False
    wanted = max(sum(stage.memory.values()) for stage in plan.stages)
    return frozen == "sharded" or (device.overlaps and wanted > device.memory_bytes - RESERVED_BYTES)


def frozen_blocks(plan: Plan) -> Frozen:
    """The blocks that can be sharded, in the dtype they are gathered in; none of the tower where its outputs are cached."""
    size, fp8 = plan.compute_dtype.itemsize, in_fp8(plan.recipe)
    found = []
    for part in (plan.tower, plan.model.llm):
        blocks = [block for run in runs_of_blocks(part) for block in run]
        found += [sum(_bytes(block, 1, size, fp8) for block in blocks), len(blocks)]
    tower_bytes, tower_blocks, llm_bytes, llm_blocks = found
    return Frozen(0 if plan.recipe.data.vision_cache else tower_bytes, tower_blocks, llm_bytes, llm_blocks)


def _bytes(block: nn.Module, ranks: int, size: int, fp8: bool) -> int:
    """Of rank 0's piece, `size` bytes an element: each tensor is cut along its first side, the last piece being the short one.

    fp8: linears take a byte a weight and a float32 scale an output (kernels/quantise_frozen.py).
    """
    total = 0
    for module in block.modules():
        quantised = fp8 and isinstance(module, nn.Linear) and not any(side % ALIGNMENT for side in module.weight.shape)
        for name, p in module.named_parameters(recurse=False):
            width = p.numel() // p.shape[0]
            row_bytes = width + 4 if quantised and name == "weight" else size * width
            total += -(-p.shape[0] // ranks) * row_bytes
    return total
