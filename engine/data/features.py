"""Features of the frozen tower for the groups of a batch: computed when asked for, or read from a memory-mapped vision cache.

The cache is one file, (views, images, tokens, width) in the tower's compute dtype, so it is exact.  Its key is a hash of the tower's
weights, the transform, the dtype and the images, so a stale cache is never found.  View v of image i is what epoch v would draw, and
epoch e reads view e mod views: with the eval transform one view is the truth, with the train transform k views stand for all.

An image that cannot be read stops what asked for it, or, with `bad_images` "skip", has grey pixels and is listed in `unusable`, so that its
captions are not trained; a damaged image stays damaged, so that a resumed run leaves out the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..checkpoint import write_json
from ..models.vision import VisionTower
from ..runlog import RunLog
from ..runtime import Runtime
from .decode import GREY, load_batch
from .images import ImageRefused, normalise, sample_rng
from .packing import Group, TokenisedCaptions
from .reading import DataError

BUILD_BATCH = 32
UNUSABLE_SHARE = 0.01  # of the images may turn out to be unusable, and UNUSABLE_FLOOR always may
UNUSABLE_FLOOR = 8


class FeatureSource(Protocol):
    """Features of groups in two steps, so that the first can run ahead: `source(groups)` does both.

    unusable: images that could not be read so far, by number, and why; `prepare` adds to it before it returns.
    """

    unusable: dict[int, str]

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

    def _leave_out(self, image: int, fault: ImageRefused) -> None:
        self.unusable[image] = str(fault)
        if len(self.unusable) > max(UNUSABLE_FLOOR, UNUSABLE_SHARE * len(self.data.records)):
            raise DataError(
                f"data.bad_images: expected at most {UNUSABLE_SHARE:.0%} of {len(self.data.records):,} images (or {UNUSABLE_FLOOR}) to be "
                f"unusable, found {len(self.unusable):,}, the last: {fault}; see whether the disk is there, or check the data again"
            ) from fault

    def finish(self, prepared: Tensor) -> Tensor:
        pixels = prepared.to(self.runtime.device, non_blocking=True)
        images = normalise(pixels, self.tower.norm.mean, self.tower.norm.std).to(self._dtype)
        with self.runtime.autocast():
            return self.tower.features(images)


class CachedFeatures(FeatureSource):
    """Reads views from a vision cache; `build_cache` makes it."""

    def __init__(
        self, path: Path, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, unusable: dict[int, str] | None = None
    ):  # fmt: skip
        self.views, self.unusable = shape[0], unusable or {}
        count = shape[0] * shape[1] * shape[2] * shape[3]
        self.table = torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)
        self.device = device

    def prepare(self, groups: list[Group]) -> Tensor:
        views = torch.tensor([g.epoch % self.views for g in groups])
        images = torch.tensor([g.image for g in groups])
        return pinned(self.table[views, images], self.device)

    def finish(self, prepared: Tensor) -> Tensor:
        return prepared.to(self.device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Page-locked where it goes to a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def open_features(
    data: TokenisedCaptions,
    tower: VisionTower,
    *,
    transform: str,
    seed: int,
    runtime: Runtime,
    cache_root: Path | None,
    views: int = 1,
    log: RunLog,
    fixed: Sequence[range] = (),
    decode: Literal["exact", "fast"] = "exact",
    bad_images: Literal["fail", "skip"] = "fail",
) -> FeatureSource:
    """Live features, or, with `cache_root`, the cache of this tower and data, built first where it is missing.

    fixed: ranges of images that take the eval transform whatever `transform` is.  decode: as in `load_batch`'s mode.
    bad_images: of images that cannot be read.

    An existing cache of the right key but the wrong size is removed and rebuilt, with a line that says so.
    """
    live = LiveFeatures(data, tower, transform, seed, runtime, fixed, decode, bad_images)
    if cache_root is None:
        return live
    views = views if transform == "train" else 1
    shape = (views, len(data.records), tower.tokens, tower.width)
    key = _cache_key(data, tower, transform, seed, views, runtime.compute_dtype, fixed, decode)
    path = cache_root / f"vision-{data.name}-{key}.bin"
    expected = shape[0] * shape[1] * shape[2] * shape[3] * runtime.compute_dtype.itemsize
    if path.exists() and path.stat().st_size != expected:
        log.warn("stale_cache", f"{path}: expected {expected} bytes, found {path.stat().st_size}; rebuilt")
        path.unlink()
    if not path.exists():
        log.say(f"vision cache: {shape[1]:,} images x {views} view(s) -> {path} ({expected / 2**20:.0f} MiB)")
        _build(path, live, shape, runtime.compute_dtype, log)
    unusable = _unusable_in(path)
    if unusable and bad_images == "fail":
        raise DataError(
            f"data.bad_images: {path} was made with 'skip' and lacks {len(unusable):,} images, the first: {next(iter(unusable.values()))}; "
            "set it to skip, or mend the images and delete the file"
        )
    return CachedFeatures(path, shape, runtime.compute_dtype, runtime.device, unusable)


def _build(path: Path, live: LiveFeatures, shape: tuple[int, int, int, int], dtype: torch.dtype, log: RunLog) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    done, total = 0, shape[0] * shape[1]
    with temporary.open("wb") as file:
        for view in range(shape[0]):
            for at in range(0, shape[1], BUILD_BATCH):
                groups = [Group(i, view, ()) for i in range(at, min(at + BUILD_BATCH, shape[1]))]
                features = live(groups).to(dtype).cpu().contiguous()
                file.write(features.view(torch.uint8).numpy().data)
                done += len(groups)
                log.progress("vision cache", done, total, f"{done:,} of {total:,} images")
        file.flush()
        os.fsync(file.fileno())
    log.end_progress()
    # First, so that a cache is never without it.
    write_json(
        path.with_suffix(".json"), {"shape": shape, "dtype": str(dtype), "unusable": sorted(live.unusable.items())}
    )
    temporary.replace(path)


def _unusable_in(path: Path) -> dict[int, str]:
    """Images that could not be read when a cache was made."""
    try:
        return dict(json.loads(path.with_suffix(".json").read_text()).get("unusable", ()))
    except FileNotFoundError:
        return {}


def _cache_key(
    data: TokenisedCaptions, tower: VisionTower, transform: str, seed: int, views: int, dtype: torch.dtype, fixed: Sequence[range],
    decode: str,
) -> str:  # fmt: skip
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        # flattened first: a 1 x 1 kernel in channels-last counts as contiguous and still has a last stride above 1
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    # The random views depend on the seed; the eval transform does not.
    settings = [
        tower.image_size,
        transform,
        seed if transform == "train" else None,
        views,
        str(dtype),
        tower.norm.mean,
        tower.norm.std,
    ]
    if fixed:
        settings.append([i for images in fixed for i in images])
    if decode == "fast":
        settings.append("decode fast")
    digest.update(json.dumps(settings).encode())
    for record in data.records:
        stat = record.path.stat()
        digest.update(f"{record.image_id}\0{record.path.name}\0{stat.st_size}\n".encode())
    return digest.hexdigest()[:16]
