"""`vpgtrans caption MODEL IMAGE...`: captions or answers for image files, by a run, an export or any Hugging Face BLIP-2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .data.images import ImageRefused, check_image
from .data.reading import DataError
from .models.llm import ModelError
from .models.opening import Opened, open_model
from .recipe import Generation

DEFAULT_SHORTEST = Generation().min_new_tokens
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def main(options: argparse.Namespace) -> int:
    """Caption, print a line an image or one JSON object; returns 0, or 1 when some images were refused (named on stderr).

    DataError, before anything is loaded, where nothing can be captioned.
    """
    images, refused = find_images(options.images)
    for refusal in refused:
        print(f"refused: {refusal}", file=sys.stderr)
    if not images:
        raise DataError(f"images: expected at least one that can be read, all {len(refused)} were refused")
    settings = generation_of(options)
    opened = open_model(options.model, *placement(options.device, options.precision))
    results = list(captions(opened, images, settings, options.prompt, options.batch_images))
    if options.json:
        shown = {
            "model": str(options.model),
            "prompt": options.prompt,
            "generation": settings.model_dump(),
            "captions": results,
        }
        print(json.dumps(shown, indent=1))
    else:
        for result in results:
            print(f"{result['image']}: {result['caption']}")
    return 1 if refused else 0


def generation_of(options: argparse.Namespace) -> Generation:
    """The generation settings of a command line; ValueError (of pydantic) for values out of range."""
    shortest = (
        min(DEFAULT_SHORTEST, options.max_new_tokens) if options.min_new_tokens is None else options.min_new_tokens
    )
    if shortest > options.max_new_tokens:
        raise DataError(
            f"--min-new-tokens: expected at most --max-new-tokens ({options.max_new_tokens}), got {shortest}"
        )
    return Generation(
        num_beams=options.num_beams, max_new_tokens=options.max_new_tokens, min_new_tokens=shortest,
        length_penalty=options.length_penalty, beam_score=options.beam_score,
    )  # fmt: skip


def placement(device: str, precision: str) -> tuple[str, torch.dtype]:
    """Device and dtype of a command line; `auto` is the GPU where there is one, and bfloat16 there.

    Raises ModelError when a GPU is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ModelError("device: expected a CUDA device for 'cuda', torch sees none; use cpu or auto")
    device = ("cuda" if found else "cpu") if device == "auto" else device
    is_half = precision == "bf16" or (precision == "auto" and device == "cuda")
    return device, torch.bfloat16 if is_half else torch.float32


def captions(
    opened: Opened, images: Sequence[Path], settings: Generation, prompt: str = "", batch: int = 16
) -> Iterator[dict[str, Any]]:
    """{image, caption, token_ids} for each image; `prompt` is the text after the visual tokens, the same for all."""
    llm = opened.model.llm
    for at in range(0, len(images), batch):
        chosen = images[at : at + batch]
        ids = llm.generate_ids(opened.soft_prompts(list(chosen)), [prompt] * len(chosen), settings)
        texts = llm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for image, row, text in zip(chosen, ids.tolist(), texts, strict=True):
            yield {"image": str(image), "caption": text.strip(), "token_ids": trimmed(row, llm.ends)}


def trimmed(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to and with the first end token."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def find_images(given: Sequence[str]) -> tuple[list[Path], list[ImageRefused]]:
    """Files, and the image files of folders in order of name, and what cannot be read; DataError naming what is not there."""
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(
                    f"images: expected image files in the folder {path}, found none ({', '.join(IMAGE_SUFFIXES)})"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"images: expected an image file or a folder of images, found nothing at {path}")
    readable, refused = [], []
    for path in found:
        try:
            check_image(path)
            readable.append(path)
        except ImageRefused as refusal:
            refused.append(refusal)
    return readable, refused
