"""Which pairs a stage is made of, and how many each of its updates takes."""

from __future__ import annotations

from collections.abc import Iterator

from .data.packing import Position, Subset, UpdateOrder
from .prepare import Run
from .recipe import Stage


def update_order(this: Run, stage: Stage) -> UpdateOrder:
    """The order in which `stage` reads its sets, from where the run is."""
    chosen = [this.subsets[name] for name in stage.data or this.subsets]
    subsets = [s for s, _ in chosen]
    if all(weight is None for _, weight in chosen):
        subsets = _contiguous(subsets)
    position = Position(**this.progress.position) if this.progress.position else None
    return UpdateOrder(
        this.data.counts,
        subsets,
        stage.batch_pairs,
        this.recipe.seed,
        this.recipe.data.captions_per_image,
        position,
        this.recipe.data.order,
    )


def stage_pairs(this: Run, stage: Stage) -> int:
    """Length of `stage`, in pairs."""
    return stage.pairs or round(stage.epochs * update_order(this, stage).epoch_pairs)


def _contiguous(subsets: list[Subset]) -> list[Subset]:
    """Neighbouring sets without weights are one set with one order; others are drawn in proportion to their size."""
    merged = [subsets[0]]
    for subset in subsets[1:]:
        if subset.start == merged[-1].stop:
            merged[-1] = Subset(merged[-1].start, subset.stop)
        else:
            merged.append(subset)
    return [Subset(s.start, s.stop, s.stop - s.start) for s in merged]


def update_lengths(done: int, total: int, batch_pairs: int) -> Iterator[int]:
    """Pairs of each update to come; the last is shorter where the stage's length asks for it."""
    while done < total:
        yield min(batch_pairs, total - done)
        done += min(batch_pairs, total - done)


def next_multiple(done: int, every: int | None) -> float:
    """The next multiple of `every` after `done`; never without an `every`."""
    return (done // every + 1) * every if every else float("inf")
