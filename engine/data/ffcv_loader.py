"""Training images of packed sets through FFCV's own `Loader` (`data.loader: ffcv`), beside the native loader.

Which images a micro-batch has is decided as ever, so order, captions and the position that a checkpoint keeps are exact; FFCV decodes, crops,
resizes and flips them, shard by shard.  What FFCV 1.0.2 cannot do is in `LIMITS`, which a run prints.  Each shard (and transform) has a loader of
its own, opened and compiled at its first use: FFCV takes one file a loader.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.vision import VisionTower
from ..recipe import RecipeError, TransferData
from ..runtime import Runtime
from .beton import BetonReader
from .beton_member import BetonMember
from .features import LiveFeatures, pinned
from .packed import IMAGE_FIELD, is_pack
from .packing import Group, TokenisedCaptions
from .reading import DataError

SYSTEM_PACKAGES = "libturbojpeg0-dev libopencv-dev pkg-config g++"  # Debian's and Ubuntu's names
LIMITS = (
    "images are resized by area, not bicubic; crops and flips cannot be seeded, so that two runs differ, and a resumed run has the same order and "
    "captions from where it stopped but other crops; a damaged JPEG becomes a wrong picture without a word, and an error inside FFCV hangs; each "
    "shard is compiled at its first use, some seconds; validation images are read natively"
)
_BATCH = 16  # images that FFCV decodes at once: it holds three times as many of the largest size of a shard


def ffcv_unsupported_reason() -> str | None:
    """Why FFCV cannot be used here; None where it can."""
    threads = torch.get_num_threads()
    try:
        import ffcv  # noqa: F401
    except Exception as error:  # a package built for another numpy or OpenCV fails in many ways
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.set_num_threads(threads)  # FFCV sets it to 1 on import
    return None


def check_ffcv(layout: TransferData) -> str:
    """What a run should say about `data.loader: ffcv`; raises RecipeError where FFCV or the packed sets are missing."""
    for index, entry in enumerate(layout.train):
        if not is_pack(entry.captions):
            raise RecipeError(
                f"data.train.{index}: expected the folder of a packed set, because data.loader is 'ffcv', got {entry.captions}; make one with "
                "`vpgtrans pack`, or set data.loader to native"
            )
    if reason := ffcv_unsupported_reason():
        raise RecipeError(
            f"data.loader: expected FFCV to be installed for 'ffcv', which cannot be imported ({reason}); install {SYSTEM_PACKAGES}, then "
            "pip install 'vpgtrans[ffcv]', or set data.loader to native"
        )
    return f"data.loader: FFCV {importlib.metadata.version('ffcv')} reads the training images: {LIMITS}"


class FFCVFeatures(LiveFeatures):
    """`LiveFeatures` of records that are all `BetonMember`s, with FFCV in place of `load_batch`."""

    def __init__(
        self, data: TokenisedCaptions, tower: VisionTower, transform: str, seed: int, runtime: Runtime, fixed: Sequence[range] = ()
    ):  # fmt: skip
        super().__init__(data, tower, transform, seed, runtime, fixed)
        self._loaders: dict[tuple[Path, bool], Any] = {}  # (shard, whether images are squashed) -> FFCV's Loader

    def prepare(self, groups: list[Group]) -> Tensor:
        size = self.tower.image_size
        pixels = torch.empty(len(groups), 3, size, size, dtype=torch.uint8)
        places: dict[tuple[Path, bool], list[int]] = {}
        members: list[BetonMember] = [self.data.records[g.image].path for g in groups]
        for place, (group, member) in enumerate(zip(groups, members, strict=True)):
            squashed = self.transform == "eval" or any(group.image in images for images in self.fixed)
            places.setdefault((member.shard, squashed), []).append(place)
        for (shard, squashed), chosen in places.items():
            samples = np.array([members[place].sample for place in chosen], np.uint64)
            pixels[chosen] = self._read(shard, squashed, samples)
        return pinned(pixels, self.runtime.device)

    def _read(self, shard: Path, squashed: bool, samples: np.ndarray) -> Tensor:
        """uint8 (samples, 3, size, size), in their order."""
        from ffcv.loader.epoch_iterator import EpochIterator

        if (shard, squashed) not in self._loaders:
            self._loaders[shard, squashed] = _open_loader(shard, squashed, self.tower.image_size)
        # What iterating over a Loader gives, with these samples for the order; its buffers are used again.
        batches = [batch.clone() for (batch,) in EpochIterator(self._loaders[shard, squashed], samples)]
        pixels = torch.cat(batches)
        if len(pixels) != len(samples):
            raise DataError(f"{shard}: expected {len(samples)} images from FFCV, got {len(pixels)}")
        return pixels


def _open_loader(shard: Path, squashed: bool, size: int) -> Any:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    # No crop of twice the area fits, and FFCV falls back to all of an image whose ratio is allowed.
    crop = {"scale": (2.0, 2.0), "ratio": (1e-4, 1e4)} if squashed else {"scale": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}
    decoder = RandomResizedCropRGBImageDecoder((size, size), **crop)
    flip = [] if squashed else [RandomHorizontalFlip()]
    others = {field.name: None for field in BetonReader(shard).fields if field.name != IMAGE_FIELD}
    return Loader(
        str(shard), batch_size=_BATCH, num_workers=torch.get_num_threads(), os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False,
        batches_ahead=1, pipelines={IMAGE_FIELD: [decoder, *flip, ToTensor(), ToTorchImage(channels_last=True)], **others},
    )  # fmt: skip
