"""The prompt cache of a stage: where a stage trains the projector alone, the outputs of its frozen VPG take the place of features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .data.feature_cache import (
    Identity,
    StoredFeatures,
    StoredPrompts,
    check_space,
    prompt_identity,
    tell_unused,
    vision_identity,
)
from .data.feature_table import disk_free_bytes, present_rows
from .data.features import LiveFeatures
from .data.packing import Subset, UpdateOrder
from .recipe import RecipeError, Stage, TransferRecipe

if TYPE_CHECKING:
    from .prepare import Run

AUTO_SHARE = 0.1  # of a stage's encodings that a cache must spare before `auto` writes one
AUTO_DISK = 0.5  # of what is free; nobody asked for this cache, and checkpoints need room


@contextlib.contextmanager
def stored_prompts(this: Run, stage: Stage, order: UpdateOrder, total_pairs: int) -> Iterator[None]:
    """Inside, `this.features` gives prompts from a cache where the recipe asks for it, or has `auto` and it pays; what is absent is stored."""
    found = _open(this, stage, order, total_pairs)
    if found is None:
        yield
        return
    features, this.features = this.features, found
    try:
        yield
    finally:
        this.features = features
    found.settle()


def spared_share(subsets: Sequence[tuple[Subset, int]], total_pairs: int, views: int) -> float:
    """Share of a stage's encodings of images that a cache with `views` rows an image spares; subsets: with their pairs in an epoch."""
    weight = sum(s.weight for s, _ in subsets)
    read = computed = 0.0
    for subset, epoch_pairs in subsets:
        images, passes = subset.stop - subset.start, total_pairs * subset.weight / weight / epoch_pairs
        read += images * passes
        computed += images * min(passes, views)
    return 1.0 - computed / read


def prompt_cache_rows(recipe: TransferRecipe) -> list[tuple[str, bool | None, bool, str]]:
    """The start-up table's row (saving, on, exact, why); on is None where each stage decides when it begins."""
    setting, faults = recipe.data.prompt_cache, {s.name: recipe.prompt_cache_fault(s) for s in recipe.stages}
    possible = [name for name, fault in faults.items() if fault is None]
    is_exact = recipe.data.cache_precision == "compute" and not (
        recipe.data.vision_cache and recipe.data.transform == "train"
    )
    if setting is False:
        why = "data.prompt_cache is off"
    elif possible:
        why = f"data.prompt_cache is {'auto' if setting == 'auto' else 'on'}: {', '.join(possible)}" + (
            f" where at least {AUTO_SHARE:.0%} of the encodings would be read again" if setting == "auto" else ""
        )
    else:
        why = "; ".join(dict.fromkeys(fault for fault in faults.values() if fault))
    on = None if setting == "auto" and possible else setting is not False and bool(possible)
    return [("prompt cache", on, is_exact, why)]


def _open(this: Run, stage: Stage, order: UpdateOrder, total_pairs: int) -> StoredPrompts | None:
    recipe, log, features = this.recipe, this.log, this.features
    if recipe.data.prompt_cache is False or recipe.prompt_cache_fault(stage):
        return None
    assert isinstance(features, (LiveFeatures, StoredFeatures))
    root = recipe.output.cache or recipe.output.folder.parent / "cache"
    views = features.table.layout.views if isinstance(features, StoredFeatures) else 1
    epochs = [(s, this.data.counts.pairs(s.start, s.stop, order.limit)) for s in order.subsets]
    spared = spared_share(epochs, total_pairs, views)
    is_auto = recipe.data.prompt_cache == "auto"
    if isinstance(features, LiveFeatures) and _is_sharded(features.tower):
        if not is_auto:
            raise RecipeError(
                "data.prompt_cache, distribution.frozen: a sharded tower needs all ranks in each of its passes, which a cache spares some of "
                "them; set data.vision_cache, distribution.frozen=replicated, or data.prompt_cache to auto"
            )
        return None
    # Its key takes a look at every image, so first whether it could be wanted at all.  Rank 0 decides for all: another run may be at it.
    could_pay = spared >= AUTO_SHARE or any(root.glob("prompt-*/complete.json"))
    if is_auto and not this.runtime.gather(could_pay)[0]:
        log.say(f"prompt cache: off in {stage.name}: {_spares_little(spared)}")
        return None
    before = features.identity if isinstance(features, StoredFeatures) else vision_identity(features.as_eval(), 1)
    identity = prompt_identity(before, this.model.vpg, recipe.data.cache_precision)
    folder = identity.folder(root)
    if is_auto and (reason := this.runtime.gather(_auto_reason(identity, folder, spared))[0]):
        log.say(f"prompt cache: off in {stage.name}: {reason}")
        return None
    if not is_auto:
        check_space(identity, folder)
    tell_unused(identity, root, this.log)
    table = identity.open(root)
    log.say(
        f"prompt cache: {table.layout.rows - table.missing():,} of {table.layout.rows:,} rows in {folder} "
        f"({table.layout.bytes / 2**20:,.0f} MiB), the others as they are met; spares {spared:.0%} of this stage's encodings by itself"
    )
    return StoredPrompts(identity, table, features, log, this.model.vpg)


def _auto_reason(identity: Identity, folder: Path, spared: float) -> str | None:
    """Why `auto` keeps no prompts; None where it does."""
    if (folder / "complete.json").is_file():
        return None
    if spared < AUTO_SHARE:
        return _spares_little(spared)
    lacking = identity.layout.bytes - present_rows(folder) * identity.layout.row_bytes
    free = disk_free_bytes(folder)
    if lacking > AUTO_DISK * free:
        return f"{folder} lacks {lacking / 2**30:.1f} GiB, more than {AUTO_DISK:.0%} of the {free / 2**30:.1f} GiB that its disk has free"
    return None


def _spares_little(spared: float) -> str:
    return f"it would spare {spared:.0%} of the encodings, less than {AUTO_SHARE:.0%}"


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in module.modules())
