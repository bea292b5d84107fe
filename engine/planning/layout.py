"""What one rank of several keeps, as a recipe's `distribution` has it: the memory rows of a plan, for N GPUs in place of one."""

from __future__ import annotations

from torch import nn

from ..distributed.frozen import runs_of_blocks
from ..distributed.sharded_adamw import part_elements
from ..dry_run import LLM_ITEM, MASTER_ITEM, MOMENTS_ITEM, TOWER_ITEM, Plan
from .communication import GPUS_A_NODE, Frozen
from .devices import RESERVED_BYTES, Device

GATHERED_ITEM = "frozen blocks gathered, compute dtype"


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
    parts: dict[str, nn.Module] = {LLM_ITEM: plan.model.llm}
    if not plan.recipe.data.vision_cache:  # then one process encodes, with a whole tower
        parts[TOWER_ITEM] = plan.tower
    for name, part in parts.items():
        for run in runs_of_blocks(part):
            whole, own = (sum(_elements(block, n) for block in run) for n in (1, ranks))
            memory[name] -= size * (whole if settings.cpu_offload else whole - own)
            at_once = min(len(run), 1 + settings.prefetch_blocks)
            gathered = max(gathered, size * at_once * max(_elements(block, 1) for block in run))
    return {**memory, GATHERED_ITEM: gathered}


def shards_blocks(plan: Plan, gpus: int, device: Device) -> bool:
    """As `engine/distributed/frozen.py` decides: where the recipe asks for it, or, with auto, where a stage does not fit whole on a GPU."""
    frozen = plan.recipe.distribution.frozen
    if gpus == 1 or frozen == "replicated":
        return False
    wanted = max(sum(stage.memory.values()) for stage in plan.stages)
    return frozen == "sharded" or (device.overlaps and wanted > device.memory_bytes - RESERVED_BYTES)


def frozen_blocks(plan: Plan) -> Frozen:
    """The blocks that can be sharded, in the compute dtype; none of the tower where its outputs are cached."""
    size = plan.compute_dtype.itemsize
    found = []
    for part in (plan.tower, plan.model.llm):
        blocks = [block for run in runs_of_blocks(part) for block in run]
        found += [size * sum(_elements(block, 1) for block in blocks), len(blocks)]
    tower_bytes, tower_blocks, llm_bytes, llm_blocks = found
    return Frozen(0 if plan.recipe.data.vision_cache else tower_bytes, tower_blocks, llm_bytes, llm_blocks)


def _elements(block: nn.Module, ranks: int) -> int:
    """Of rank 0's piece: each tensor is cut along its first side, the last piece being the short one."""
    return sum(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in block.parameters())
