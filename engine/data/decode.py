"""Batches of training pixels, the same as `load_pixels` gives one by one: the native decoder for JPEGs and stored pixels, Pillow for the rest."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...kernels.image_decode import DecodeCode, decode_batch, live_decoder
from .beton_member import BetonMember
from .images import ImageRefused, Member, crop_box, load_pixels, read_bytes
from .jpeg_header import jpeg_header

GREY = 127
_READ_AT_ONCE = 4  # images a task of the pool: a task of its own for each costs more than reading one
_EXIF_WITHIN = 65_536  # an EXIF block stands in the first segments


def pixels_of(mode: Literal["exact", "fast"]) -> str:
    """Which pixels `load_batch` gives in this process: "exact", "fast", or "simplejpeg"."""
    decoder = live_decoder()
    return {"reference": "exact", "simplejpeg": "simplejpeg"}.get(decoder, mode)


def load_batch(
    sources: Sequence[str | os.PathLike[str] | Member],
    size: int,
    rngs: Sequence[np.random.Generator | None],
    pool: Executor,
    threads: int | None = None,
    mode: Literal["exact", "fast"] = "exact",
    refused: Callable[[int, ImageRefused], None] | None = None,
) -> Tensor:
    """uint8 (images, 3, size, size), channels-last in memory: each image with the eval transform, or, with a generator, randomly cropped and flipped.

    threads: of the decoder; default: one a core.  What it does not take (other formats, EXIF blocks that may turn the picture) `pool` decodes by
    Pillow.  Without the native decoder simplejpeg decodes where it is installed, within 2 of 255 levels of Pillow, else Pillow everything.
    mode: "fast" needs the native decoder; the pixels are no longer those of `load_pixels` where a crop is at least twice as large as `size`.
    refused: is told the place and the fault of each image that cannot be used, which becomes grey,
    from any thread of the pool; without it ImageRefused is raised as by `load_pixels`.
    """
    out = torch.empty(len(sources), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    native: list[int] = []
    contents: list[bytes] = []
    boxes, flips = np.zeros((len(sources), 4), np.int64), np.zeros(len(sources), bool)
    raw_sizes = np.zeros((len(sources), 2), np.int64)
    if live_decoder() != "reference":
        slices = [sources[at : at + _READ_AT_ONCE] for at in range(0, len(sources), _READ_AT_ONCE)]
        read = itertools.chain.from_iterable(
            pool.map(lambda some: [_native_content(source) for source in some], slices)
        )
        for index, found in enumerate(read):
            if found is None:
                continue
            content, width, height, is_raw = found
            rng = rngs[index]
            if rng is not None:  # the same draws in the same order as `train_pixels`
                state = rng.bit_generator.state
                boxes[index] = crop_box(width, height, rng)
                flips[index] = rng.random() < 0.5
                rng.bit_generator.state = state  # should Pillow have to do it after all
            if is_raw:
                raw_sizes[index] = width, height
            native.append(index)
            contents.append(content)
    if native:
        pixels, codes = decode_batch(
            contents, boxes[native], flips[native], size, threads=threads, mode=mode,
            raw_sizes=raw_sizes[native] if raw_sizes.any() else None, out=out if len(native) == len(sources) else None,
        )  # fmt: skip
        if pixels is not out:
            for index, image in zip(native, pixels, strict=True):  # an indexed assignment takes three times as long
                out[index].copy_(image)
        native = [index for index, code in zip(native, codes, strict=True) if code == DecodeCode.OK]
    others = sorted(set(range(len(sources))) - set(native))

    def one(index: int) -> None:
        try:
            out[index] = load_pixels(sources[index], size, rngs[index])
        except ImageRefused as refusal:
            if refused is None:
                raise
            refused(index, refusal)
            out[index] = GREY

    list(pool.map(one, others))
    return out


def _native_content(source: str | os.PathLike[str] | Member) -> tuple[bytes, int, int, bool] | None:
    """Content, upright width and height, and whether it is pixels, of what the native decoder takes; None for Pillow's business."""
    try:
        content = source.read() if isinstance(source, BetonMember) else read_bytes(source)
    except (ImageRefused, OSError):  # load_pixels says it again
        return None
    if isinstance(source, BetonMember) and source.raw_size is not None:
        return content, *source.raw_size, True
    header = jpeg_header(content)
    if not header or not header.is_plain or b"Exif" in content[:_EXIF_WITHIN]:
        return None
    return content, header.width, header.height, False
