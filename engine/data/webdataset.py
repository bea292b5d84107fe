"""WebDataset tars (LAION-COCO as img2dataset writes it): captioned images indexed in place, nothing is unpacked.

Members that share a name up to the first dot of their last part form a sample: `KEY.jpg` with `KEY.json` or `KEY.txt`.
Of several captions with CLIP similarities (`all_captions`, `all_similarities`) the most similar one is used, as in the
VPGTrans authors' code; otherwise `top_caption`, then `caption`, then the text of `KEY.txt`.
Only headers and captions are read here; an image is read when it is asked for, by its offset (`TarMember`).
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .captions import preprocess_caption
from .images import PIXEL_LIMIT, ImageRefused, check_image, read_header
from .reading import DataError, RefusalReport, VerifyImages, check_options, check_outcome, kind, text_fault
from .tar_member import TarMember

TARS_LIMIT = 1_000_000  # a pattern like {0..999999999} must not fill the memory
METADATA_BYTES_LIMIT = 16 << 20
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class TarSample:
    """A captioned image: its id is the tar's path below the folder that all tars share, then the sample's key."""

    image_id: str
    image: TarMember
    caption: str


def is_pattern(text: str) -> bool:
    """Whether a name stands for several files: `{00000..00010}`, `{a,b}`, `*`, `?`, `[...]`."""
    return any(mark in text for mark in "{*?[")


def expand_tars(pattern: str | os.PathLike[str]) -> list[Path]:
    """The tars that a file, a folder (its `*.tar`) or a pattern names, each once; braces in their order, globs sorted.

    A name that braces spell out is listed whether it exists or not, so that a missing shard can be counted.

    Raises:
        DataError: nothing is named, a brace is malformed, or more than `TARS_LIMIT` names come out.
    """
    text = os.fspath(pattern)
    if os.path.isdir(text):
        text = os.path.join(glob.escape(text), "*.tar")
    names: list[str] = []
    for name in [text] if os.path.exists(text) else _expand_braces(text):
        exists = os.path.exists(name)
        names += sorted(glob.glob(name)) if not exists and any(mark in name for mark in "*?[") else [name]
        if len(names) > TARS_LIMIT:
            raise DataError(f"{pattern}: names more than {TARS_LIMIT:,} tars; split it into several sets")
    if not names:
        raise DataError(
            f"{pattern}: no tar matches; check the folder and the pattern, such as 'laion/{{00000..00010}}.tar'"
        )
    return [Path(name) for name in dict.fromkeys(os.path.normpath(name) for name in names)]


def _expand_braces(text: str) -> Iterator[str]:
    parts = _BRACES.split(text)  # literal, inside, literal, inside, ..., literal
    if any(mark in literal for literal in parts[::2] for mark in "{}"):
        raise DataError(f"{text}: a brace without its partner; expected a pattern like '{{00000..00010}}.tar'")
    choices = [_alternatives(part, text) if index % 2 else [part] for index, part in enumerate(parts)]
    if math.prod(len(choice) for choice in choices) > TARS_LIMIT:
        raise DataError(f"{text}: names more than {TARS_LIMIT:,} tars; split it into several sets")
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _alternatives(inside: str, text: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise DataError(f"{text}: {{{inside}}} is neither a range like {{00000..00010}} nor a list like {{a,b}}")
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first >= TARS_LIMIT:
        raise DataError(f"{text}: {{{inside}}}: expected a rising range of at most {TARS_LIMIT:,} numbers")
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def read_tars(
    pattern: str | os.PathLike[str],
    *,
    max_words: int | None = 50,
    verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT,
    limit: int | None = None,
    max_refused_share: float = 0.5,
) -> tuple[list[TarSample], RefusalReport]:
    """Captioned images of WebDataset tars, in the tars' order, and what was refused (`tars`, `members`, `images`, `captions`).

    Nothing is written to disk. Members whose names are absolute or climb (`../`), links, devices and sparse files are
    refused by name; a tar that is missing, compressed, damaged or cut is named, and what came before the damage is used.

    Args:
        pattern: see `expand_tars`.
        max_words: captions go through `preprocess_caption` with it; None keeps them as they are.
        verify_images, max_pixels, limit, max_refused_share: as in `read_captions`.

    Raises:
        DataError: an option or the pattern cannot be used, no image is usable, or too many are refused.
    """
    check_options(limit, max_refused_share)
    report = RefusalReport(os.fspath(pattern))
    samples = list(
        iterate_tars(
            pattern, report, max_words=max_words, verify_images=verify_images, max_pixels=max_pixels, limit=limit
        )
    )
    check_tars_outcome(report, len(samples), max_refused_share)
    return samples, report


def iterate_tars(
    pattern: str | os.PathLike[str], report: RefusalReport, *, max_words: int | None = 50, verify_images: VerifyImages = "header",
    max_pixels: int = PIXEL_LIMIT, limit: int | None = None,
) -> Iterator[TarSample]:  # fmt: skip
    """The usable samples in the tars' order, a tar in memory at a time; the others are counted and named in `report`."""
    if verify_images not in ("none", "header", "full"):
        raise DataError(f"verify_images: expected 'none', 'header' or 'full', got {verify_images!r}")
    verifier = {"none": None, "header": read_header, "full": check_image}[verify_images]
    tars = expand_tars(pattern)
    shared = os.path.commonpath([os.path.abspath(tar.parent) for tar in tars])
    count = 0
    for tar in tars:
        if limit is not None and count >= limit:
            return
        prefix = os.path.relpath(os.path.abspath(tar), shared).removesuffix(".tar")
        for found in _read_tar(tar, report):
            if limit is not None and count >= limit:
                return
            report.examined["images"] += 1
            caption = _usable_caption(found, report, max_words)
            if caption is None or found.image is None:
                continue
            try:
                if verifier is not None:
                    verifier(found.image, max_pixels=max_pixels)
            except ImageRefused as refusal:
                report.add("images", refusal.reason, str(found.image), refusal.detail)
                continue
            count += 1
            yield TarSample(f"{prefix}/{found.key}", found.image, caption)


