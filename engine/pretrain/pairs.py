"""Captioned images for the image-text pre-trainings (`vision`, `vpg`): read, tokenised, and drawn one caption an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.coco import read_image_data
from ..data.packing import CaptionData, join
from ..models.llm import SpecialTokens, special_tokens
from ..recipe import PairedData, TrainTokenizer, VisionRecipe, VPGRecipe
from .tokenizer import train_word_level
from .vocabulary import load_tokenizer


@dataclass(frozen=True)
class Pairs:
    """Training and validation images with token ids (BOS and newline included)."""

    train: CaptionData
    val: CaptionData
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens


def load_pairs(recipe: VisionRecipe | VPGRecipe) -> Pairs:
    """Read the files of a recipe and tokenise them, training the tokenizer on the training captions where asked."""
    data: PairedData = recipe.data
    sets = [read_image_data(entry, data.verify_images) for entry in data.train]
    val = read_image_data(data.val, data.verify_images, f"{data.val.name}-val")
    if isinstance(recipe.tokenizer, TrainTokenizer):
        texts = [c for s in sets for r in s.records for c in r.captions]
        tokenizer = train_word_level(texts, recipe.tokenizer.min_frequency, recipe.tokenizer.max_words)
    else:
        tokenizer = load_tokenizer(recipe.tokenizer)
    special = special_tokens(tokenizer)

    tokenised = []
    for part in (*sets, val):
        texts = iter(tokenizer([c for r in part.records for c in r.captions], add_special_tokens=False)["input_ids"])
        framed = [
            [[special.bos, *next(texts)[: data.max_text_tokens - 1], special.newline] for _ in r.captions]
            for r in part.records
        ]
        tokenised.append(CaptionData(part.name, part.records, framed))
    return Pairs(join(tokenised[:-1]), tokenised[-1], tokenizer, special)


def draw(data: CaptionData, rng: np.random.Generator, count: int) -> tuple[list[int], list[list[int]]]:
    """`count` different images and one caption's ids of each."""
    images = [int(i) for i in rng.choice(len(data.ids), min(count, len(data.ids)), replace=False)]
    return images, [data.ids[i][int(rng.integers(len(data.ids[i])))] for i in images]


def pad_ids(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged ids -> (rows, longest) int64 and their mask (rows, longest) bool, on `device`."""
    longest = max(len(r) for r in rows)
    table = np.full((len(rows), longest), pad, np.int64)
    for row, values in enumerate(rows):
        table[row, : len(values)] = values
    lengths = torch.tensor([len(r) for r in rows])
    return torch.from_numpy(table).to(device), (torch.arange(longest)[None] < lengths[:, None]).to(device)
