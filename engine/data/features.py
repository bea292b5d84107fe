"""Features of the frozen tower for the groups of a batch, computed when asked for; feature_cache.py stores them.

An image that cannot be read stops what asked for it, or, with `bad_images` "skip", has grey pixels and is listed in `unusable`, so that its
captions are not trained; a damaged image stays damaged, so that a resumed run leaves out the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..models.vision import VisionTower
from ..runtime import Runtime
from .decode import GREY, load_batch
from .images import ImageRefused, normalise, sample_rng
from .packing import Group, TokenisedCaptions
from .reading import DataError

UNUSABLE_SHARE = 0.01  # of the images may turn out to be unusable, and UNUSABLE_FLOOR always may
UNUSABLE_FLOOR = 8


class Computed(NamedTuple):
    """Images that the last `finish` sent through the tower, and through a frozen VPG whose prompts are stored."""

    encodings: int = 0
    prompts: int = 0


class FeatureSource(Protocol):
    """Features of groups in two steps, so that the first can run ahead: `source(groups)` does both.

    unusable: images that could not be read so far, by number, and why; `prepare` adds to it before it returns.
    """

    unusable: dict[int, str]
    computed = Computed()

    def prepare(self, groups: list[Group]) -> Tensor:
        """What the host has to do: decoded pixels, or rows of a cache; page-locked where the device is a GPU."""

    def finish(self, prepared: Tensor) -> Tensor:
        """-> (groups, tokens, width) on the compute device."""

    def __call__(self, groups: list[Group]) -> Tensor:
        return self.finish(self.prepare(groups))


class LiveFeatures(FeatureSource):
    """Decodes, transforms and encodes the images of each batch."""

    def __init__(
        self, data: TokenisedCaptions, tower: VisionTower, transform: str, seed: int, runtime: Runtime, fixed: Sequence[range] = (),
        decode: Literal["exact", "fast"] = "exact", bad_images: Literal["fail", "skip"] = "fail",
    ):  # fmt: skip
        self.data, self.tower, self.transform, self.seed, self.runtime = data, tower, transform, seed, runtime
        self.fixed, self.decode, self.bad_images = fixed, decode, bad_images
        self.unusable = {}
        self._dtype = next(tower.parameters()).dtype
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def prepare(self, groups: list[Group]) -> Tensor:
        usable, paths, rngs = [], [], []
        for place, group in enumerate(groups):
            try:
                record = self.data.records[group.image]
            except ImageRefused as fault:  # a sample of a packed set that was damaged since its table was made
                if self.bad_images == "fail":
                    raise
                self._leave_out(group.image, fault)
                continue
            usable.append(place)
            paths.append(record.path)
            drawn = self.transform == "train" and not any(group.image in images for images in self.fixed)
            rngs.append(sample_rng(self.seed, group.epoch, record.image_id) if drawn else None)
        pixels = load_batch(
            paths, self.tower.image_size, rngs, self._pool, torch.get_num_threads(), self.decode,
            refused=None if self.bad_images == "fail" else lambda at, fault: self._leave_out(groups[usable[at]].image, fault),
        )  # fmt: skip
        if len(usable) < len(groups):
            whole = pixels.new_full((len(groups), *pixels.shape[1:]), GREY)
            whole[usable] = pixels
            pixels = whole
        return pinned(pixels, self.runtime.device)

    def as_eval(self) -> LiveFeatures:
        """The same images with the eval transform alone."""
        return LiveFeatures(self.data, self.tower, "eval", self.seed, self.runtime, (), self.decode, self.bad_images)

    def _leave_out(self, image: int, fault: ImageRefused) -> None:
        self.unusable[image] = str(fault)
        if len(self.unusable) > max(UNUSABLE_FLOOR, UNUSABLE_SHARE * len(self.data.records)):
            raise DataError(
                f"data.bad_images: expected at most {UNUSABLE_SHARE:.0%} of {len(self.data.records):,} images (or {UNUSABLE_FLOOR}) to be "
                f"unusable, found {len(self.unusable):,}, the last: {fault}; see whether the disk is there, or check the data again"
            ) from fault

    def finish(self, prepared: Tensor) -> Tensor:
        self.computed = Computed(encodings=len(prepared))
        pixels = prepared.to(self.runtime.device, non_blocking=True)
        images = normalise(pixels, self.tower.norm.mean, self.tower.norm.std).to(self._dtype)
        with self.runtime.autocast():
            return self.tower.features(images)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Page-locked where it goes to a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