def check_tars_outcome(report: RefusalReport, usable: int, max_refused_share: float) -> None:
    """Raise DataError where too little of a set of tars is usable."""
    if not usable and report.refused("tars"):
        check_outcome(report, "tars", 0, 1.0)  # names the tar, where no image was even reached
    check_outcome(report, "images", usable, max_refused_share)


@dataclass
class _Found:
    """What one tar holds under one key; `metadata` and `text` are the bytes of `KEY.json` and `KEY.txt`."""

    key: str
    tar: Path
    image: TarMember | None = None
    metadata: bytes | None = None
    text: bytes | None = None
    cut: bool = False
    suffixes: set[str] = field(default_factory=set)


def _read_tar(tar: Path, report: RefusalReport) -> list[_Found]:
    """The samples of one tar, by first appearance; a fault of the tar itself ends it and is counted."""
    report.examined["tars"] += 1
    samples: dict[str, _Found] = {}
    last: _Found | None = None
    fault: tuple[str, str] | None = None
    try:
        with open(tar, "rb") as file:
            for member in _members(file):
                if (refused := _member_fault(member)) is not None:
                    report.examined["members"] += 1
                    report.add("members", refused, f"{tar}: {member.name!a}")
                elif member.isfile():
                    report.examined["members"] += 1
                    last = _take(member, tar, file.fileno(), samples, report) or last
    except _TarFault as error:
        fault = error.reason, error.detail
    except FileNotFoundError:
        fault = "missing", "no such file"
    except OSError as error:
        fault = "unreadable", error.strerror or str(error)
    if fault is not None:
        report.add("tars", fault[0], str(tar), f"{fault[1]}; {len(samples):,} samples came before")
        if last is not None:
            last.cut = True
    return list(samples.values())


