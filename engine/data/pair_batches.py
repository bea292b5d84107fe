"""Captions for encoder-decoders: encoder `[visual][first words </s>]`, decoder `[start][the rest]`, labels the rest and `</s>`.

In training a caption is split at a random word between none and half of its words, as in the authors' code; in validation all of it is
decoded.  The first words change what the encoder makes of the visual prompt, so captions of one image share its encoding by tower and
Q-Former only.  Shape letters: P pairs, E encoder text tokens, D decoder tokens, N targets.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .images import sample_rng
from .packing import Group, TokenisedCaptions


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch: source (P,) int64 index into `groups`, encoder_ids (P, E) int64 and encoder_mask (P, E) bool (text only),
    decoder_ids (P, D) int64, predict (N,) int64 flat positions of the decoder whose labels are `labels` (N,) int64."""

    groups: list[Group]
    source: Tensor
    encoder_ids: Tensor
    encoder_mask: Tensor
    decoder_ids: Tensor
    predict: Tensor
    labels: Tensor

    @property
    def pair_count(self) -> int:
        return self.source.numel()

    @property
    def target_count(self) -> int:
        return self.labels.numel()

    def without(self, images: Collection[int]) -> PairBatch:
        """As `Batch.without`."""
        usable = torch.tensor([g.image not in images for g in self.groups])
        kept = usable[self.source[self.predict // self.decoder_ids.shape[1]]]
        return replace(self, predict=self.predict[kept], labels=self.labels[kept])

    def to(self, device: torch.device) -> PairBatch:
        names = ("source", "encoder_ids", "encoder_mask", "decoder_ids", "predict", "labels")
        return PairBatch(self.groups, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


def split_caption(
    ids: list[int], word_starts: list[int], rng: np.random.Generator | None
) -> tuple[list[int], list[int]]:
    """(first words, the rest): cut before a random word, at most half of them first; without `rng` everything is the rest."""
    if rng is None or not word_starts:
        return [], ids
    first = int(rng.integers(0, len(word_starts) // 2 + 1))
    cut = word_starts[first] if first else 0
    return ids[:cut], ids[cut:]


def pack_pairs(
    groups: list[Group], data: TokenisedCaptions, queries: int, *, token_budget: int, starts_word: np.ndarray, start: int, eos: int, pad: int,
    split_seed: int | None,
) -> list[PairBatch]:  # fmt: skip
    """Micro-batches of at most `token_budget` padded tokens (visual, encoder and decoder), the pairs of an image side by side.

    starts_word: for each id of the vocabulary, whether it begins a word.  split_seed: seed of the random splits, None for none.
    """
    pairs: list[tuple[int, list[int], list[int]]] = []
    for index, group in enumerate(groups):
        for caption in group.captions:
            ids = data.ids[group.image][caption]
            rng = None if split_seed is None else sample_rng(split_seed, group.epoch, f"split/{group.image}/{caption}")
            starts = [i for i, token in enumerate(ids) if i == 0 or starts_word[token]]
            first, rest = split_caption(ids, starts, rng)
            pairs.append((index, [*first, eos], [*rest, eos]))
    longest = queries + max(len(first) for _, first, _ in pairs) + max(len(rest) for _, _, rest in pairs)
    size = max(1, token_budget // longest)
    return [_build(pairs[at : at + size], groups, start, pad) for at in range(0, len(pairs), size)]


def _build(pairs: list[tuple[int, list[int], list[int]]], groups: list[Group], start: int, pad: int) -> PairBatch:
    used = sorted({index for index, _, _ in pairs})
    place = {group: i for i, group in enumerate(used)}
    encoder = np.full((len(pairs), max(len(first) for _, first, _ in pairs)), pad, np.int64)
    mask = np.zeros(encoder.shape, bool)
    decoder = np.full((len(pairs), max(len(rest) for _, _, rest in pairs)), pad, np.int64)
    predict, labels = [], []
    for row, (_, first, rest) in enumerate(pairs):
        encoder[row, : len(first)], mask[row, : len(first)] = first, True
        decoder[row, 0], decoder[row, 1 : len(rest)] = start, rest[:-1]
        predict.append(row * decoder.shape[1] + np.arange(len(rest)))
        labels.append(rest)
    return PairBatch(
        groups=[groups[g] for g in used],
        source=torch.tensor([place[index] for index, _, _ in pairs]),
        encoder_ids=torch.from_numpy(encoder),
        encoder_mask=torch.from_numpy(mask),
        decoder_ids=torch.from_numpy(decoder),
        predict=torch.from_numpy(np.concatenate(predict)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
    )
