"""From captions to updates to packed rows: `[visual][caption 1][caption 2]...` an image, several images a row, no padding inside.

An update is a fixed number of *pairs*, whatever the rows' token budget.  All captions of an image that fall into one update form a
group, which shares one image encoding and one visual prefix.  Where an update ends inside an image, its other captions are carried over
to the next.  The order depends on (seed, epoch) only, never on the number of ranks, and its position is a few numbers (`Position`).

Conversations (conversation.py) have text before the visual tokens too: their shared prefix is `[lead][visual]`, and the first ids of what
follows are the question, which is no target.  Both styles may meet in one row.

Shape letters: R rows, T tokens of a row, P predicted positions, V visual slots.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.row_packing import pack_rows
from .coco import DataError
from .image_order import ImageOrder, image_order
from .images import sample_rng


class CaptionCounts(ABC):
    """How many captions each image has: `counts[i]`, and pairs of a range of images."""

    @abstractmethod
    def __getitem__(self, image: int) -> int: ...

    @abstractmethod
    def pairs(self, start: int, stop: int, limit: int | None) -> int:
        """Pairs of images `start` to `stop` with at most `limit` captions each."""


class ListedCounts(CaptionCounts):
    def __init__(self, captions_of: Sequence[int]):
        self._captions_of = captions_of

    def __getitem__(self, image: int) -> int:
        return self._captions_of[image]

    def pairs(self, start: int, stop: int, limit: int | None) -> int:
        return sum(min(n, limit or n) for n in self._captions_of[start:stop])


class TokenisedCaptions(Protocol):
    """Captioned images with token ids, in lists (`CaptionData`), memory-mapped (`TokenTable`), or several joined.

    `ids[i][k]` is caption k of image i, framed as the language model packs them; `records[i]` is the image.
    """

    name: str
    records: Sequence
    ids: Sequence[Sequence[Sequence[int]]]

    @property
    def counts(self) -> CaptionCounts: ...

    @property
    def pair_count(self) -> int: ...

    def lead(self, image: int) -> Sequence[int]:
        """Ids before the visual tokens of an image; none for plain captions."""

    def question_tokens(self, image: int, caption: int) -> int:
        """How many of the first ids of a caption are no targets; 0 for plain captions."""


@dataclass(frozen=True)
class CaptionData:
    """Captioned images with token ids: `ids[i][k]` is caption k of image i, framed as the language model packs them.

    Two more for conversations, keyed by image, nothing for plain captions: `leads[i]`, the ids before the visual tokens of image i, and
    `unsupervised[i][k]`, how many of the first ids of caption k are no targets.
    """

    name: str
    records: Sequence
    ids: list[list[list[int]]]
    leads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    unsupervised: dict[int, list[int]] = field(default_factory=dict)

    @property
    def counts(self) -> CaptionCounts:
        return ListedCounts([len(captions) for captions in self.ids])

    @property
    def pair_count(self) -> int:
        return sum(len(captions) for captions in self.ids)

    def lead(self, image: int) -> tuple[int, ...]:
        """Ids before the visual tokens of an image; none for plain captions."""
        return self.leads.get(image, ())

    def question_tokens(self, image: int, caption: int) -> int:
        """How many of the first ids of a caption are no targets; 0 for plain captions."""
        counts = self.unsupervised.get(image)
        return counts[caption] if counts else 0


def join(sets: Sequence[TokenisedCaptions]) -> TokenisedCaptions:
    """Several sets as one, in order; nothing is copied, and plain captions and conversations may be mixed."""
    return sets[0] if len(sets) == 1 else JoinedCaptions(sets)


class JoinedCaptions(CaptionCounts):
    """Sets side by side: image i of the whole is image i - start of the set that it falls into."""

    def __init__(self, sets: Sequence[TokenisedCaptions]):
        self.sets = sets
        self.name = "+".join(s.name for s in sets)
        self.records = _Chained([s.records for s in sets])
        self.ids = _Chained([s.ids for s in sets])
        self._counts = [s.counts for s in sets]

    def __getitem__(self, image: int) -> int:
        part, at = self.ids.place(image)
        return self._counts[part][at]

    @property
    def counts(self) -> CaptionCounts:
        return self

    @property
    def pair_count(self) -> int:
        return sum(s.pair_count for s in self.sets)

    def pairs(self, start: int, stop: int, limit: int | None) -> int:
        total = 0
        for part, first, end in zip(self._counts, self.ids.starts, self.ids.starts[1:], strict=False):
            if max(start, first) < min(stop, end):
                total += part.pairs(max(start, first) - first, min(stop, end) - first, limit)
        return total

    def lead(self, image: int) -> Sequence[int]:
        part, at = self.ids.place(image)
        return self.sets[part].lead(at)

    def question_tokens(self, image: int, caption: int) -> int:
        part, at = self.ids.place(image)
        return self.sets[part].question_tokens(at, caption)


class _Chained(Sequence):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts = parts
        self.starts = np.cumsum([0, *(len(p) for p in parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, at: int) -> tuple[int, int]:
        """(part, place in it)."""
        if not 0 <= at < len(self):
            raise IndexError(f"image: expected 0 to {len(self) - 1:,}, got {at}")
        part = bisect_right(self.starts, at) - 1
        return part, at - self.starts[part]

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        part, place = self.place(at)
        return self.parts[part][place]


@dataclass(frozen=True)
class Group:
    """Captions of one image that share its encoding in one update."""

    image: int
    epoch: int
    captions: tuple[int, ...]


@dataclass(frozen=True)
class Subset:
    """Images `start` to `stop` of the data, which deal out a share `weight` of the pairs."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass
