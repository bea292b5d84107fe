"""What a stage packs: one update's images, rows, tokens and targets, found by dealing out and packing captions of the right lengths.

The engine's own order and packing run on captions without words.  Lengths come from the data where they are on this machine, else from
`ASSUMED`, which the plan names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.coco import read_image_data
from ..data.conversation import MAX_ANSWER_TOKENS
from ..data.packed import is_pack
from ..data.packing import Batch, CaptionData, PackedBatch, Subset, UpdateOrder, pack_update
from ..data.pair_batches import pack_pairs
from ..recipe import ImageData, Stage, TransferRecipe

CAPTION_TOKENS = 13  # of a COCO caption, BOS and newline counted
CAPTION_SPREAD = 2.5  # standard deviation
LEAD_TOKENS, QUESTION_TOKENS = 6, 16  # of a conversation, before and after the visual tokens
EMPTY = -1  # id of a slot without a token
SAMPLE_IMAGES = 1000  # of a file whose captions are tokenised
SIMULATED_PAIRS = 1728  # at least; more updates where one is smaller


@dataclass(frozen=True)
class SetShape:
    """Images of a data set and how many captions of how many tokens they have; images is None where nobody knows."""

    name: str
    images: int | None
    captions_per_image: float
    caption_tokens: float
    spread_tokens: float
    origin: str
    lead_tokens: int = 0
    question_tokens: int = 0
    image_bytes: float | None = None

    @property
    def pairs(self) -> float | None:
        return None if self.images is None else self.images * self.captions_per_image


# (images, captions an image): Karpathy's train split and its 566,747 captions, and as arXiv 2305.01278 and its code count the others.
ASSUMED: dict[str, tuple[int | None, float]] = {
    "karpathy": (113_287, 5.0), "coco": (None, 5.0), "visual_genome": (100_000, 7.69), "sbu": (860_000, 1.0), "laion_coco": (None, 1.0),
    "minigpt4": (3_439, 1.0), "nocaps": (None, 10.0),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Averages of one update.  images: groups dealt out; encodings: images encoded, again in each micro-batch that one falls into;
    tokens: slots computed, of which `used_tokens` hold something; longest: tokens of the longest of 36 captions; batch: a typical micro-batch."""

    pairs: int
    images: float
    encodings: float
    rows: float
    tokens: float
    used_tokens: float
    targets: float
    micro_batches: float
    longest: float
    batch: Batch

    @property
    def batch_tokens(self) -> int:
        return _slots(self.batch)[0]


def _slots(batch: Batch) -> tuple[int, int]:
    """Text slots that a micro-batch computes, visual ones too where rows are packed, and how many of them hold something."""
    if isinstance(batch, PackedBatch):
        return batch.ids.numel(), int((batch.ids != EMPTY).sum()) + batch.visual_slots.numel()
    return batch.encoder_ids.numel() + batch.decoder_ids.numel(), int(batch.encoder_mask.sum()) + batch.target_count


