"""`kind: lm | vision | vpg`: the parts of a vision-language model that are trained beforehand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .data import ImageData
from .models import QFormerConfig, Vision
from .training import Optimizer, RecipeOfAnyKind
from .values import Fraction, NonNegative, Positive, Rate, RecipePath, Section


class TextData(Section):
    """Documents that tell one scene several times: the captions of an image, then questions about it."""

    captions: RecipePath
    questions: RecipePath | None = None
    answers: RecipePath | None = None
    val_images: Positive = Field(200, description="this many images' captions are kept for validation")
    captions_per_document: tuple[Positive, Positive] = (2, 5)
    questions_per_document: tuple[NonNegative, NonNegative] = (0, 0)
    bos_between_captions: Fraction = Field(
        0.5, description="share of captions inside a document that begin with BOS, as after a visual prompt"
    )
    repeat_captions: Fraction = Field(
        0.0, description="chance that the next caption repeats one verbatim: copying is learned from it first"
    )
    max_text_tokens: Positive = 32


class TrainTokenizer(Section):
    min_frequency: Positive = 1
    max_words: Positive = 8192


class PretrainSchedule(Section):
    steps: Positive
    batch: Positive = Field(description="documents (lm) or images (vision, vpg) in one update")
    learning_rate: Rate
    min_learning_rate: float = Field(0.0, ge=0.0)
    warmup_steps: NonNegative = 50
    optimizer: Optimizer = Optimizer(betas=(0.9, 0.98), clip_norm=1.0)
    eval_every_steps: Positive = 200


class LMRecipe(RecipeOfAnyKind):
    kind: Literal["lm"]
    tokenizer: TrainTokenizer | RecipePath
    trim_vocabulary: NonNegative = Field(
        0,
        description="keep only tokens that occur this often in the corpus (0: all); the real ids stay in real_ids.json",
    )
    model: dict[str, Any] = Field(
        description="a transformers config: model_type and its sizes; vocabulary and special ids are filled in"
    )
    data: TextData
    schedule: PretrainSchedule


class PairedData(Section):
    train: list[ImageData] = Field(min_length=1)
    val: ImageData
    max_text_tokens: Positive = 32
    transform: Literal["train", "eval"] = "eval"
    vision_cache: bool = Field(True, description="vpg only: compute the frozen tower once an image")
    views: Positive = 1
    verify_images: Literal["none", "header", "full"] = Field(
        "full",
        description="full: decode every image once before training, so that none stops an epoch; header is quicker for large sets",
    )

    @model_validator(mode="after")
    def _captions_only(self) -> PairedData:
        if any(entry.style != "caption" or entry.transform is not None for entry in (*self.train, self.val)):
            raise ValueError(
                "train, val: expected plain captions and one transform for all, got a style or a transform of one set"
            )
        return self


class VisionRecipe(RecipeOfAnyKind):
    """A small ViT trained by captioning through cross-attention (CapPa, arXiv 2306.07915); the decoder is dropped."""

    kind: Literal["vision"]
    tokenizer: TrainTokenizer | RecipePath
    model: dict[str, Any] = Field(description="sizes of a Blip2VisionConfig")
    decoder_layers: Positive = 2
    data: PairedData
    schedule: PretrainSchedule


class VPGRecipe(RecipeOfAnyKind):
    """BLIP-2's first step: contrastive, matching and captioning losses on the Q-Former over a frozen tower (arXiv 2301.12597)."""

    kind: Literal["vpg"]
    tokenizer: TrainTokenizer | RecipePath
    vision: Vision
    qformer: QFormerConfig
    losses: list[Literal["contrastive", "matching", "captioning"]] = Field(["contrastive", "captioning"])
    projection_size: Positive = 256
    data: PairedData
    schedule: PretrainSchedule
