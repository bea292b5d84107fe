"""Reading a packed set: the folder that `vpgtrans pack` writes, its `index.json` and its `.beton` shards.

The index names the shards and what was packed; a shard that is missing, cut or of another packing is a `DataError`, a
damaged sample is refused by name and the rest is read. Captions stand in the set as in its source and are cleaned here.
"""

from __future__ import annotations

import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .beton import RAW, BetonError, BetonReader
from .beton_member import BetonMember
from .captions import preprocess_caption
from .images import PIXEL_LIMIT, ImageRefused, check_image, read_header
from .reading import (
    DataError,
    RefusalReport,
    VerifyImages,
    check_options,
    check_outcome,
    is_id,
    kind,
    read_json,
    text_fault,
)

PACK_FORMAT = "vpgtrans pack"
PACK_VERSION = 1
INDEX_NAME = "index.json"
IMAGE_FIELD, CAPTIONS_FIELD = "image", "captions"
_EXPECTED = "the index of a packed set, as vpgtrans pack writes it"


@dataclass(frozen=True)
class PackShard:
    file: str
    samples: int
    size_bytes: int
    header_hash: str


@dataclass(frozen=True)
class PackIndex:
    """What `index.json` says; `keeps_captions`: they are not cleaned for training (MiniGPT-4's long answers)."""

    folder: Path
    name: str
    keeps_captions: bool
    shards: tuple[PackShard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class PackedSample:
    image_id: int | str
    path: BetonMember
    captions: list[str]
    domain: str | None


def is_pack(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with the index of a packed set (or that index), by its first bytes."""
    try:
        with open(_index_path(path), "rb") as file:
            return PACK_FORMAT.encode() in file.read(100)
    except (OSError, ValueError):
        return False


def read_index(path: str | os.PathLike[str]) -> PackIndex:
    """The index of a packed set; raises DataError where it is missing or damaged."""
    source = _index_path(path)
    value, _ = read_json(source, _EXPECTED)
    if not isinstance(value, dict) or value.get("format") != PACK_FORMAT or value.get("version") != PACK_VERSION:
        got = (
            f"format {value.get('format')!r}, version {value.get('version')!r}"
            if isinstance(value, dict)
            else kind(value)
        )
        raise DataError(f"{source}: expected {_EXPECTED} (version {PACK_VERSION}), got {got}; pack the source again")
    try:
        shards = tuple(
            PackShard(str(s["file"]), int(s["samples"]), int(s["bytes"]), str(s["header_sha256"]))
            for s in value["shards"]
        )
        index = PackIndex(source.parent, str(value["name"]), bool(value["keeps_captions"]), shards)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: expected {_EXPECTED}, damaged at {error}; pack the source again") from error
    for shard in shards:
        # an index from elsewhere must not make the program open arbitrary files
        if shard.file != Path(shard.file).name or shard.file in ("", ".", ".."):
            raise DataError(f"{source}: expected shards beside the index, got {shard.file!r}")
    return index


def open_shard(index: PackIndex, shard: PackShard) -> BetonReader:
    """A shard, if it is the one that the index describes; raises DataError otherwise."""
    try:
        reader = BetonReader(index.folder / shard.file)
    except BetonError as error:
        raise DataError(f"{error}; run vpgtrans pack again: it keeps the other shards") from error
    size = (index.folder / shard.file).stat().st_size
    if (len(reader), size, reader.header_hash) != (shard.samples, shard.size_bytes, shard.header_hash):
        raise DataError(
            f"{reader.path}: expected {shard.samples:,} samples in {shard.size_bytes:,} bytes, got {len(reader):,} in {size:,} "
            "or another header; it is damaged or of another packing: run vpgtrans pack again"
        )
    return reader


def read_packed(
    path: str | os.PathLike[str],
    *,
    preprocess: bool | None = None,
    max_words: int = 50,
    verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT,
    limit: int | None = None,
    max_refused_share: float = 0.5,
) -> tuple[PackIndex, list[PackedSample], RefusalReport]:
    """The samples of a packed set, in order; arguments and errors as in `coco.read_captions`."""
    check_options(limit, max_refused_share)
    index = read_index(path)
    report = RefusalReport(str(_index_path(path)))
    found = iterate_packed(
        index,
        report,
        preprocess=preprocess,
        max_words=max_words,
        verify_images=verify_images,
        max_pixels=max_pixels,
        limit=limit,
    )
    samples = [sample for _, sample in found]
    check_outcome(report, "images", len(samples), max_refused_share)
    return index, samples, report


def iterate_packed(
    index: PackIndex, report: RefusalReport, *, preprocess: bool | None = None, max_words: int = 50, verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT, limit: int | None = None,
) -> Iterator[tuple[int, PackedSample]]:  # fmt: skip
    """(number over all shards, sample) of the usable samples, in order; the others are counted and named in `report`."""
    if max_words < 1:
        raise DataError(f"max_words: expected 1 or more, got {max_words!r}; 50 is the reference's value")
    if verify_images not in ("none", "header", "full"):
        raise DataError(f"verify_images: expected 'none', 'header' or 'full', got {verify_images!r}")
    verifier = {"none": None, "header": read_header, "full": check_image}[verify_images]
    clean = preprocess if preprocess is not None else not index.keeps_captions
    before = found = 0
    for shard in index.shards:
        if limit is not None and found >= limit:
            return
        reader = open_shard(index, shard)
        for number, member in enumerate(_members(reader)):
            if limit is not None and found >= limit:
                return
            report.examined["images"] += 1
            where = f"{reader.path}: sample {number}"
            try:
                if member is None:
                    reader.read_field(number, IMAGE_FIELD)  # says what is wrong with it
                    raise BetonError(reader.path, "damaged image", number, IMAGE_FIELD)
                sample = _sample(reader.read_field(number, CAPTIONS_FIELD), member, report, where, clean, max_words)
                if sample is None:
                    continue
                if verifier is not None:
                    verifier(member, max_pixels=max_pixels)
            except BetonError as error:
                report.add("images", "damaged", where, error.what)
            except ImageRefused as refusal:
                report.add("images", refusal.reason, where, refusal.detail)
            else:
                found += 1
                yield before + number, sample
        before += shard.samples


class PackedRecords(Sequence):
    """The images of a packed set, read where they are asked for: `records[i]` is sample `numbers[i]` over all shards.

    Opening looks at the shards' sizes only; a shard is mapped at its first sample. Several threads may read at once.

    Raises:
        DataError: a shard is missing or has another size than the index says. ImageRefused, at access: a damaged sample.
    """

    def __init__(
        self, index: PackIndex, numbers: Sequence[int], *, preprocess: bool | None = None, max_words: int = 50
    ):
        self._index, self._numbers, self._max_words = index, numbers, max_words
        self._clean = preprocess if preprocess is not None else not index.keeps_captions
        self._starts = list(itertools.accumulate((shard.samples for shard in index.shards), initial=0))
        self._readers: dict[int, BetonReader] = {}
        for shard in index.shards:
            path = index.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size_bytes:
                got = "no file" if size is None else f"{size:,}"
                raise DataError(
                    f"{path}: expected {shard.size_bytes:,} bytes, got {got}; run vpgtrans pack again: it keeps the other shards"
                )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int | slice) -> PackedSample | list[PackedSample]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = int(self._numbers[at])
        shard = bisect_right(self._starts, number) - 1
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = open_shard(self._index, self._index.shards[shard])
        place = number - self._starts[shard]
        where = f"{reader.path}: sample {place}"
        report = RefusalReport(where)
        try:
            member = _member(reader, place)
            sample = _sample(
                reader.read_field(place, CAPTIONS_FIELD), member, report, where, self._clean, self._max_words
            )
        except BetonError as error:
            raise ImageRefused("unreadable", where, error.what) from error
        if sample is None:
            raise ImageRefused("unreadable", where, "its captions are damaged")
        return sample


def _index_path(path: str | os.PathLike[str]) -> Path:
    return Path(path) / INDEX_NAME if os.path.isdir(path) else Path(path)


def _members(reader: BetonReader) -> list[BetonMember | None]:
    """The image of every sample; None where its place in the file is damaged."""
    try:
        numbers = np.arange(len(reader))
        rows = reader.image_rows(IMAGE_FIELD, numbers)
        reader.field(CAPTIONS_FIELD)
        offsets, sizes = reader.spans(IMAGE_FIELD, numbers)
    except BetonError as error:
        raise DataError(f"{error}; expected fields as vpgtrans pack writes them") from error
    return [
        BetonMember(reader.path, number, offset, size, (width, height) if mode == RAW else None) if size else None
        for number, offset, size, mode, width, height in zip(
            range(len(reader)), offsets.tolist(), sizes.tolist(), rows["mode"].tolist(), rows["width"].tolist(),
            rows["height"].tolist(), strict=True,
        )
    ]  # fmt: skip


def _member(reader: BetonReader, number: int) -> BetonMember:
    """The image of one sample; BetonError where it is damaged."""
    numbers = np.array([number])
    row = reader.image_rows(IMAGE_FIELD, numbers)[0]
    offsets, sizes = reader.spans(IMAGE_FIELD, numbers)
    if not sizes[0]:
        reader.read_field(number, IMAGE_FIELD)  # says what is wrong with it
        raise BetonError(reader.path, "damaged image", number, IMAGE_FIELD)
    raw_size = (int(row["width"]), int(row["height"])) if row["mode"] == RAW else None
    return BetonMember(reader.path, number, int(offsets[0]), int(sizes[0]), raw_size)


def _sample(
    value: Any, member: BetonMember, report: RefusalReport, where: str, clean: bool, max_words: int
) -> PackedSample | None:
    """A sample with its usable captions; None, with what is wrong counted, where it has none."""
    listed = value.get("captions") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not is_id(value.get("image_id")):
        report.add("images", "malformed_entry", where, "expected an object with 'image_id' and 'captions'")
        return None
    captions = []
    for number, caption in enumerate(listed):
        report.examined["captions"] += 1
        reason = text_fault(caption, "caption", True)
        text = "" if reason else preprocess_caption(caption, max_words) if clean else caption
        if reason is None and text.strip():
            captions.append(text)
        else:
            report.add("captions", reason or "caption_empty", f"{where}, caption {number}", json.dumps(caption)[:200])
    if not captions:
        report.add("images", "without_captions", where, f"image_id {value['image_id']!a}")
        return None
    domain = value.get("domain")
    return PackedSample(value["image_id"], member, captions, domain if isinstance(domain, str) else None)
