"""`vpgtrans pack`: captioned images into `.beton` shards that FFCV reads too, with an index and a list of what was refused.

    vpgtrans pack captions.json packed/ --images images/            # and in a recipe: {captions: packed, format: pack}

One sample is one image with all its captions: field `image` (rgb) and field `captions` (JSON: image_id, captions, and
domain and questions where there are any). Every image is decoded once, so that a broken one is refused here and not in
the middle of an epoch. The bytes of a JPEG in three components of 8 bits pass untouched; another image, one that is
stored rotated and one that is to be resized are encoded anew, at quality 95.

Shard k holds what is usable of images k N to (k + 1) N - 1 of the source, so shards do not depend on each other: a killed
run is taken up by the same command, which keeps each finished shard whose settings, captions and image files (size and
time) are still the same. `NAME-00000.json` beside a shard is the record of that.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoint import write_json
from ..runlog import RunLog, console, duration
from .beton import MIN_PAGE_BYTES, PAGE_BYTES, BetonError, BetonReader
from .beton_writer import BetonWriter
from .images import ImageRefused, is_stored_upright, read_bytes, read_image
from .jpeg_header import jpeg_header
from .pack_sources import PackItem, PackSource, read_source
from .packed import CAPTIONS_FIELD, IMAGE_FIELD, INDEX_NAME, PACK_FORMAT, PACK_VERSION
from .reading import DataError, RefusalReport, check_outcome, stem
from .tar_member import TarMember

JPEG_QUALITY = 95
JPEG_SIDE_LIMIT = 65_500  # libjpeg's
REFUSED_NAME = "refused.json"
_FIELDS = {IMAGE_FIELD: "rgb", CAPTIONS_FIELD: "json"}
_AHEAD_PER_JOB = 4  # images being prepared or waiting for their turn; bounds the memory

Refused = tuple[str, str, str]  # reason, where, detail


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a shard. At most one of `max_side` and `shorter_side`, in pixels; nothing is enlarged."""

    shard_images: int = 10_000
    max_side: int | None = None
    shorter_side: int | None = None
    raw: bool = False
    page_bytes: int = PAGE_BYTES

    def __post_init__(self) -> None:
        for name in ("shard_images", "max_side", "shorter_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name.replace('_', '-')}: expected 1 or more, got {value}")
        if self.max_side is not None and self.shorter_side is not None:
            raise DataError("max-side, shorter-side: expected at most one of the two")
        if self.page_bytes < MIN_PAGE_BYTES or self.page_bytes & (self.page_bytes - 1) or self.page_bytes >= 2**32:
            raise DataError(f"page-mib: expected a power of two from 2 to 2048, got {self.page_bytes / 2**20:g}")

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        scale = 1.0
        if self.max_side is not None:
            scale = self.max_side / max(width, height)
        elif self.shorter_side is not None:
            scale = self.shorter_side / min(width, height)
        return (width, height) if scale >= 1 else (max(1, round(width * scale)), max(1, round(height * scale)))


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: PackSettings | None = None,
    *,
    name: str | None = None,
    jobs: int | None = None,
    max_refused_share: float = 0.5,
    **options: Any,
) -> dict[str, Any]:
    """Pack a source into `out` and return the index as written to `out/index.json`.

    Args:
        source: a caption file, a tar, a folder of tars or a pattern.
        out: folder, made where it is missing.
        name: of the set and its shards; by default that of the source.
        jobs: threads; default: one a core. The bytes written are the same for any number.
        max_refused_share: more than this share of the images refused is an error; shards stay, no index is written.
        options: images, format, split, questions, answers, limit of `pack_sources.read_source`.

    Raises:
        DataError: an option or the source cannot be used, or too much of it is refused. OSError: the disk is full, say.
    """
    settings, folder = settings or PackSettings(), Path(out)
    jobs = jobs if jobs is not None else os.cpu_count() or 1
    if jobs < 1:
        raise DataError(f"jobs: expected 1 or more, got {jobs}")
    name = name or re.sub(r"[^A-Za-z0-9_.-]+", "_", stem(os.fspath(source)).removesuffix(".tar")).strip("_") or "pack"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise DataError(f"name: expected letters, digits, '_', '.' and '-', got {name!r}")
    found = read_source(source, max_refused_share=max_refused_share, **options)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"out: expected a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{name}-*.tmp"):  # of a killed run
        leftover.unlink(missing_ok=True)
    log = RunLog(folder, name="pack.jsonl")
    try:
        shards = _write_shards(found, folder, name, settings, jobs, log)
    finally:
        log.close()
    return _finish(found, folder, name, settings, shards, max_refused_share)


