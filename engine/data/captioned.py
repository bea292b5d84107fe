"""A recipe's captioned data sets, opened: token ids in a memory-mapped table that is made at the first use and found again by its key.

The key is a hash of the captions and of everything that decides their ids.  For a packed set it is a hash of the set's index, for tars of
their names, sizes and times, so that opening one a second time reads neither samples nor captions: ten million images open as quickly as ten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..models.llm import LanguageModel
from ..recipe import ImageData
from ..runlog import RunLog
from .coco import ImageRecord, read_image_data
from .conversation import Framer
from .formats import caption_source
from .packed import PackedRecords, is_pack, iterate_packed, read_index
from .packing import Subset, TokenisedCaptions, join
from .reading import DataError, RefusalReport, VerifyImages, check_outcome
from .tar_member import TarMember
from .token_table import TABLE_VERSION, TableError, TableRow, TokenTable, in_chunks, write_table
from .webdataset import TarSample, check_tars_outcome, expand_tars, iterate_tars

MAX_REFUSED_SHARE = 0.5


def open_captioned(
    entry: ImageData,
    llm: LanguageModel,
    *,
    max_text_tokens: int,
    seed: int,
    verify_images: VerifyImages,
    cache_root: Path,
    log: RunLog,
    name: str | None = None,
) -> TokenTable:
    """The images of a `data` entry with their token ids; its table is made first where there is none below `cache_root`.

    Args:
        max_text_tokens: `data.max_text_tokens`, ids of a plain caption.
        verify_images: as in `read_captions`; packed sets are verified when their table is made.
        name: of the set; by default the entry's.

    Raises:
        DataError: the data cannot be used, as in `read_image_data`, or the language model cannot take them.
    """
    framer = Framer(entry, llm, max_text_tokens, seed)
    name = name or entry.name
    if entry.format == "pack" or (entry.format == "auto" and is_pack(entry.captions)):
        return _open_packed(entry, framer, verify_images, cache_root, log, name)
    source, in_tars = caption_source(entry.captions, entry.format)
    if in_tars:
        return _open_tars(entry, source, framer, verify_images, cache_root, log, name)
    found = read_image_data(entry, verify_images, name)
    folder = cache_root / f"tokens-{name}-{_key(framer, *((r.image_id, r.captions) for r in found.records))}"

    def rows() -> Iterator[TableRow]:
        for records in in_chunks(found.records):
            yield from _framed(records, framer)

    _make_if_missing(folder, rows, RefusalReport(found.refused.source), framer, log)
    table = TokenTable(folder, name, found.records)
    table.refused = found.refused  # the images were looked at just now
    return table


def open_training(
    entries: Sequence[ImageData], open_one: Callable[[ImageData], TokenTable]
) -> tuple[TokenisedCaptions, dict[str, tuple[Subset, float | None]], list[range]]:
    """All training sets side by side: (the data, the place and weight of each set by name, ranges of images with the eval transform)."""
    sets, subsets, fixed, at = [], {}, [], 0
    for entry in entries:
        captions = open_one(entry)
        sets.append(captions)
        subsets[entry.name] = Subset(at, at + len(captions), entry.weight or 1.0), entry.weight
        if entry.transform == "eval":
            fixed.append(range(at, at + len(captions)))
        at += len(captions)
    return join(sets), subsets, fixed


def _open_packed(
    entry: ImageData, framer: Framer, verify_images: VerifyImages, cache_root: Path, log: RunLog, name: str
) -> TokenTable:
    if entry.images is not None or entry.split is not None:
        raise DataError(f"images, split: expected neither, because {entry.captions} is a packed set of one split")
    index = read_index(entry.captions)
    preprocess = False if framer.is_conversation else None
    limit = None if entry.limit is None else entry.skip + entry.limit
    shards = [(s.file, s.samples, s.size_bytes, s.header_hash) for s in index.shards]
    stamps = [(index.folder / s.file).stat().st_mtime_ns for s in index.shards if (index.folder / s.file).is_file()]
    key = _key(framer, index.name, index.keeps_captions, shards, stamps, verify_images, entry.skip, limit)
    folder = cache_root / f"tokens-{name}-{key}"
    report = RefusalReport(str(index.folder))

    def rows() -> Iterator[TableRow]:
        usable = iterate_packed(index, report, preprocess=preprocess, verify_images=verify_images, limit=limit)
        found = ((ImageRecord(s.image_id, s.path, s.captions), {"sample": number}) for number, s in usable)
        yield from _rows(found, entry, framer, lambda count: check_outcome(report, "images", count, MAX_REFUSED_SHARE))

    _make_if_missing(folder, rows, report, framer, log)
    table = TokenTable(folder, name, None)
    table.records = PackedRecords(index, table.samples, preprocess=preprocess)
    return table


def _open_tars(
    entry: ImageData, source: str, framer: Framer, verify_images: VerifyImages, cache_root: Path, log: RunLog, name: str
) -> TokenTable:
    if entry.images is not None or entry.split is not None:
        raise DataError(f"images, split: expected neither, because the tars of {source} hold both images and captions")
    limit = None if entry.limit is None else entry.skip + entry.limit
    tars = expand_tars(source)
    stats = [(str(t.absolute()), t.stat().st_size, t.stat().st_mtime_ns) for t in tars if t.is_file()]
    folder = (
        cache_root / f"tokens-{name}-{_key(framer, [str(t) for t in tars], stats, verify_images, entry.skip, limit)}"
    )
    report = RefusalReport(source)

    def rows() -> Iterator[TableRow]:
        numbers = {tar: number for number, tar in enumerate(tars)}

        def placed(s: TarSample) -> tuple[ImageRecord, dict[str, Any]]:
            place = [s.image_id, numbers[s.image.tar], s.image.member, s.image.offset, s.image.size, [s.caption]]
            return ImageRecord(s.image_id, s.image, [s.caption]), {"record": place}

        found = map(placed, iterate_tars(source, report, verify_images=verify_images, limit=limit))
        yield from _rows(found, entry, framer, lambda count: check_tars_outcome(report, count, MAX_REFUSED_SHARE))

    _make_if_missing(folder, rows, report, framer, log)
    table = TokenTable(folder, name, None)
    table.records = TarRecords(table, tars)
    return table


def _rows(
    found: Iterable[tuple[ImageRecord, dict[str, Any]]], entry: ImageData, framer: Framer, check: Callable[[int], None]
) -> Iterator[TableRow]:
    """Rows of the images after the entry's first `skip`; each comes with what its row holds besides ids.  check: of how many there were."""
    count = 0
    for chunk in in_chunks(found):
        wanted = chunk[max(0, entry.skip - count) :]
        count += len(chunk)
        rows = _framed([record for record, _ in wanted], framer)
        yield from (replace(row, **more) for row, (_, more) in zip(rows, wanted, strict=True))
    check(count)
    if entry.skip >= count:
        raise DataError(f"skip: expected less than the {count:,} images of {entry.captions}, got {entry.skip}")


