"""Frozen blocks in pieces over the ranks: each block is gathered ahead of its use, freed after it, and gathered again for its backward pass.

torch's `fully_shard` does the gathering, on a stream of its own.  A block is sharded in the dtype that it computes in, and, as it is frozen,
nothing is ever reduced.  Blocks are the members of a model's module lists; what stands outside them stays whole on each rank: the word embedding
and the head, which losses and generation read on their own, patch embeddings and last norms.

B bytes of blocks on N ranks: B / N kept; a rank receives (N - 1) / N x B at each pass, of which a micro-batch has two (the tower one: it has no
backward pass); 1 + `prefetch_blocks` blocks are whole at a time.  FP8 linears (kernels/quantise_frozen.py) are quantised before they are cut, and
keep one copy for both directions in place of two, so that B is about half of bfloat16's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from ...kernels.quantise_frozen import QuantiseError
from ..kernel_choice import quantise_, uses_fp8
from ..recipe import Distribution, RecipeError, TransferRecipe
from ..runlog import RunLog
from ..runtime import Runtime

if TYPE_CHECKING:
    from ..models.llm import LanguageModel
    from ..models.tower import VisionTower
    from ..models.vlm import VisionLanguageModel

MIB = 2**20


@dataclass(frozen=True)
class Shards:
    """What was sharded of one model: its runs of blocks, over how many ranks, bytes of the blocks in all and on this rank, and bytes left whole."""

    runs: list[list[nn.Module]]
    ranks: int
    block_bytes: int
    own_bytes: int
    whole_bytes: int


def check_layout(settings: Distribution, runtime: Runtime) -> int:
    """Ranks that share one copy of the frozen blocks: all, or those of a node.

    Raises RecipeError on all ranks, and before anything is loaded, where the ranks do not divide into nodes of one size.
    """
    if settings.shard_over == "world" or runtime.world_size == 1:
        return runtime.world_size
    found = runtime.gather(os.environ.get("LOCAL_WORLD_SIZE"))
    absent = [rank for rank, size in enumerate(found) if size is None]
    if absent:
        raise _said_once(
            runtime,
            f"distribution.shard_over: 'node' needs the environment variable LOCAL_WORLD_SIZE, which ranks {absent} lack; start with torchrun, or "
            "set shard_over to world",
        )
    sizes = sorted({int(size) for size in found})
    if len(sizes) > 1 or runtime.world_size % sizes[0]:
        shown = " and ".join(map(str, sizes))
        raise _said_once(
            runtime,
            f"distribution.shard_over: 'node' needs nodes with equally many ranks, got a world of {runtime.world_size} ranks and nodes of {shown}; "
            f"start as many processes on each node, or set shard_over to world",
        )
    return sizes[0]


def _said_once(runtime: Runtime, message: str) -> RecipeError:
    """An error that all ranks raise and rank 0 tells."""
    error = RecipeError(message)
    error.quiet = not runtime.is_main
    return error


def place(
    model: VisionLanguageModel, tower: VisionTower, recipe: TransferRecipe, runtime: Runtime, log: RunLog
) -> dict[str, Shards]:
    """Move models from the CPU to where they run, their frozen blocks sharded where the recipe asks for it or they would not fit.

    Returns what was sharded, nothing where each rank has everything.  A tower whose outputs are cached is needed by one process at a time, and
    stays whole.  Raises RecipeError where the world does not fit the layout, or nothing can be sharded.
    """
    settings = recipe.distribution
    ranks = check_layout(settings, runtime)
    reason = _reason(recipe, runtime)
    found: dict[str, Shards] = {}
    if reason is not None:
        mesh = shard_mesh(runtime, ranks)
        parts: dict[str, nn.Module] = {"language model": model.llm.model}
        if not recipe.data.vision_cache:
            parts["tower"] = tower.module.to(runtime.compute_dtype)
        fp8 = uses_fp8(recipe.kernels, runtime.device)
        for name, part in parts.items():
            if runs := runs_of_blocks(part):
                if fp8:
                    _quantise(name, model.llm, tower, recipe, runtime, log)
                found[name] = shard_blocks(part, runs, mesh, runtime, settings)
        _check_sharded(found, model.llm, recipe)
        model.llm.is_sharded = "language model" in found
        log.say(f"frozen blocks are sharded over {ranks} ranks: {reason}")
        for name, shards in found.items():
            of_ranks = runtime.gather(shards.own_bytes)
            log.say(
                f"{name}: {sum(map(len, shards.runs))} blocks, at most {max(of_ranks) / MIB:,.1f} of {shards.block_bytes / MIB:,.1f} MiB on a rank, "
                f"{shards.whole_bytes / MIB:,.1f} MiB beside them whole"
            )
            log.event(
                "sharded",
                part=name,
                ranks=ranks,
                block_bytes=shards.block_bytes,
                rank_bytes=of_ranks,
                whole_bytes=shards.whole_bytes,
            )
    for module, dtype in ((model, None), (tower, runtime.compute_dtype)):
        move_unsharded(module, runtime.device, dtype)
    return found


def _quantise(
    part: str, llm: LanguageModel, tower: VisionTower, recipe: TransferRecipe, runtime: Runtime, log: RunLog
) -> None:
    try:
        quantise_(part, llm, tower, runtime.device, log, copies=1)
    except QuantiseError as error:
        if recipe.kernels.frozen_linear == "kernel":
            raise RecipeError(f"kernels.frozen_linear: expected auto or torch here, got kernel: {error}") from error


def _check_sharded(found: dict[str, Shards], llm: LanguageModel, recipe: TransferRecipe) -> None:
    if "language model" not in found:
        raise RecipeError(
            f"distribution.frozen: expected a language model with lists of blocks to shard, found none in {llm.path!r}; set it to replicated"
        )
    if getattr(llm.model.config, "layerdrop", 0.0) and any(stage.frozen_dropout for stage in recipe.stages):
        raise RecipeError(
            f"distribution.frozen, stages.frozen_dropout: {llm.path!r} leaves out random blocks (layerdrop), others on each rank, which sharded "
            "blocks cannot; set frozen_dropout to false, or frozen to replicated"
        )


def _reason(recipe: TransferRecipe, runtime: Runtime) -> str | None:
    """Why blocks are sharded; None where they are not.  The same on all ranks."""
    frozen = recipe.distribution.frozen
    if frozen == "replicated" or runtime.world_size == 1:
        return None
    if frozen == "sharded":
        return "distribution.frozen is sharded"
    if runtime.device.type == "cpu":
        return None
    return runtime.gather(_does_not_fit(recipe, runtime) if runtime.is_main else None)[0]


def _does_not_fit(recipe: TransferRecipe, runtime: Runtime) -> str | None:
    from ..dry_run import GIB, make_plan
    from ..planning.devices import RESERVED_BYTES

    room = torch.cuda.get_device_properties(runtime.device).total_memory - RESERVED_BYTES
    wanted = max(sum(stage.memory.values()) for stage in make_plan(recipe).stages)
    if wanted <= room:
        return None
    return f"whole on each GPU everything takes {wanted / GIB:.1f} GiB, and {room / GIB:.1f} GiB are there"


def shard_mesh(runtime: Runtime, ranks: int) -> DeviceMesh:
    """The ranks that hold one copy between them: neighbours, which torchrun puts on one node."""
    nodes = init_device_mesh(
        runtime.device.type, (runtime.world_size // ranks, ranks), mesh_dim_names=("node", "shard")
    )
    return nodes["shard"]


def runs_of_blocks(module: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a model, run by run in order: members of each outermost module list whose members are of one class and hold parameters."""
    if isinstance(module, nn.ModuleList):
        members = list(module)
        is_run = len({type(m) for m in members}) == 1 and all(any(True for _ in m.parameters()) for m in members)
        if is_run:
            return [members]
    return [run for child in module.children() for run in runs_of_blocks(child)]