def _write_shards(
    found: PackSource, folder: Path, name: str, settings: PackSettings, jobs: int, log: RunLog
) -> list[dict[str, Any]]:
    """The records of all shards, those kept and those written."""
    total, records, made, kept, started = len(found.items), [], 0, 0, time.monotonic()
    with ThreadPoolExecutor(jobs, thread_name_prefix="pack") as pool:
        for number, at in enumerate(range(0, total, settings.shard_images)):
            items = found.items[at : at + settings.shard_images]
            path = folder / f"{name}-{number:05d}.beton"
            key = _shard_key(items, settings)
            record = _kept(path, key)
            kept += record is not None
            if record is None:
                made_before = made

                def show(done: int, at: int = at, made_before: int = made_before) -> None:
                    rate = (made_before + done) / max(time.monotonic() - started, 1e-9)
                    eta = "" if console.is_terminal else f", {duration((total - at - done) / max(rate, 1e-9))} left"
                    log.progress("pack", at + done, total, f"{at + done:,} of {total:,} images, {rate:,.0f}/s{eta}")

                # its old record would vouch for a shard that is being replaced
                _record_path(path).unlink(missing_ok=True)
                record = {"key": key, **_write_shard(path, items, settings, pool, jobs * _AHEAD_PER_JOB, show)}
                write_json(_record_path(path), record)
                made += len(items)
            records.append(record)
            log.event("shard", file=path.name, samples=record["samples"], refused=len(record["refused"]))
    log.end_progress()
    if kept:
        log.say(f"kept {kept:,} of {len(records):,} shards, which an earlier run had finished")
    return records


def _write_shard(
    path: Path, items: list[PackItem], settings: PackSettings, pool: ThreadPoolExecutor, ahead: int, show: Any
) -> dict[str, Any]:
    """Write one shard; none where every image of it is refused."""
    refused: list[Refused] = []
    captions = 0
    writer = BetonWriter(path, _FIELDS, len(items), settings.page_bytes)
    try:
        for done, (item, prepared) in enumerate(_in_order(items, settings, pool, ahead), 1):
            where = f"{item.path}, image_id {item.about['image_id']!a}"
            if isinstance(prepared, ImageRefused):
                refused.append((prepared.reason, where, prepared.detail))
            else:
                try:
                    writer.write({IMAGE_FIELD: prepared, CAPTIONS_FIELD: item.about})
                    captions += len(item.about["captions"])
                except BetonError as error:
                    refused.append(("larger_than_a_page", where, f"{error.what}: --page-mib, --max-side"))
            show(done)
        if writer.samples:
            writer.finish()
        else:
            path.unlink(missing_ok=True)
    finally:
        writer.abort()
    about = {"file": path.name, "samples": writer.samples, "captions": captions, "refused": refused}
    if writer.samples:
        about.update(bytes=path.stat().st_size, header_sha256=BetonReader(path).header_hash)
    return about


def _in_order(
    items: list[PackItem], settings: PackSettings, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[PackItem, bytes | np.ndarray | ImageRefused]]:
    """Each item with its prepared image, in the items' order, at most `ahead` at once."""
    waiting: deque[tuple[PackItem, Future[bytes | np.ndarray | ImageRefused]]] = deque()
    try:
        for item in items:
            if len(waiting) == ahead:
                first, future = waiting.popleft()
                yield first, future.result()
            waiting.append((item, pool.submit(_prepare, item, settings)))
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _prepare(item: PackItem, settings: PackSettings) -> bytes | np.ndarray | ImageRefused:
    try:
        return prepare_image(item.path, settings)
    except ImageRefused as refusal:
        return refusal