def set_shape(entry: ImageData, recipe: TransferRecipe, tokenizer: PreTrainedTokenizerBase | None) -> SetShape:
    """The shape of a data set: counted where its captions are on this machine as a file, assumed otherwise."""
    talks = entry.style == "conversation"
    limit = entry.max_text_tokens or (MAX_ANSWER_TOKENS if talks else recipe.data.max_text_tokens)
    lead, question = (LEAD_TOKENS, QUESTION_TOKENS) if talks else (0, 0)
    path = Path(entry.captions)
    if (path.is_file() and path.suffix != ".tar") or is_pack(path):
        records = read_image_data(entry, "none").records
        sample = records[:: max(1, len(records) // SAMPLE_IMAGES)]
        lengths = _lengths([c for r in sample for c in r.captions], tokenizer, limit)
        sizes = [Path(str(r.path)).stat().st_size for r in sample if Path(str(r.path)).is_file()]
        return SetShape(
            entry.name, len(records), sum(len(r.captions) for r in records) / len(records), float(np.mean(lengths)) + question,
            float(np.std(lengths)), "counted in its files", lead, question, float(np.mean(sizes)) if sizes else None,
        )  # fmt: skip
    images, captions = ASSUMED.get(entry.format, (None, 1.0))
    images = min(entry.limit, images or entry.limit) if entry.limit else images
    tokens = limit + question if talks else min(CAPTION_TOKENS, limit)
    return SetShape(
        entry.name,
        images,
        captions,
        tokens,
        0.0 if talks else CAPTION_SPREAD,
        f"assumed of the format {entry.format}",
        lead,
        question,
    )


def local_tokenizer(recipe: TransferRecipe) -> PreTrainedTokenizerBase | None:
    """The target's, where it is on this machine; never asks the network."""
    try:
        return AutoTokenizer.from_pretrained(recipe.target.llm, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def _lengths(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, limit: int) -> list[int]:
    """With BOS and newline; without a tokenizer a token a word, and a fifth more."""
    if tokenizer is None:
        return [min(limit, round(1.2 * len(c.split())) + 2) for c in captions]
    return [min(limit, len(ids) + 2) for ids in tokenizer(list(captions), add_special_tokens=False)["input_ids"]]


def simulate(
    recipe: TransferRecipe, stage: Stage, shapes: dict[str, SetShape], queries: int, vocabulary: int, *, is_encoder_decoder: bool, on_gpu: bool
) -> Workload:  # fmt: skip
    """Deal out and pack updates of a stage; shapes by name of the set, queries: visual tokens an image.

    Raises DataError when a caption does not fit into a row.
    """
    data, subsets = _synthetic(recipe, stage, shapes, vocabulary)
    order = UpdateOrder(data.counts, subsets, stage.batch_pairs, recipe.seed, recipe.data.captions_per_image)
    updates = min(64, -(-SIMULATED_PAIRS // stage.batch_pairs))
    pairs = images = encodings = rows = tokens = used = targets = 0
    batches: list[Batch] = []
    for _ in range(updates):
        groups = order.next_update()
        if is_encoder_decoder:
            packed: Sequence[Batch] = pack_pairs(
                groups, data, queries, token_budget=recipe.data.row_tokens * recipe.data.rows_per_micro_batch,
                starts_word=np.ones(vocabulary, bool), start=0, eos=1, pad=0, split_seed=recipe.seed,
            )  # fmt: skip
        else:
            packed = pack_update(
                groups,
                data,
                queries,
                recipe.data.row_tokens,
                recipe.data.rows_per_micro_batch,
                EMPTY,
                fixed_shape=on_gpu,
            )
        images += len(groups)
        for batch in packed:
            pairs += batch.pair_count
            encodings += len(batch.groups)
            targets += batch.target_count
            rows += len(batch.ids if isinstance(batch, PackedBatch) else batch.encoder_ids)
            slots, filled = _slots(batch)
            tokens, used = tokens + slots, used + filled
        batches += packed
    mean = tokens / len(batches)
    typical = min(batches, key=lambda b: (abs(_slots(b)[0] - mean), -b.pair_count))
    per = 1.0 / updates
    lengths = [len(caption) for captions in data.ids for caption in captions]
    longest = float(np.mean([max(lengths[at : at + 36]) for at in range(0, len(lengths), 36)]))
    return Workload(
        round(pairs * per), images * per, encodings * per, rows * per, tokens * per, used * per, targets * per, len(batches) * per, longest,
        typical,
    )  # fmt: skip


def _synthetic(
    recipe: TransferRecipe, stage: Stage, shapes: dict[str, SetShape], vocabulary: int
) -> tuple[CaptionData, list[Subset]]:
    """Captions of random lengths about the mean of their set, as many images as the simulation can use up."""
    rng = np.random.default_rng(recipe.seed)
    chosen = [e for e in recipe.data.train if e.name in (stage.data or [e.name])]
    wanted = 2 * max(SIMULATED_PAIRS, stage.batch_pairs)
    known = [shapes[e.name].pairs or wanted for e in chosen]
    ids: list[list[list[int]]] = []
    leads, unsupervised, subsets = {}, {}, []
    for entry, pairs in zip(chosen, known, strict=True):
        shape, start = shapes[entry.name], len(ids)
        for _ in range(max(1, round(wanted / shape.captions_per_image))):
            count = int(shape.captions_per_image) + int(rng.random() < shape.captions_per_image % 1)
            longest = shape.question_tokens + (entry.max_text_tokens or max(recipe.data.max_text_tokens, 1))
            drawn = np.rint(rng.normal(shape.caption_tokens, shape.spread_tokens, max(1, count)))
            if shape.lead_tokens:
                leads[len(ids)] = (1,) * shape.lead_tokens
                unsupervised[len(ids)] = [shape.question_tokens] * max(1, count)
                longest = int(shape.caption_tokens)
            lengths = np.clip(drawn, shape.question_tokens + 2, longest).astype(int)
            ids.append([[min(2, vocabulary - 1)] * int(n) for n in lengths])
        subsets.append(Subset(start, len(ids), entry.weight or pairs))
    return CaptionData("simulated", range(len(ids)), ids, leads, unsupervised), subsets
