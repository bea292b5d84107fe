"""What `vpgtrans pack` packs: the images of a caption file or of WebDataset tars, with their captions and questions.

Images are only located here, not read; captions are kept as they stand in the source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coco import read_captions, read_questions
from .formats import CaptionFormat, caption_source, default_images, recognise
from .reading import DataError, RefusalReport, read_json
from .tar_member import TarMember
from .webdataset import expand_tars, read_tars


@dataclass(frozen=True, slots=True)
class PackItem:
    """One image to pack; `about` is what goes into its JSON field."""

    path: Path | TarMember
    about: dict[str, Any]


@dataclass(frozen=True)
class PackSource:
    """`files`: what it was read from, {file, bytes, sha256 or mtime_ns}; `keeps_captions`: see `packed.PackIndex`."""

    items: list[PackItem]
    report: RefusalReport
    files: list[dict[str, Any]]
    keeps_captions: bool


def read_source(
    captions: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    format: CaptionFormat = "auto",
    split: str | None = None,
    questions: str | os.PathLike[str] | None = None,
    answers: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    max_refused_share: float = 0.5,
) -> PackSource:
    """Locate everything to pack.

    Args:
        captions, images, format, split: as in a recipe's data entry.
        questions, answers: VQA's files (see `coco.read_questions`) of the same images.
        limit: only the first images.
        max_refused_share: more than this share of them refused is an error.

    Raises:
        DataError: a file or an option cannot be used.
    """
    if answers is not None and questions is None:
        raise DataError("questions: expected the file that the answers belong to, got none")
    source, in_tars = caption_source(captions, format)
    if in_tars:
        if images is not None or split is not None:
            raise DataError(
                f"images, split: expected neither, because the tars of {source} hold both images and captions"
            )
        samples, report = read_tars(
            source, max_words=None, verify_images="none", limit=limit, max_refused_share=max_refused_share
        )
        items = [PackItem(s.image, {"image_id": s.image_id, "captions": [s.caption]}) for s in samples]
        files = [_stamp(tar) for tar in expand_tars(source) if tar.is_file()]
        keeps_captions = False
    else:
        found = read_captions(
            source, images or default_images(source, format), preprocess=False, verify_images="none", limit=limit,
            format=format, split=split, max_refused_share=max_refused_share,
        )  # fmt: skip
        if format == "auto":
            format = recognise(read_json(source, "captions of images")[0], source)
        keeps_captions = format == "minigpt4"
        report, files, items = found.refused, [_hash(Path(source))], []
        for record in found.records:
            assert isinstance(record.path, Path)
            about: dict[str, Any] = {"image_id": record.image_id, "captions": record.captions}
            items.append(PackItem(record.path, about if record.domain is None else {**about, "domain": record.domain}))
    if questions is not None:
        _add_questions(items, questions, answers, report)
        files += [_hash(Path(path)) for path in (questions, answers) if path is not None]
    return PackSource(items, report, files, keeps_captions)


def _add_questions(
    items: list[PackItem],
    questions: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None,
    report: RefusalReport,
) -> None:
    asked = read_questions(questions, answers, preprocess=False)
    report.examined.update(asked.refused.examined)
    for refusal in asked.refused.named:
        report.add(refusal.unit, refusal.reason, refusal.where, refusal.detail)
    about_of = {item.about["image_id"]: item.about for item in items}
    for record in asked.records:
        about = about_of.get(record.image_id)
        if about is None:
            report.add("questions", "question_without_image", f"question_id {record.question_id!a}")
            continue
        entry = {"question_id": record.question_id, "question": record.question, "answers": record.answers}
        about.setdefault("questions", []).append(entry)


def _stamp(path: Path) -> dict[str, Any]:
    """A tar by its size and time: its content may be terabytes."""
    status = path.stat()
    return {"file": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _hash(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