class _TarFault(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def _members(file: Any) -> Iterator[tarfile.TarInfo]:
    """The members whose data are complete; raises `_TarFault` where the archive stops being one."""
    size_bytes = os.fstat(file.fileno()).st_size
    head = file.read(6)
    file.seek(0)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise _TarFault("compressed", "images are read in place; decompress it to a plain .tar first")
    name = "its start"
    archive = None
    try:
        archive = tarfile.TarFile(fileobj=file, mode="r")
        while (member := archive.next()) is not None:
            name = f"member {member.name!a}"
            if member.size < 0 or archive.offset <= member.offset:  # a negative size would lead back for ever
                raise _TarFault("damaged", f"{name} has an impossible size")
            if member.isfile() and member.offset_data + member.size > size_bytes:
                raise _TarFault("truncated", f"ends inside {name}")
            yield member
    except (_TarFault, GeneratorExit):
        raise
    except Exception as error:  # damaged headers raise anything from ReadError to IndexError
        cut = size_bytes < 512 or (archive is not None and archive.offset >= size_bytes)
        raise _TarFault("truncated" if cut else "damaged", f"after {name}: {error}") from error
    # tarfile ends without a word at a broken header; an archive's own end is blocks of zeros
    file.seek(archive.offset)
    end = file.read(512)
    if len(end) < 512:
        raise _TarFault("truncated", f"ends after {name}, without the end that a tar has")
    if end.strip(b"\0"):
        raise _TarFault("damaged", f"no header where one is due, after {name}")


def _member_fault(member: tarfile.TarInfo) -> str | None:
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts:
        return "name_outside_the_tar"
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        return "link"
    if not member.isfile():
        return "device_or_other_kind"
    return "sparse" if member.issparse() else None


def _take(
    member: tarfile.TarInfo, tar: Path, descriptor: int, samples: dict[str, _Found], report: RefusalReport
) -> _Found | None:
    """Put a regular file into its sample; None for one that is neither an image nor a caption."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    key, dot, suffix = base.partition(".")
    suffix = suffix.lower()
    if not key or not dot or suffix not in (*_IMAGE_SUFFIXES, "json", "txt"):
        return None
    key = f"{folder}/{key}" if folder else key
    found = samples.setdefault(key, _Found(key, tar))
    if suffix in found.suffixes:
        report.add("members", "duplicate_name", f"{tar}: {member.name!a}", "the first is used")
        return found
    found.suffixes.add(suffix)
    if suffix in _IMAGE_SUFFIXES:
        found.image = found.image or TarMember(tar, member.name, member.offset_data, member.size)
    elif member.size > METADATA_BYTES_LIMIT:
        report.add("members", "too_large", f"{tar}: {member.name!a}", f"{member.size:,} bytes")
    else:
        # pread: the archive's own position in the file stays as it is
        content = os.pread(descriptor, member.size, member.offset_data)
        if suffix == "json":
            found.metadata = content
        else:
            found.text = content
    return found


def _usable_caption(found: _Found, report: RefusalReport, max_words: int | None) -> str | None:
    """The caption of a sample that has its image; otherwise None, with what is wrong counted."""
    where = f"{found.tar}: {found.key!a}"
    incomplete = found.image is None or (found.metadata is None and found.text is None)
    if incomplete and found.cut:
        report.add("images", "truncated", where, "the tar ends inside this sample")
        return None
    if text_fault(found.key, "key", True) is not None:
        report.add("images", "key_not_utf8", where)
        return None
    if found.image is None:
        report.add("images", "without_image", where, f"expected {found.key}.jpg beside its caption")
        return None
    report.examined["captions"] += 1
    caption, fault = _choose_caption(found)
    if fault is None:
        reason = text_fault(caption, "caption", True)
        text = "" if reason else caption if max_words is None else preprocess_caption(caption, max_words)
        if reason is None and text.strip():
            return text
        fault = reason or "caption_empty", ascii(caption)[:200]
    if fault[0] != "without_captions":
        report.add("captions", fault[0], where, fault[1])
    report.add("images", "without_captions", where, fault[1] if fault[0] == "without_captions" else fault[0])
    return None


def _choose_caption(found: _Found) -> tuple[Any, tuple[str, str] | None]:
    """(caption, None), or (None, (reason, detail))."""
    if found.metadata is not None:
        try:
            metadata = json.loads(found.metadata.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return None, ("metadata_not_json", f"{found.key}.json: {error}")
        if not isinstance(metadata, dict):
            return None, ("metadata_not_json", f"{found.key}.json: expected an object, got a {kind(metadata)}")
        captions, similarities = metadata.get("all_captions"), metadata.get("all_similarities")
        if captions and similarities:
            return _most_similar(captions, similarities)
        for field_name in ("top_caption", "caption"):
            if metadata.get(field_name) is not None:
                return metadata[field_name], None
    if found.text is not None:
        return found.text.decode("utf-8", "surrogateescape"), None
    return None, ("without_captions", "no KEY.json with 'top_caption' or 'caption', and no KEY.txt")


def _most_similar(captions: Any, similarities: Any) -> tuple[Any, tuple[str, str] | None]:
    if not isinstance(captions, list) or not isinstance(similarities, list) or len(captions) != len(similarities):
        return None, ("similarities_malformed", "expected all_captions and all_similarities to be lists of one length")
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and abs(s) < math.inf for s in similarities):
        return None, ("similarities_malformed", f"expected finite numbers, got {ascii(similarities)[:150]}")
    return captions[similarities.index(max(similarities))], None  # the first of equals, as argmax