def prepare_image(path: str | os.PathLike[str] | TarMember, settings: PackSettings) -> bytes | np.ndarray:
    """What is stored of an image: its own JPEG bytes, a new JPEG, or with `raw` uint8 (height, width, 3).

    Raises:
        ImageRefused: as `read_image`.
    """
    content = read_bytes(path)
    try:
        rgb = read_image(content)
    except ImageRefused as refusal:
        raise ImageRefused(refusal.reason, str(path), refusal.detail) from refusal
    size = settings.target_size(*rgb.size)
    if not settings.raw and size == rgb.size:
        header = jpeg_header(content)
        is_plain = header is not None and header.is_plain and (header.width, header.height) == rgb.size
        if is_plain and is_stored_upright(content):
            return content
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    if max(size) > JPEG_SIDE_LIMIT:
        raise ImageRefused(
            "too_many_pixels", str(path), f"{size[0]} x {size[1]}, a side of {JPEG_SIDE_LIMIT:,} is the limit"
        )
    if settings.raw:
        return np.asarray(rgb)
    buffer = io.BytesIO()
    # a JPEG has lost its fine colour already; a palette's dots would be lost here
    rgb.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0" if jpeg_header(content) else "4:4:4")
    return buffer.getvalue()


def _shard_key(items: list[PackItem], settings: PackSettings) -> str:
    """Hash of all that decides a shard: settings, captions, and each image file's name, size and time."""
    digest = hashlib.sha256(json.dumps([PACK_FORMAT, PACK_VERSION, JPEG_QUALITY, asdict(settings)]).encode())
    for item in items:
        try:
            status = item.path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            stamp = None
        offset = item.path.offset if isinstance(item.path, TarMember) else None
        digest.update(json.dumps([item.about, str(item.path), offset, stamp]).encode())
    return digest.hexdigest()


def _record_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    """The record of a finished shard that is whole and still right; None where it has to be written."""
    try:
        record = json.loads(_record_path(path).read_text())
        if record["key"] != key:
            return None
        if record["samples"] == 0:
            return record
        whole = path.stat().st_size == record["bytes"] and BetonReader(path).header_hash == record["header_sha256"]
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finish(
    found: PackSource, folder: Path, name: str, settings: PackSettings, shards: list[dict[str, Any]], max_share: float
) -> dict[str, Any]:
    """Write `refused.json` and, where enough is usable, `index.json`."""
    report: RefusalReport = found.report
    for shard in shards:
        for reason, where, detail in shard["refused"]:
            report.add("images", reason, where, detail)
    write_json(folder / REFUSED_NAME, report.to_dict())
    samples = sum(shard["samples"] for shard in shards)
    check_outcome(report, "images", samples, max_share)
    keys = ("file", "samples", "captions", "bytes", "header_sha256")
    index = {
        "format": PACK_FORMAT, "version": PACK_VERSION, "name": name, "samples": samples,
        "captions": sum(shard["captions"] for shard in shards), "fields": _FIELDS, "keeps_captions": found.keeps_captions,
        "shards": [{key: shard[key] for key in keys} for shard in shards if shard["samples"]],
        "sources": found.files, "settings": {**asdict(settings), "jpeg_quality": JPEG_QUALITY},
        "refused": {"summary": report.summary(), "counts": {unit: dict(c) for unit, c in report.counts.items()}},
    }  # fmt: skip
    write_json(folder / INDEX_NAME, index)
    return index


def main(options: argparse.Namespace) -> int:
    """The command; exit code 1 where it had to stop and can be taken up by the same command."""
    settings = PackSettings(
        options.shard_images, options.max_side, options.shorter_side, options.raw, options.page_mib << 20
    )
    try:
        index = pack(
            options.source, options.out, settings, name=options.name, jobs=options.jobs, max_refused_share=options.max_refused_share,
            images=options.images, format=options.format, split=options.split, questions=options.questions,
            answers=options.answers, limit=options.limit,
        )  # fmt: skip
    except (OSError, KeyboardInterrupt) as error:
        what = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else f"{error.strerror or error}: {error.filename or options.out}"
        )
        remedy = "free some space and " if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"pack stopped: {what}; {remedy}run the same command again: finished shards are kept", file=sys.stderr)
        return 1
    folder, shards = Path(options.out), index["shards"]
    size = sum(shard["bytes"] for shard in shards)
    print(index["refused"]["summary"] + (f" ({folder / REFUSED_NAME})" if index["refused"]["counts"] else ""))
    last = f" to {shards[-1]['file']}" if len(shards) > 1 else ""
    print(f"wrote {index['samples']:,} images with {index['captions']:,} captions, {size / 2**20:,.1f} MiB:")
    print(f"  {folder / shards[0]['file']}{last}\n  {folder / INDEX_NAME}")
    print(f"in a recipe: {{captions: {folder}, format: pack}}")
    return 0