def _framed(records: Sequence[ImageRecord], framer: Framer) -> Iterator[TableRow]:
    ids, questions = framer(records)
    for i, captions in enumerate(ids):
        yield TableRow(captions, questions[i] if questions else None)


class TarRecords(Sequence):
    """The images of a set in tars, from what its table has stored."""

    def __init__(self, table: TokenTable, tars: Sequence[Path]):
        self._table, self._tars = table, tars

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, at: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"image: expected 0 to {len(self) - 1:,}, got {at}")
        image_id, tar, member, offset, size, captions = self._table.stored_record(at % len(self))
        return ImageRecord(image_id, TarMember(self._tars[tar], member, offset, size), captions)


def _make_if_missing(
    folder: Path, rows: Callable[[], Iterator[TableRow]], report: RefusalReport, framer: Framer, log: RunLog
) -> None:
    """A table that cannot be read is removed, with a line that says so, and made anew."""
    if folder.exists():
        try:
            TokenTable(folder, "", None)
            return
        except TableError as error:
            log.warn("stale_tokens", f"{error}; made again")
            shutil.rmtree(folder)
    probe = folder.with_name(f".probe.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"output.cache: expected a folder that can be written, for the token ids of {folder.name}, got {folder.parent} ({error.strerror}); "
            "choose another"
        ) from error
    write_table(folder, rows(), report, vocabulary=framer.vocabulary, lead=framer.lead)


def _key(framer: Framer, *parts: Any) -> str:
    digest = hashlib.sha256(json.dumps([TABLE_VERSION, framer.settings()]).encode())
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\0")
    return digest.hexdigest()[:16]