class Position:
    """Where an order stands: for each subset its epoch and cursor; how many choices of a subset were made; and, where the last update ended
    inside an image, how many of that image's captions it used and from which subset."""

    epochs: list[int]
    cursors: list[int]
    draws: int = 0
    carried: int = 0
    carrying: int = 0


class UpdateOrder:
    """Deals out updates of exactly `batch_pairs` pairs, epoch after epoch, from an order of the images of each subset (`image_order`).

    captions_of: captions of each image.  captions_per_image: "all", or at most k captions of an image and epoch, drawn anew each epoch.
    """

    def __init__(
        self, captions_of: Sequence[int] | CaptionCounts, subsets: Sequence[Subset], batch_pairs: int, seed: int,
        captions_per_image: str | int = "all", position: Position | None = None, order: ImageOrder = "random",
    ):  # fmt: skip
        if not subsets or any(s.stop <= s.start for s in subsets):
            raise DataError("data.train: expected at least one captioned image in each set, got none")
        self.captions_of = captions_of if isinstance(captions_of, CaptionCounts) else ListedCounts(captions_of)
        self.subsets = list(subsets)
        self.batch_pairs = batch_pairs
        self.seed = seed
        self.limit = None if captions_per_image == "all" else int(captions_per_image)
        self.position = copy.deepcopy(position) if position else Position([0] * len(subsets), [0] * len(subsets))
        # A subset is drawn an image at a time, so its chance is its share of pairs over its captions an image.
        chances = np.array([s.weight / (self._pairs(s) / (s.stop - s.start)) for s in subsets])
        self._bounds = np.cumsum(chances / chances.sum())
        self._kind: ImageOrder = order
        self._orders: dict[int, tuple[int, Sequence[int] | np.ndarray]] = {}

    @property
    def epoch_pairs(self) -> int:
        """Pairs in one pass over all subsets."""
        return sum(self._pairs(s) for s in self.subsets)

    def next_update(self, pairs: int | None = None) -> list[Group]:
        """The groups of the next update; `pairs` replaces `batch_pairs` for a shorter last one."""
        wanted = pairs or self.batch_pairs
        groups: list[Group] = []
        at = self.position
        while wanted:
            subset = at.carrying if at.carried else self._draw()
            epoch, cursor = at.epochs[subset], at.cursors[subset]
            image = self.subsets[subset].start + int(self._order(subset, epoch)[cursor])
            captions = self._captions(image, epoch)[at.carried :]
            taken = captions[:wanted]
            groups.append(Group(image, epoch, tuple(taken)))
            wanted -= len(taken)
            if len(taken) < len(captions):
                at.carried, at.carrying = at.carried + len(taken), subset
                continue
            at.carried = 0
            last = cursor + 1 == self.subsets[subset].stop - self.subsets[subset].start
            at.epochs[subset], at.cursors[subset] = (epoch + 1, 0) if last else (epoch, cursor + 1)
        return groups

    def _draw(self) -> int:
        if len(self.subsets) == 1:
            return 0
        number = sample_rng(self.seed, self.position.draws, "subset").random()
        self.position.draws += 1
        return min(int(np.searchsorted(self._bounds, number, side="right")), len(self.subsets) - 1)

    def _pairs(self, subset: Subset) -> int:
        return self.captions_of.pairs(subset.start, subset.stop, self.limit)

    def _order(self, subset: int, epoch: int) -> Sequence[int] | np.ndarray:
        if self._orders.get(subset, (-1,))[0] != epoch:
            size = self.subsets[subset].stop - self.subsets[subset].start
            self._orders[subset] = epoch, image_order(self._kind, size, sample_rng(self.seed, epoch, f"order/{subset}"))
        return self._orders[subset][1]

    def _captions(self, image: int, epoch: int) -> list[int]:
        count = self.captions_of[image]
        if self.limit is None or count <= self.limit:
            return list(range(count))
        chosen = sample_rng(self.seed, epoch, f"captions/{image}").choice(count, self.limit, replace=False)
        return sorted(int(c) for c in chosen)


