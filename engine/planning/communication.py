"""What N GPUs tell each other in one update: bytes by collective, seconds on the links, and how much of it computing hides.

Layouts of the frozen parts: `replicated` (every part whole on each GPU), `world` (blocks sharded over all GPUs) and `node` (sharded over the GPUs
of a node, replicated over nodes); embeddings, head and outer norms are whole in each.  Trainable parameters, T of them, are replicated, their
gradients float32; AdamW's moments may be sharded.  For one GPU of N = n nodes x g:

    gradients, all-reduce           sends 2 (N - 1) / N x 4 T bytes an update, whole moments or sharded ones
    frozen blocks, all-gather       receives (S - 1) / S x B bytes a pass, S GPUs a shard group: one pass for the tower (no backward), two for the
                                    language model's blocks (forward; again in reverse for the input gradient), each micro-batch
    new weights, all-gather         with sharded moments: receives (N - 1) / N x 4 N P bytes an update, P elements being the largest share of any
                                    rank: tensors are dealt whole, N P >= T

All are payloads.  Left out as too small to matter: gradients begin at multiples of 64 elements, and flags of 8 bytes travel after each update.

Between nodes a collective moves as much into a node as one GPU of it would get were each node one rank: (n - 1) / n of the whole, over g adapters
together (rings over all adapters, as NCCL builds them).  Its time is the longer of that and of what NVLink inside the node takes.

Hidden: the gather of block k + 1 behind the computing of block k, so that the first gather of a pass shows, and what is longer than the pass; the
reduction behind the Q-Former's backward in the last micro-batch, so that its last bucket shows, and what is longer than that backward.  Nothing
hides the gather of new weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..distributed.reduction import BUCKET_BYTES
from ..distributed.sharded_adamw import part_elements
from .costs import BLOCKS, TOWER, VPG_, StageCosts, own_micro_batches
from .devices import Device

Layout = Literal["replicated", "node", "world"]
NETWORK_BYTES_S = 50e9  # 400 Gb/s, one adapter a GPU
GPUS_A_NODE = 8
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Frozen:
    """Frozen blocks: bytes of all of a part in the dtype in which they are gathered, and how many are gathered one by one."""

    tower_bytes: float
    tower_blocks: int
    llm_bytes: float
    llm_blocks: int


@dataclass(frozen=True)
class Traffic:
    """Of one GPU in one update: bytes, seconds on the slowest link, and the seconds of these that nothing hides.  Gathered: frozen blocks, and new
    weights where the moments are sharded."""

    gathered_bytes: float
    reduced_bytes: float
    gather_s: float
    reduce_s: float
    exposed_s: float

    @property
    def hidden_share(self) -> float:
        total = self.gather_s + self.reduce_s
        return 1.0 - self.exposed_s / total if total else 1.0


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Sent, and received, by each of `ranks` to sum `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(size: float, ranks: int) -> float:
    """Received by each of `ranks` to have all of `size` bytes, of which it holds its share."""
    return (ranks - 1) / ranks * size


def traffic(
    costs: StageCosts, seconds: dict[str, float], frozen: Frozen, device: Device, gpus: int, layout: Layout,
    network_bytes_s: float = NETWORK_BYTES_S, optimizer: Literal["replicated", "sharded"] = "replicated",
) -> Traffic:  # fmt: skip
    """What an update of `costs` asks of each of `gpus` GPUs.

    Args:
        seconds: of the parts in one update, all micro-batches on one GPU (`StageEstimate.seconds`).
        network_bytes_s: of one adapter, one a GPU.
        optimizer: `distribution.optimizer` of a recipe.
    """
    node = min(gpus, GPUS_A_NODE)
    nodes = -(-gpus // node)
    passes = own_micro_batches(costs.workload.micro_batches, gpus)

    def link_s(inside: float, between: float) -> float:
        return max(inside / device.link_bytes_s, between / (node * network_bytes_s))

    size = GRADIENT_BYTES * costs.trainable
    reduced = all_reduce_bytes(size, gpus)
    reduce_s = link_s(reduced, all_reduce_bytes(size, nodes))
    cost = costs.update[VPG_]
    behind = seconds[VPG_] / max(costs.workload.micro_batches, 1.0) * cost.backward_flops / max(cost.flops, 1.0)
    exposed = max(min(1.0, BUCKET_BYTES / size) * reduce_s, reduce_s - behind) if gpus > 1 else 0.0
    gathered = gather_s = 0.0
    shards = {"replicated": 1, "node": node, "world": gpus}[layout]
    if shards > 1:
        crossing = nodes if layout == "world" else 1
        language = seconds[BLOCKS] / costs.workload.micro_batches
        backward = costs.update[BLOCKS].backward_flops / max(costs.update[BLOCKS].flops, 1.0)
        for bytes_, blocks, computing in (
            (frozen.tower_bytes, frozen.tower_blocks, seconds[TOWER] / costs.workload.micro_batches),
            (frozen.llm_bytes, frozen.llm_blocks, language * (1 - backward)),
            (frozen.llm_bytes, frozen.llm_blocks, language * backward),
        ):
            if not bytes_:
                continue
            one = link_s(all_gather_bytes(bytes_, shards), all_gather_bytes(bytes_, crossing))
            first = one / max(1, blocks)
            gathered += passes * all_gather_bytes(bytes_, shards)
            gather_s += passes * one
            exposed += passes * max(first, one - computing)
    if optimizer == "sharded" and gpus > 1:
        whole = GRADIENT_BYTES * gpus * part_elements(costs.tensor_sizes, gpus)
        weights_s = link_s(all_gather_bytes(whole, gpus), all_gather_bytes(whole, nodes))
        gathered, gather_s, exposed = (
            gathered + all_gather_bytes(whole, gpus),
            gather_s + weights_s,
            exposed + weights_s,
        )
    return Traffic(gathered, reduced, gather_s, reduce_s, exposed)


def scaling(
    costs: StageCosts, seconds: dict[str, float], update_s: float, frozen: Frozen, device: Device,
    sizes: tuple[int, ...] = (8, 16, 32, 64), optimizer: Literal["replicated", "sharded"] = "replicated",
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of the plan's table: each layout on each number of GPUs, with the share of an update that communication adds.

    update_s: of one update computed by one GPU.
    """
    rows = []
    for gpus in sizes:
        computing = update_s / gpus
        for layout in ("replicated", "node", "world"):
            if layout == "world" and gpus <= GPUS_A_NODE:
                continue  # the same as "node"
            found = traffic(costs, seconds, frozen, device, gpus, layout, optimizer=optimizer)
            rows.append({
                "gpus": gpus, "layout": layout, "gathered_bytes": found.gathered_bytes, "reduced_bytes": found.reduced_bytes,
                "gather_s": found.gather_s, "reduce_s": found.reduce_s, "exposed_s": found.exposed_s, "computing_s": computing,
                "added_share": found.exposed_s / computing, "hidden_share": found.hidden_share,
            })  # fmt: skip
    return rows
