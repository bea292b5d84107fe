"""One stage of a recipe on one device: operations and bytes of each part, memory, seconds of an update.

Data parallel over N devices: the images of an update are dealt to the ranks by tokens, each packs its own share into rows and micro-batches,
gradients are summed once.  Evaluation, captioning and start-up are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..checkpoint import trainable_tensors
from ..models.tower import VisionTower
from ..models.vlm import VisionLanguageModel
from ..recipe import Stage, TransferRecipe
from .devices import RESERVED_BYTES, Device
from .trace import NOTHING, Cost, Operation, Setting, cast_bytes, trace_llm, trace_tower, trace_vpg
from .workload import SetShape, Workload, simulate

TOWER, VPG_, PROJECTOR, BLOCKS, HEAD, OPTIMISER = (
    "vision tower, forward",
    "Q-Former",
    "projector",
    "language model, forward and input gradient",
    "head and loss, supervised positions",
    "optimiser",
)


@dataclass(frozen=True)
class StageCosts:
    """Costs of one average update over all devices by part, and what one micro-batch keeps for its backward pass."""

    stage: Stage
    workload: Workload
    update: dict[str, Cost]
    trainable: int
    kept_bytes: float
    cast_bytes: int
    head_bytes: float
    tower_bytes: float
    queries: int
    tensor_sizes: tuple[int, ...] = ()  # elements of each tensor that trains

    def flops_a_pair(self, part: str) -> float:
        return self.update[part].flops / self.workload.pairs

    @property
    def all_flops_a_pair(self) -> float:
        return sum(cost.flops for cost in self.update.values()) / self.workload.pairs

    @property
    def activation_bytes(self) -> float:
        """The most that one micro-batch takes beside weights, gradients and moments."""
        return max(self.kept_bytes + self.head_bytes, self.tower_bytes)


def stage_costs(
    recipe: TransferRecipe, stage: Stage, tower: VisionTower, model: VisionLanguageModel, shapes: dict[str, SetShape], setting: Setting,
    with_tower: bool = True,
) -> StageCosts:  # fmt: skip
    """Costs of a stage for parts on the meta device, which are left frozen as the stage has them; model.llm is a transformers model.

    with_tower: false where only the memory is asked for.  Raises DataError when a caption does not fit into a row.
    """
    model.freeze_for(stage.trains, stage.frozen_dropout)
    config = model.llm.config
    load = simulate(
        recipe, stage, shapes, model.queries, int(config.vocab_size), is_encoder_decoder=bool(config.is_encoder_decoder), on_gpu=setting.on_gpu
    )  # fmt: skip
    images, itemsize = len(load.batch.groups), setting.compute_dtype.itemsize
    per_image, per_token = load.encodings / images, load.tokens / load.batch_tokens
    blocks, head = trace_llm(model.llm, load.batch, model.queries, setting)  # type: ignore[arg-type]
    vpg, projector = trace_vpg(model.vpg, model.projector, images, tower.tokens, setting)
    features = images * tower.tokens * tower.width * itemsize
    if recipe.data.vision_cache:
        encoding = Cost({Operation("plain", 0, 2 * features): 1.0})
    else:
        encoding = trace_tower(tower, images, setting) if with_tower else NOTHING
    tensors = trainable_tensors(model)
    trainable = sum(p.numel() for p in tensors.values())
    casts = cast_bytes(model.vpg, setting) + cast_bytes(model.projector, setting)
    vocabulary = int(config.vocab_size)
    widest = max((max(m.in_features, m.out_features) for m in tower.modules() if isinstance(m, nn.Linear)), default=0)
    return StageCosts(
        stage, load,
        {
            TOWER: encoding * per_image, VPG_: vpg * per_image, PROJECTOR: projector * per_image, BLOCKS: blocks * per_token,
            HEAD: head * (load.targets / load.batch.target_count), OPTIMISER: _optimiser(trainable, len(tensors), load.micro_batches),
        },
        trainable, vpg.saved + projector.saved + blocks.saved + head.saved, casts,
        # The gradient of the logits, in float32 and in the compute dtype.
        load.batch.target_count * vocabulary * (4 + (itemsize if itemsize < 4 else 0)),
        0 if recipe.data.vision_cache else images * tower.tokens * (4 * itemsize * widest + 8 * tower.width), model.queries,
        tuple(p.numel() for p in tensors.values()),
    )  # fmt: skip


def _optimiser(trainable: int, tensors: int, micro_batches: float) -> Cost:
    """AdamW reads weights, gradients and two moments and writes three of them; the norm reads gradients; micro-batches add to them."""
    size = max(1, trainable // tensors)
    adding = max(0.0, micro_batches - 1)
    return Cost(
        {Operation("plain", 0, 32 * trainable, True): 1.0, Operation("plain", 0, 12 * size, True): adding * tensors}
    )


@dataclass(frozen=True)
class StageEstimate:
    """What a stage takes on N devices."""

    costs: StageCosts
    pairs: int
    update_s: float
    seconds: dict[str, float]
    host_bound: bool
    idle_share: float
    cache_build_s: float

    @property
    def pairs_per_s(self) -> float:
        return self.costs.workload.pairs / self.update_s

    @property
    def stage_s(self) -> float:
        return self.pairs / self.pairs_per_s + self.cache_build_s


def estimate(
    costs: StageCosts, pairs: int, device: Device, gpus: int, cache_build_s: float = 0.0, telling_s: float = 0.0
) -> StageEstimate:
    """Seconds of an update: each operation takes the longer of its FLOPs and its bytes at the device's rates.

    On the CPU issuing an operation comes on top; a GPU computes while the host issues, so that the slower of the two counts.  A rank computes
    its share of the rows, in whole rows, the fullest rank deciding, and issues the operations of its own micro-batches, full or not.
    telling_s: of an update, communication that nothing hides (`communication.traffic`).
    """
    parts, host_bound, update_s = {}, False, 0.0
    load = costs.workload
    share = max(1.0, math.ceil(load.rows / gpus - 1e-9)) / load.rows if gpus > 1 else 1.0
    issued = own_micro_batches(load.micro_batches, gpus) / load.micro_batches
    for part, cost in costs.update.items():
        on_device = device.seconds(cost)
        issuing = cost.count * device.operation_s
        parts[part] = max(on_device, issuing) if device.overlaps else on_device + issuing
        computed, called = (1.0, 1.0) if part == OPTIMISER else (share, issued)
        on_device, issuing = computed * on_device, called * issuing
        host_bound = host_bound or (part == BLOCKS and device.overlaps and issuing > on_device)
        update_s += max(on_device, issuing) if device.overlaps else on_device + issuing
    return StageEstimate(
        costs, pairs, update_s + telling_s, parts, host_bound, 1.0 - 1.0 / (share * gpus), cache_build_s
    )


def own_micro_batches(micro_batches: float, gpus: int) -> float:
    """Of one rank in an average update of so many in all: whole ones, equally many on every rank, the last of them perhaps less than full."""
    return micro_batches if gpus == 1 else max(1.0, math.ceil(micro_batches / gpus - 1e-9))


def largest_micro_batch(costs: StageCosts, fixed_bytes: float, device: Device, rows: int) -> int:
    """rows_per_micro_batch that fits beside `fixed_bytes` (weights, gradients, moments); 0 where not even one does.

    What is kept grows with the rows but for autocast's copies of the weights.  rows: of the micro-batch that `costs` were traced on.
    """
    room = device.memory_bytes - (RESERVED_BYTES if device.overlaps else 0) - fixed_bytes
    return rows_that_fit(costs, room, rows)


def rows_that_fit(costs: StageCosts, room_bytes: float, rows: int) -> int:
    """As `largest_micro_batch`, room_bytes: what there is beside weights, gradients and moments."""
    a_row = (costs.kept_bytes - costs.cast_bytes + costs.head_bytes) / rows
    return max(0, int(min((room_bytes - costs.cast_bytes) / a_row, room_bytes / max(costs.tower_bytes / rows, 1.0))))


def without_tower(costs: StageCosts) -> StageCosts:
    """The same stage without the tower's forward pass, as far as time goes."""
    return replace(costs, update={**costs.update, TOWER: NOTHING})


def compute_setting(recipe: TransferRecipe, dtype: torch.dtype) -> Setting:
    return Setting(dtype, recipe.device != "cpu", in_fp8(recipe))


def in_fp8(recipe: TransferRecipe) -> bool:
    """Whether frozen linears are planned in FP8; `plan_recipe` has decided what auto means."""
    return recipe.device != "cpu" and recipe.kernels.frozen_linear == "kernel"
