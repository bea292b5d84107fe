"""A recipe's captioned data sets, opened: token ids in a memory-mapped table that is made at the first use and found again by its key.

The key is a hash of the captions and of everything that decides their ids.  For a packed set it is a hash of the set's index, so that
opening one a second time reads neither samples nor captions: ten million images open as quickly as ten.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..models.llm import LanguageModel
from ..recipe import ImageData
from ..runlog import RunLog
from .coco import ImageRecord, read_image_data
from .conversation import Framer
from .packed import PackedRecords, is_pack, iterate_packed, read_index
from .reading import DataError, RefusalReport, VerifyImages, check_outcome
from .token_table import TABLE_VERSION, TableError, TokenTable, in_chunks, write_table

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
    found = read_image_data(entry, verify_images, name)
    folder = cache_root / f"tokens-{name}-{_key(framer, *((r.image_id, r.captions) for r in found.records))}"

    def rows() -> Iterator[Any]:
        for records in in_chunks(found.records):
            ids, questions = framer(records)
            for i, captions in enumerate(ids):
                yield captions, questions[i] if questions else None, None

    _make_if_missing(folder, rows, RefusalReport(found.refused.source), framer, log)
    table = TokenTable(folder, name, found.records)
    table.refused = found.refused  # the images were looked at just now
    return table


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

    def rows() -> Iterator[Any]:
        usable = iterate_packed(index, report, preprocess=preprocess, verify_images=verify_images, limit=limit)
        count = 0
        for chunk in in_chunks(usable):
            count += len(chunk)
            chunk = chunk[max(0, entry.skip - count + len(chunk)) :]
            records = [ImageRecord(s.image_id, s.path, s.captions, s.domain) for _, s in chunk]
            ids, questions = framer(records)
            for i, (number, _) in enumerate(chunk):
                yield ids[i], questions[i] if questions else None, number
        check_outcome(report, "images", count, MAX_REFUSED_SHARE)
        if entry.skip >= count:
            raise DataError(f"skip: expected less than the {count:,} images of {entry.captions}, got {entry.skip}")

    _make_if_missing(folder, rows, report, framer, log)
    table = TokenTable(folder, name, None)
    table.records = PackedRecords(index, table.samples, preprocess=preprocess)
    return table


def _make_if_missing(folder: Path, rows: Any, report: RefusalReport, framer: Framer, log: RunLog) -> None:
    """A table that cannot be read is removed, with a line that says so, and made anew."""
    if folder.exists():
        try:
            TokenTable(folder, "", None)
            return
        except TableError as error:
            log.warn("stale_tokens", f"{error}; made again")
            shutil.rmtree(folder)
    write_table(folder, rows(), report, vocabulary=framer.vocabulary, lead=framer.lead)


def _key(framer: Framer, *parts: Any) -> str:
    digest = hashlib.sha256(json.dumps([TABLE_VERSION, framer.settings()]).encode())
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\0")
    return digest.hexdigest()[:16]