class Batch(Protocol):
    """What the loop asks of a micro-batch, whatever the family."""

    groups: list[Group]

    @property
    def pair_count(self) -> int: ...

    @property
    def target_count(self) -> int: ...

    def without(self, images: Collection[int]) -> Batch:
        """The same batch without the targets of some images; what is computed for them otherwise touches nothing else."""

    def to(self, device: torch.device) -> Batch: ...


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch.  `images` lists the groups whose encodings it needs; everything else indexes into the flattened rows.

    ids (R, T) int64, positions (R, T) int64, segments (R, T, 4) int32 (what each token sees, kernels/prefix_attention.py), visual_slots (V,)
    and visual_source (V,) int64 (flat slot, flat row of the prompts (groups x queries)), predict (P,) int64 flat positions whose next token
    is `labels` (P,) int64.  segments_on_cpu: `segments` as they were packed, once the batch is elsewhere.
    """

    groups: list[Group]
    ids: Tensor
    positions: Tensor
    segments: Tensor
    visual_slots: Tensor
    visual_source: Tensor
    predict: Tensor
    labels: Tensor
    segments_on_cpu: Tensor | None = None

    @property
    def pair_count(self) -> int:
        return sum(len(g.captions) for g in self.groups)

    @property
    def target_count(self) -> int:
        return self.labels.numel()

    def without(self, images: Collection[int]) -> PackedBatch:
        queries = (int(self.visual_source.max()) + 1) // len(self.groups)
        # Targets begin at a prefix's last visual slot: the last slot up to a target is of its own group.
        slot = torch.searchsorted(self.visual_slots, self.predict, right=True) - 1
        kept = torch.tensor([g.image not in images for g in self.groups])[self.visual_source[slot] // queries]
        return replace(self, predict=self.predict[kept], labels=self.labels[kept])

    def to(self, device: torch.device) -> PackedBatch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids", "positions", "segments", "visual_slots", "visual_source", "predict", "labels")
        }
        on_cpu = self.segments if self.segments_on_cpu is None else self.segments_on_cpu
        return PackedBatch(self.groups, **moved, segments_on_cpu=on_cpu)


@dataclass(frozen=True)
class _Segment:
    """A prefix (lead and visual tokens) and the captions that follow it in one row; a group that does not fit in one row becomes several."""

    group: int
    captions: tuple[int, ...]
    length: int


def pack_update(
    groups: list[Group],
    data: TokenisedCaptions,
    queries: int,
    row_tokens: int,
    rows_per_batch: int,
    pad: int,
    fixed_shape: bool = False,
) -> list[PackedBatch]:
    """Best-fit the groups of an update into rows of `row_tokens`, and the rows into micro-batches of `rows_per_batch`.

    fixed_shape: every row has `row_tokens` slots (for captured graphs); otherwise rows are as long as the longest of their micro-batch.
    Raises DataError when a visual prefix and one caption do not fit in a row.
    """
    segments = [s for index, group in enumerate(groups) for s in _segments(index, group, data, queries, row_tokens)]
    row_of = pack_rows(np.array([s.length for s in segments]), row_tokens)
    rows: list[list[_Segment]] = [[] for _ in range(int(row_of.max()) + 1)]
    for segment, row in zip(segments, row_of, strict=True):
        rows[int(row)].append(segment)
    batches = []
    for at in range(0, len(rows), rows_per_batch):
        chosen = rows[at : at + rows_per_batch]
        batches.append(_build(chosen, groups, data, queries, row_tokens if fixed_shape else None, pad))
    return batches


def _segments(index: int, group: Group, data: TokenisedCaptions, queries: int, row_tokens: int) -> list[_Segment]:
    segments: list[_Segment] = []
    captions: list[int] = []
    lead = len(data.lead(group.image))
    prefix = lead + queries
    length = prefix
    for caption in group.captions:
        tokens = len(data.ids[group.image][caption])
        if prefix + tokens > row_tokens:
            before = f"{lead} tokens before the image, " if lead else ""
            raise DataError(
                f"data.row_tokens: expected at least {prefix + tokens} ({before}{queries} visual tokens and a caption of {tokens}), got {row_tokens}"
            )
        if length + tokens > row_tokens:
            segments.append(_Segment(index, tuple(captions), length))
            captions, length = [], prefix
        captions.append(caption)
        length += tokens
    return [*segments, _Segment(index, tuple(captions), length)]


def _build(
    rows: list[list[_Segment]], groups: list[Group], data: TokenisedCaptions, queries: int, width: int | None, pad: int
) -> PackedBatch:
    width = width or max(sum(s.length for s in row) for row in rows)
    used = sorted({s.group for row in rows for s in row})
    place = {group: index for index, group in enumerate(used)}
    ids = np.full((len(rows), width), pad, np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    visible = np.zeros((len(rows), width, 4), np.int32)
    slots, sources, predict, labels = [], [], [], []
    for row, segments in enumerate(rows):
        at = 0
        for segment in segments:
            group = groups[segment.group]
            lead = data.lead(group.image)
            base, visual = row * width, at + len(lead)
            start = visual + queries
            ids[row, at:visual] = lead
            slots.append(base + np.arange(visual, start))
            sources.append(place[segment.group] * queries + np.arange(queries))
            prefix, stop = start - at, at + segment.length
            visible[row, at:start] = at, start, start, stop
            positions[row, at:start] = np.arange(prefix)
            last_visual = base + start - 1
            for caption in segment.captions:
                tokens = data.ids[group.image][caption]
                end = start + len(tokens)
                ids[row, start:end] = tokens
                positions[row, start:end] = prefix + np.arange(len(tokens))
                visible[row, start:end] = at, visual + queries, start, end
                # The last visual position predicts BOS, once for each caption; a caption's last token predicts nothing.
                first = data.question_tokens(group.image, caption)
                predict.append(np.concatenate([[last_visual], base + np.arange(start, end - 1)])[first:])
                labels.append(tokens[first:])
                start = end
            at = stop
        visible[row, at:] = at, width, width, width  # padding sees padding: a row of the softmax may not be empty
    return PackedBatch(
        groups=[groups[g] for g in used],
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(visible),
        visual_slots=torch.from_numpy(np.concatenate(slots)),
        visual_source=torch.from_numpy(np.concatenate(sources)),
        predict=torch.from_numpy(np.concatenate(predict)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
    )
