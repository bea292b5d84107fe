"""`data`: what is trained and validated on, and how it is read, packed and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from .values import NonNegative, Positive, RecipePath, Section, resolve_pattern


class ImageData(Section):
    """One captioned data set, in any of the formats of `engine/data/formats.py`."""

    name: str = Field("train", pattern=r"^[A-Za-z0-9_.-]+$")
    captions: Annotated[Path | str, BeforeValidator(resolve_pattern)] = Field(
        description="the caption file; a tar, a folder of tars or a pattern (laion_coco); the alignment folder (minigpt4); the folder of a packed set"
    )
    images: RecipePath | None = Field(
        None,
        description="folder that image names start at; none for tars and packed sets, and for minigpt4's own `image`",
    )
    format: Literal["auto", "coco", "karpathy", "visual_genome", "sbu", "laion_coco", "nocaps", "minigpt4", "pack"] = (
        Field("auto", description="auto: recognised by the file's shape; pack: what vpgtrans pack has written")
    )
    split: Literal["train", "val", "test"] | None = Field(
        None, description="of Karpathy's own file, which holds all three; train includes restval"
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        description="share of pairs when sets are mixed; none: sets are joined and each image comes once an epoch",
    )
    skip: NonNegative = Field(0, description="leave out the first N images")
    limit: Positive | None = Field(None, description="use at most N images after those skipped")
    transform: Literal["train", "eval"] | None = Field(
        None, description="of this set's images; default: data.transform"
    )
    style: Literal["caption", "conversation"] = Field(
        "caption",
        description="caption: [visual][bos][caption][newline]; conversation: [bos]###Human: [visual] instruction ###Assistant: answer###",
    )
    instructions: list[str] | None = Field(
        None,
        min_length=1,
        description="conversation only: one is drawn for each answer; default: requests to describe the image",
    )
    max_text_tokens: Positive | None = Field(
        None,
        description="of this set; default: data.max_text_tokens for captions; for conversations 160, answer and ###, as in the authors' code",
    )

    @model_validator(mode="after")
    def _fits_its_style(self) -> ImageData:
        if self.instructions is not None and self.style != "conversation":
            raise ValueError(f"instructions: expected none for style {self.style}; set style to conversation")
        for index, instruction in enumerate(self.instructions or []):
            if not instruction.strip() or "###" in instruction:
                raise ValueError(
                    f"instructions.{index}: expected some text without '###', which ends a turn, got {instruction!r}"
                )
        return self

    @model_validator(mode="after")
    def _has_images(self) -> ImageData:
        is_json = isinstance(self.captions, Path) and self.captions.name.removesuffix(".gz").endswith(".json")
        own_folder = self.format in ("minigpt4", "laion_coco", "pack") or Path(self.captions).name == "filter_cap.json"
        if self.images is None and is_json and not own_folder:
            raise ValueError(f"images: expected the folder of images that {self.captions} names, got nothing")
        return self


class TransferData(Section):
    train: list[ImageData] = Field(min_length=1)
    val: ImageData
    captions_per_image: Literal["all"] | Positive = "all"
    max_text_tokens: Positive = Field(32, description="BOS included, as in the authors' code")
    row_tokens: Positive = Field(512, description="token budget of one packed row")
    rows_per_micro_batch: Positive = 8
    transform: Literal["train", "eval"] = "train"
    views: Positive = Field(
        1, description="stored augmented views an image when the vision cache is on and transform is 'train'"
    )
    prefetch_batches: NonNegative = Field(
        4,
        description="micro-batches packed and decoded ahead by a thread; 0 for none; what is trained does not depend on it",
    )
    order: Literal["random", "quasi_random", "sequential"] = Field(
        "random",
        description="of the images in an epoch; quasi_random keeps neighbours of a file near each other, for packed sets on slow disks",
    )
    vision_cache: bool = Field(
        False, description="compute the frozen tower once an image (and view) and memory-map its outputs"
    )
    cache_fill: Literal["ahead", "first_epoch"] = Field(
        "ahead", description="of the vision cache: before training, or each row when it is first asked for"
    )
    cache_precision: Literal["compute", "fp8"] = Field(
        "compute",
        description="of what caches hold: compute is exact; fp8 (e4m3, one scale a token) takes half of bfloat16's disk and is not",
    )
    prompt_cache: Literal["auto"] | bool = Field(
        "auto",
        description="keep the outputs of the frozen Q-Former in stages that train the projector alone; auto: where that can be, and a stage would "
        "read at least a tenth of them again",
    )
    verify_images: Literal["none", "header", "full"] = Field(
        "full",
        description="full: decode every image once before training, so that none stops an epoch; header is quicker for large sets",
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="of training JPEGs: exact equals Pillow bit for bit; fast decodes at 1/2, 1/4 or 1/8 where the crop stays at least as "
        "large as the tower's input, and differs visibly where it does; validation images are always decoded exactly",
    )
    bad_images: Literal["fail", "skip"] = Field(
        "fail",
        description="an image that turns out to be unusable in training (damaged since it was checked): fail stops the run with its name; skip "
        "names it once and leaves its captions out of the loss, whose mean is then over the other targets of the update; its pairs count as "
        "dealt; more than 1 % of the images (and 8) stop the run",
    )
    loader: Literal["native", "ffcv"] = Field(
        "native",
        description="of training images: ffcv is FFCV's own Loader over packed sets, where it is installed (extra `ffcv`); it has no bicubic filter "
        "and no seeded crops, so that neither two runs nor a resumed one are exact; see engine/data/ffcv_loader.py",
    )

    @model_validator(mode="after")
    def _ffcv_can(self) -> TransferData:
        if self.loader == "native":
            return self
        for key, native in (("decode", "exact"), ("bad_images", "fail"), ("vision_cache", False)):
            if (value := getattr(self, key)) != native:
                raise ValueError(
                    f"{key}: expected {native!r}, because loader is 'ffcv', which has no such thing, got {value!r}"
                )
        if self.prompt_cache is True:
            raise ValueError("prompt_cache: expected auto or false, because loader is 'ffcv', got True")
        for index, entry in enumerate(self.train):
            if entry.format not in ("auto", "pack"):
                raise ValueError(
                    f"train.{index}.format: expected pack, because loader is 'ffcv', got {entry.format!r}; pack it with `vpgtrans pack`, or set "
                    "loader to native"
                )
        return self
