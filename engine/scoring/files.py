"""Prediction and reference files in their official formats, read whole and checked before anything is scored.

Formats: COCO results `[{image_id, caption}]` against COCO captions `{images: [{id}], annotations: [{image_id, caption}]}`
(cocodataset.org); NoCaps, which adds a `domain` to every image (nocaps.org); VQA results `[{question_id, answer}]`
against `{annotations: [{question_id, answers: [{answer}]}]}` (visualqa.org), OK-VQA alike; GQA results
`[{questionId, prediction}]` against `{question id: {answer}}` (the GQA data set's questions files).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Id = int | str

DOMAINS = ("in-domain", "near-domain", "out-domain")
_GZIP_MAGIC = b"\x1f\x8b"
_NAMED_AT_MOST = 5


class ScoreError(ValueError):
    """Files or options that cannot be scored; the message names the file, what was expected, and the remedy."""


@dataclass(frozen=True)
class JsonFile:
    """A parsed file: its path as given, the SHA-256 of its bytes, its value."""

    name: str
    sha256: str
    value: Any


def read_json_file(path: str | os.PathLike[str], expected: str) -> JsonFile:
    """Parse a JSON file, plain or gzip'd; `expected` says for messages what it should hold.

    Raises ScoreError: not there, not readable, damaged, not UTF-8, not JSON (with line and column).
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ScoreError(f"{name}: no such file; expected {expected}; correct the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ScoreError(f"{name}: cannot be read ({reason}); expected a file with {expected}") from error
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode("utf-8-sig")
        return JsonFile(name, digest, json.loads(text))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScoreError(f"{name}: damaged gzip file ({error}); copy or download it again") from error
    except UnicodeDecodeError as error:
        raise ScoreError(f"{name}: not UTF-8 ({error}); expected {expected}; save it again as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ScoreError(
            f"{name}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); expected {expected}; "
            "check that the file is complete, or write it again"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ScoreError(f"{name}: JSON that cannot be read ({error}); expected {expected}; write it again") from error


def caption_references(file: JsonFile) -> dict[Id, list[str]]:
    """Image id -> its captions as they are in the file, in the order of `images`.

    Raises ScoreError for another shape, duplicate image ids, captions of images that are not listed, and images
    without a caption that holds text.
    """
    images = [_entry_id(file, f"images[{at}]", entry, ("id",)) for at, entry in enumerate(entries(file, "images"))]
    _refuse_duplicates(file, images, "image ids")
    captions: dict[Id, list[str]] = {image: [] for image in images}
    unlisted: list[Id] = []
    for at, entry in enumerate(entries(file, "annotations")):
        where = f"annotations[{at}]"
        image, caption = _entry_id(file, where, entry, ("image_id",)), _entry_text(file, where, entry, ("caption",))
        if image in captions:
            captions[image].append(caption)
        else:
            unlisted.append(image)
    if unlisted:
        raise ScoreError(
            f"{file.name}: {counted(unlisted, 'annotation')} whose image is not listed under 'images'; "
            "add the images or drop the annotations"
        )
    without = [image for image, texts in captions.items() if not any(text.strip() for text in texts)]
    if without:
        raise ScoreError(
            f"{file.name}: {counted(without, 'image')} of {len(images):,} without a reference caption; "
            "add captions, or drop the images"
        )
    return captions


def image_domains(file: JsonFile) -> dict[Id, str]:
    """Image id -> 'in-domain', 'near-domain' or 'out-domain', of a file that `caption_references` took.

    Raises ScoreError where images have none of the three.
    """
    domains = {image["id"]: image.get("domain") for image in file.value["images"]}
    without = [image for image, domain in domains.items() if domain not in DOMAINS]
    if without:
        raise ScoreError(
            f"{file.name}: {counted(without, 'image')} of {len(domains):,} with a 'domain' other than "
            f"{', '.join(DOMAINS)} (first: {domains[without[0]]!a}); take the official NoCaps file, "
            "or use --task caption"
        )
    return domains


def predicted_texts(file: JsonFile, id_keys: tuple[str, ...], text_keys: tuple[str, ...]) -> dict[Id, str]:
    """Id -> predicted text of a list of `{id, text}`, by the first of `id_keys` and of `text_keys` that is there.

    Raises ScoreError for another shape, an empty list and duplicate ids.
    """
    listed = file.value
    if not isinstance(listed, list):
        raise ScoreError(
            f"{file.name}: expected a list of {{{id_keys[0]}, {text_keys[0]}}}, got a top-level {_kind(listed)}; "
            "is this the predictions file?"
        )
    if not listed:
        raise ScoreError(f"{file.name}: an empty list; expected one prediction or more")
    pairs = [
        (_entry_id(file, f"[{at}]", entry, id_keys), _entry_text(file, f"[{at}]", entry, text_keys))
        for at, entry in enumerate(listed)
    ]
    _refuse_duplicates(file, [key for key, _ in pairs], f"{id_keys[0]}s")
    return dict(pairs)


def entries(file: JsonFile, key: str) -> list[Any]:
    """The list under `key` of a file whose top level is an object; ScoreError for any other shape."""
    value = file.value
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        got = f"an object with the keys {sorted(value)[:8]}" if isinstance(value, dict) else f"a {_kind(value)}"
        raise ScoreError(f"{file.name}: expected an object with the list {key!r}, got {got}; is this the right file?")
    return value[key]


def listed_ids(file: JsonFile, key: str, id_key: str) -> list[Id]:
    """The ids of the entries under `key`, none twice; ScoreError otherwise."""
    ids = [_entry_id(file, f"{key}[{at}]", entry, (id_key,)) for at, entry in enumerate(entries(file, key))]
    _refuse_duplicates(file, ids, f"{id_key}s")
    return ids


def check_same_ids(wanted_in: str, wanted: Collection[Id], found_in: str, found: Mapping[Id, str], unit: str) -> None:
    """Raise ScoreError, naming and counting, unless there is one prediction for each wanted id and none besides.

    wanted_in, found_in: file names for the message; unit: 'image' or 'question'.
    """
    missing = [key for key in wanted if key not in found]
    asked = set(wanted)
    unknown = [key for key in found if key not in asked]
    if not missing and not unknown:
        return
    faults = []
    if missing:
        faults.append(f"no prediction for {counted(missing, unit)} of {len(wanted):,} in {wanted_in}")
    if unknown:
        faults.append(f"{counted(unknown, 'prediction')} for {unit}s that {wanted_in} does not have")
    remedy = f"predict every {unit} once, or cut {wanted_in} to the {unit}s that are meant"
    if {type(key) for key in asked}.isdisjoint(type(key) for key in found):
        remedy = "ids are numbers in one file and strings in the other: write them alike"
    raise ScoreError(f"{found_in}: {'; '.join(faults)}; {remedy}")


def counted(ids: Collection[Id], unit: str) -> str:
    """'3 images (4, 7, 9)': how many, and which, the first five by name."""
    shown = ", ".join(repr(key) for key in list(ids)[:_NAMED_AT_MOST])
    more = ", …" if len(ids) > _NAMED_AT_MOST else ""
    return f"{len(ids):,} {unit}{'' if len(ids) == 1 else 's'} ({shown}{more})"


def _entry_id(file: JsonFile, where: str, entry: Any, keys: tuple[str, ...]) -> Id:
    value = _entry_value(file, where, entry, keys)
    # True == 1 in Python: a boolean would be taken for another id
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ScoreError(f"{file.name}: {where}: expected a number or string as {keys[0]!r}, got {_short(value)}")
    return value


def _entry_text(file: JsonFile, where: str, entry: Any, keys: tuple[str, ...]) -> str:
    value = _entry_value(file, where, entry, keys)
    if not isinstance(value, str):
        raise ScoreError(f"{file.name}: {where}: expected text as {keys[0]!r}, got {_short(value)}; write it as text")
    return value


def _entry_value(file: JsonFile, where: str, entry: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(entry, dict):
        for key in keys:
            if key in entry:
                return entry[key]
    raise ScoreError(f"{file.name}: {where}: expected an object with {keys[0]!r}, got {_short(entry)}; mend it")


def _refuse_duplicates(file: JsonFile, ids: Iterable[Id], what: str) -> None:
    repeated = [key for key, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ScoreError(
            f"{file.name}: duplicate {what}: {counted(repeated, 'id')} more than once; keep one entry of each"
        )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:80] + "…"
