"""What the readers of data files share: JSON with clear errors, refused entries counted and named, images located.

A damaged entry is refused by name and counted, and the rest is read; a damaged file is a `DataError`.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .images import ImageRefused, check_image, read_header

VerifyImages = Literal["none", "header", "full"]

READ_BYTES = 16 << 20
JSON_BYTES_LIMIT = 4 << 30  # after decompression; a small gzip file can hold any amount of zeros
NAMED_PER_REASON = 1000  # counts stay exact beyond it, names stop
_GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """A data file, or an option for reading it, that cannot be used at all."""


@dataclass(frozen=True)
class Refusal:
    """One refused entry. `where` says which: its id and place in the file."""

    unit: str
    reason: str
    where: str
    detail: str = ""


@dataclass
class RefusalReport:
    """What was looked at and what was refused, counted by unit (`images`, `captions`, ...) and reason."""

    source: str
    examined: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    named: list[Refusal] = field(default_factory=list)

    def add(self, unit: str, reason: str, where: str, detail: str = "") -> None:
        by_reason = self.counts.setdefault(unit, Counter())
        by_reason[reason] += 1
        if by_reason[reason] <= NAMED_PER_REASON:
            self.named.append(Refusal(unit, reason, where, detail))

    def refused(self, unit: str) -> int:
        return sum(self.counts.get(unit, Counter()).values())

    def summary(self) -> str:
        """One line: `12 of 5,000 images refused: 7 truncated, 5 missing; 0 of 25,000 captions refused`."""
        parts = []
        for unit in sorted(set(self.examined) | set(self.counts), key=_unit_order):
            part = f"{self.refused(unit):,} of {self.examined[unit]:,} {unit} refused"
            reasons = sorted(self.counts.get(unit, Counter()).items(), key=lambda item: (-item[1], item[0]))
            if reasons:
                part += ": " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons)
            parts.append(part)
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "summary": self.summary(),
            "examined": dict(self.examined),
            "counts": {unit: dict(counts) for unit, counts in self.counts.items()},
            "named_per_reason_at_most": NAMED_PER_REASON,
            "named": [vars(refusal) for refusal in self.named],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RefusalReport:
        """What `to_dict` has made."""
        counts = {unit: Counter(reasons) for unit, reasons in value["counts"].items()}
        named = [Refusal(**refusal) for refusal in value["named"]]
        return cls(value["source"], Counter(value["examined"]), counts, named)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report (ASCII JSON, so that broken text in it survives)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="ascii")


def _unit_order(unit: str) -> tuple[int, str]:
    order = ("images", "captions", "questions", "annotations")
    return (order.index(unit) if unit in order else len(order), unit)


def read_json(path: str | os.PathLike[str], expected: str) -> tuple[Any, bool]:
    """Parse a JSON file, gzip'd or plain.

    Bytes that are not UTF-8 become surrogates U+DC80..U+DCFF, so that only the strings they are in are lost.

    Args:
        path: the file.
        expected: what it should hold, for messages.

    Returns:
        The value, and whether the file was valid UTF-8 throughout.

    Raises:
        DataError: not there, not readable, too large, damaged gzip, not JSON; with line and column.
    """
    name = os.fspath(path)
    data = _read_bytes(name, expected)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: written in UTF-16, expected UTF-8 JSON with {expected}; save it again as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text, is_utf8 = data.decode("utf-8"), True
    except UnicodeDecodeError:
        text, is_utf8 = data.decode("utf-8", "surrogateescape"), False
    try:
        return json.loads(text), is_utf8
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); expected {expected}; "
            "check that the file is complete, or write it again"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise DataError(f"{name}: JSON that cannot be read ({error}); expected {expected}; write it again") from error


def _read_bytes(name: str, expected: str) -> bytes:
    try:
        with open(name, "rb") as plain:
            is_gzip = plain.read(2) == _GZIP_MAGIC
            plain.seek(0)
            with gzip.GzipFile(fileobj=plain) if is_gzip else plain as stream:
                data = bytearray()  # by pieces: a read of n bytes reserves n, and the limit is 4 GiB
                while len(data) <= JSON_BYTES_LIMIT and (piece := stream.read(READ_BYTES)):
                    data += piece
    except FileNotFoundError as error:
        raise DataError(
            f"{name}: no such file; expected JSON with {expected}; check the path in the recipe (relative paths "
            f"start at the working directory, {os.getcwd()})"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: damaged gzip file ({error}); copy or download it again") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read ({reason}); expected JSON with {expected}") from error
    if len(data) > JSON_BYTES_LIMIT:
        raise DataError(f"{name}: more than {JSON_BYTES_LIMIT:,} bytes of JSON; split it into several sets")
    if not data.strip():
        raise DataError(f"{name}: empty file; expected JSON with {expected}; write or download it again")
    return bytes(data)


def list_under(value: Any, key: str, name: str, expected: str) -> list[Any]:
    """`value[key]`, which must be a list; otherwise a `DataError` that says what the file holds instead."""
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected {expected}, got a top-level {kind(value)}; is this the right file?")
    if not isinstance(value.get(key), list):
        got = f"the type of {key!r} is {kind(value[key])}" if key in value else f"its keys are {sorted(value)[:8]}"
        raise DataError(f"{name}: expected {expected}, but {got}; is this the right file?")
    return value[key]


def kind(value: Any) -> str:
    """JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def is_id(value: Any) -> bool:
    """Whether a value can serve as an id: an integer, or a string that is not empty and is printable as UTF-8."""
    if isinstance(value, str):
        return value != "" and text_fault(value, "id", True) is None
    # True == 1 in Python: a boolean would be taken for another image's id
    return isinstance(value, int) and not isinstance(value, bool)