class _Root(nn.Module):
    """Holds blocks so that torch sees one model with one stream of gathers, whichever of them is called first."""

    def __init__(self, runs: list[list[nn.Module]]):
        super().__init__()
        self.runs = nn.ModuleList(nn.ModuleList(run) for run in runs)

    def forward(self) -> None:
        """Nothing: blocks are called where the model calls them."""


def shard_blocks(
    module: nn.Module, runs: list[list[nn.Module]], mesh: DeviceMesh, runtime: Runtime, settings: Distribution
) -> Shards:
    """Shard the blocks of `module` over `mesh`, in place; they come from the CPU or any device, one at a time.  All parameters must be frozen."""
    training = [name for name, p in module.named_parameters() if p.requires_grad]
    assert not training, f"expected frozen parameters, {training[:3]} train"
    is_gpu = runtime.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=is_gpu) if settings.cpu_offload else OffloadPolicy()
    whole = sum(_bytes(p) for p in module.parameters())
    blocks = [block for run in runs for block in run]
    block_bytes = sum(_bytes(p) for block in blocks for p in block.parameters())
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=offload)
    root = fully_shard(_Root(runs), mesh=mesh)
    root()  # the first call decides what belongs together
    for run in runs:
        for at, block in enumerate(run):
            block.set_modules_to_forward_prefetch(run[at + 1 : at + 1 + settings.prefetch_blocks])
            # Never an empty list: FSDP would guess from the forward passes since the last backward, evaluation's among them.
            block.set_modules_to_backward_prefetch(run[max(0, at - settings.prefetch_blocks) : at][::-1] or [block])
    own = sum(p.to_local().untyped_storage().nbytes() for block in blocks for p in block.parameters())
    return Shards(runs, mesh.size(), block_bytes, own, whole - block_bytes)


def move_unsharded(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """`module.to(device, dtype)` but for sharded blocks, which are where they belong (on the CPU, where they are offloaded)."""
    for part in _outside_of_blocks(module):
        part._apply(lambda t: t.to(device, dtype if t.is_floating_point() else None), recurse=False)


def _outside_of_blocks(module: nn.Module) -> Iterator[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return
    yield module
    for child in module.children():
        yield from _outside_of_blocks(child)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