def text_fault(text: Any, what: str, is_utf8: bool) -> str | None:
    """Why a string from the file cannot be used: a reason, or None."""
    if not isinstance(text, str):
        return f"{what}_not_a_string"
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return None
    escaped = not is_utf8 and any("\udc80" <= character <= "\udcff" for character in text)
    return f"{what}_not_utf8" if escaped else f"{what}_lone_surrogate"


class ImageFinder:
    """Paths of images under one root, each verified once."""

    def __init__(self, images_root: str | os.PathLike[str] | None, verify: VerifyImages, max_pixels: int) -> None:
        if verify not in ("none", "header", "full"):
            raise DataError(f"verify_images: expected 'none', 'header' or 'full', got {verify!r}")
        self.root = None if images_root is None else os.path.normpath(os.fspath(images_root))
        if self.root is not None and not os.path.isdir(self.root):
            raise DataError(
                f"images_root: expected a folder of images, {self.root} is not one; correct the path, or leave "
                "images_root out for a text-only set"
            )
        verifiers: dict[str, Callable[..., object] | None] = {"none": None, "header": read_header, "full": check_image}
        self._verifier = verifiers[verify]
        self._max_pixels = max_pixels
        self._faults: dict[str, tuple[str, str] | None] = {}

    def locate(self, file_name: Any, is_utf8: bool) -> tuple[Path | None, tuple[str, str] | None]:
        """(path, None), or (None, (reason, detail)) for an image that is refused; (None, None) without a root."""
        if self.root is None:
            return None, None
        if file_name is None or file_name == "":
            return None, ("file_name_missing", "")
        fault = text_fault(file_name, "file_name", is_utf8)
        if fault is not None:
            return None, (fault, ascii(file_name)[:200])
        if "\0" in file_name:
            return None, ("file_name_malformed", ascii(file_name)[:200])
        joined = os.path.normpath(os.path.join(self.root, file_name))
        # a data file from elsewhere must not make the program open arbitrary files
        if os.path.commonpath([os.path.abspath(self.root), os.path.abspath(joined)]) != os.path.abspath(self.root):
            return None, ("file_name_outside_images_root", file_name[:200])
        if joined not in self._faults:
            self._faults[joined] = self._verify(joined)
        fault_of_image = self._faults[joined]
        return (None, fault_of_image) if fault_of_image else (Path(joined), None)

    def _verify(self, path: str) -> tuple[str, str] | None:
        if self._verifier is None:
            return None
        try:
            self._verifier(path, max_pixels=self._max_pixels)
        except ImageRefused as refusal:
            return refusal.reason, f"{refusal.path}: {refusal.detail}"
        return None


def check_options(limit: int | None, max_refused_share: float) -> None:
    """Raise `DataError` for an impossible option."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit: expected an integer of 1 or more, or None for all, got {limit!r}")
    if not 0 <= max_refused_share <= 1:
        raise DataError(f"max_refused_share: expected a share from 0 to 1, got {max_refused_share!r}")


def check_outcome(report: RefusalReport, unit: str, usable: int, max_refused_share: float) -> None:
    """Raise `DataError` where nothing is usable or too large a share was refused, with the first example."""
    examined = report.examined[unit]
    share = report.refused(unit) / examined if examined else 0.0
    if usable and share <= max_refused_share:
        return
    first = next((refusal for refusal in report.named if refusal.unit == unit), None)
    example = f"; the first: {first.where}: {first.reason} {first.detail}".rstrip() if first else ""
    if not usable:
        raise DataError(f"{report.source}: no usable {unit}; {report.summary()}{example}")
    raise DataError(
        f"{report.source}: {share:.1%} of the {unit} refused, max_refused_share allows {max_refused_share:.1%}; "
        f"{report.summary()}{example}; check images_root, or raise max_refused_share"
    )


def stem(path: str) -> str:
    """File name without `.json` and `.gz`, the default name of a set."""
    return Path(path).name.removesuffix(".gz").removesuffix(".json")
