"""Token ids of a captioned data set, made once a tokenizer and memory-mapped: opening costs the same for any number of captions.

A table is a folder, written under another name and renamed when complete:

| file | content |
| --- | --- |
| `table.json` | version, key, counts, dtype of the ids, lead, how many images have how many captions, what was refused |
| `captions_before.bin` | int64 (images + 1): captions of all images before image i |
| `tokens_before.bin` | int64 (captions + 1): ids of all captions before caption c |
| `tokens.bin` | ids of all captions, uint16 where the vocabulary fits, else uint32 |
| `questions.bin` | conversations only, int32 (captions): first ids of each caption that are no targets |
| `samples.bin` | packed sets only, int64 (images): each image's number over all shards of the set |
| `records.bin`, `records_before.bin` | sets in tars only: a JSON text an image, where it lies and its captions; bytes before image i |

Ten million captions of 13 ids take 0.4 GB on the disk, and of the memory only what was touched lately.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from .packing import CaptionCounts
from .reading import RefusalReport

TABLE_VERSION = 1
IMAGES_AT_ONCE = 4096  # tokenised together while a table is made; bounds the memory
_COUNTED_AT_ONCE = 1 << 20


class TableError(ValueError):
    """A token table that cannot be used: of another version, cut or damaged."""


class TokenTable(CaptionCounts):
    """A memory-mapped table; what `CaptionData` is to lists. Pickled by its path; safe to read from several threads.

    Args:
        folder: of the table.
        name: of the data set.
        records: the images, one a row of the table (`image_id`, `path`, `captions`).

    Raises:
        TableError: a file is missing or has another size than `table.json` says.
    """

    def __init__(self, folder: Path, name: str, records: Sequence | None):
        self.folder, self.name = folder, name
        self.about = _read_about(folder)
        images, captions = self.about["images"], self.about["captions"]
        self._captions_before = _map(folder, "captions_before", np.int64, images + 1)
        self._tokens_before = _map(folder, "tokens_before", np.int64, captions + 1)
        self._tokens = _map(folder, "tokens", np.dtype(self.about["dtype"]), self.about["tokens"])
        self._questions = _map(folder, "questions", np.int32, captions) if self.about["has_questions"] else None
        self.samples = _map(folder, "samples", np.int64, images) if self.about["has_samples"] else None
        size = self.about["record_bytes"]
        self._records_before = _map(folder, "records_before", np.int64, images + 1) if size else None
        self._records = _map(folder, "records", np.uint8, size) if size else None
        self._lead = tuple(self.about["lead"])
        if records is not None and len(records) != images:
            raise TableError(f"{folder}: expected {len(records):,} images, got {images:,}; delete it, it is made again")
        self.records = records
        self.ids = TableIds(self)
        self.refused = RefusalReport.from_dict(self.about["refused"])

    def __len__(self) -> int:
        return self.about["images"]

    def __getitem__(self, image: int) -> int:
        """How many captions an image has."""
        return int(self._captions_before[image + 1] - self._captions_before[image])

    @property
    def counts(self) -> CaptionCounts:
        return self

    @property
    def pair_count(self) -> int:
        return self.about["captions"]

    @property
    def longest_caption(self) -> int:
        """Tokens of the longest caption; reads 8 bytes a caption."""
        longest = 0
        for at in range(0, self.pair_count, _COUNTED_AT_ONCE):
            edge = self._tokens_before[at : min(at + _COUNTED_AT_ONCE, self.pair_count) + 1]
            longest = max(longest, int(np.diff(edge).max()))
        return longest

    def pairs(self, start: int, stop: int, limit: int | None) -> int:
        """Pairs of images `start` to `stop` with at most `limit` captions each; O(1) without a limit and for the whole set."""
        if limit is None:
            return int(self._captions_before[stop] - self._captions_before[start])
        if (start, stop) == (0, len(self)):
            return sum(min(int(n), limit) * images for n, images in self.about["images_with_captions"].items())
        total = 0
        for at in range(start, stop, _COUNTED_AT_ONCE):
            edge = self._captions_before[at : min(at + _COUNTED_AT_ONCE, stop) + 1]
            total += int(np.minimum(np.diff(edge), limit).sum())
        return total

    def lead(self, image: int) -> tuple[int, ...]:
        """Ids before the visual tokens of an image; none for plain captions."""
        return self._lead

    def question_tokens(self, image: int, caption: int) -> int:
        """How many of the first ids of a caption are no targets; 0 for plain captions."""
        return 0 if self._questions is None else int(self._questions[self._captions_before[image] + caption])

    def stored_record(self, image: int) -> Any:
        """What `write_table` was given as the record of an image."""
        assert self._records is not None and self._records_before is not None
        return json.loads(self._records[self._records_before[image] : self._records_before[image + 1]].tobytes())

    def caption_ids(self, image: int, caption: int) -> np.ndarray:
        """Ids (tokens,) of one caption, a view of the map; IndexError where the image has no such caption."""
        if not 0 <= caption < self[image]:
            raise IndexError(f"caption: expected 0 to {self[image] - 1} of image {image} in {self.name}, got {caption}")
        at = int(self._captions_before[image]) + caption
        return self._tokens[self._tokens_before[at] : self._tokens_before[at + 1]]


class TableIds(Sequence):
    """`ids[i][k]` of a table."""

    def __init__(self, table: TokenTable):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, at: int) -> ImageIds: ...
    @overload
    def __getitem__(self, at: slice) -> list[ImageIds]: ...
    def __getitem__(self, at: int | slice) -> ImageIds | list[ImageIds]:
        if isinstance(at, slice):
            return [ImageIds(self._table, i) for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"image: expected 0 to {len(self) - 1:,}, got {at}")
        return ImageIds(self._table, at % len(self))


class ImageIds(Sequence):
    """Ids of the captions of one image."""

    def __init__(self, table: TokenTable, image: int):
        self._table, self._image = table, image

    def __len__(self) -> int:
        return self._table[self._image]

    def __getitem__(self, caption: int) -> np.ndarray:
        return self._table.caption_ids(self._image, caption)


@dataclass(frozen=True)
class TableRow:
    """One image for `write_table`: ids of its captions; for conversations the count of question ids of each; for packed sets the number of
    the sample; for sets that have no other index what `TokenTable.stored_record` is to give back."""

    captions: Sequence[Sequence[int]]
    questions: Sequence[int] | None = None
    sample: int | None = None
    record: Any = None


def write_table(
    folder: Path, rows: Iterable[TableRow], refused: RefusalReport, *, vocabulary: int, lead: Sequence[int] = (),
) -> None:  # fmt: skip
    """Write a table from a stream of images; nothing stands under `folder` until it is complete.

    Args:
        refused: complete only when `rows` has ended.
        vocabulary: ids are below it.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as stack:
            writer = _Writer(temporary, np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32), stack)
            for row in rows:
                writer.add(row)
            totals = writer.finish()
        about = {**totals, "version": TABLE_VERSION, "lead": list(lead), "refused": refused.to_dict()}
        with (temporary / "table.json").open("w", encoding="ascii") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "table.json").is_file():  # otherwise another process was quicker, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Writer:
    """The files of a table, written side by side."""

    def __init__(self, folder: Path, ids: np.dtype, stack: contextlib.ExitStack):
        self._dtypes = {
            "captions_before": np.dtype(np.int64), "tokens_before": np.dtype(np.int64), "tokens": ids, "questions": np.dtype(np.int32),
            "samples": np.dtype(np.int64), "records_before": np.dtype(np.int64), "records": np.dtype(np.uint8),
        }  # fmt: skip
        self._files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in self._dtypes}
        self._waiting = {name: array("q") for name in self._dtypes}
        self._written = dict.fromkeys(self._dtypes, 0)
        for name in ("captions_before", "tokens_before", "records_before"):
            self._waiting[name].append(0)
        self._with_captions: Counter[int] = Counter()

    def add(self, row: TableRow) -> None:
        waiting = self._waiting
        for ids in row.captions:
            waiting["tokens"].extend(ids)
            waiting["tokens_before"].append(self._count("tokens"))
        self._with_captions[len(row.captions)] += 1
        waiting["captions_before"].append(self._count("tokens_before") - 1)
        waiting["questions"].extend(row.questions or ())
        if row.sample is not None:
            waiting["samples"].append(row.sample)
        if row.record is not None:
            waiting["records"].extend(json.dumps(row.record).encode())
            waiting["records_before"].append(self._count("records"))
        if max(len(waiting["tokens"]), len(waiting["records"])) >= _COUNTED_AT_ONCE:
            self._flush()

    def finish(self) -> dict[str, Any]:
        self._flush()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        images, captions = sum(self._with_captions.values()), self._written["tokens_before"] - 1
        assert self._written["questions"] in (0, captions) and self._written["samples"] in (0, images)
        assert self._written["records_before"] in (1, images + 1)
        return {
            "images": images, "captions": captions, "tokens": self._written["tokens"], "dtype": self._dtypes["tokens"].name,
            "has_questions": self._written["questions"] > 0, "has_samples": self._written["samples"] > 0,
            "record_bytes": self._written["records"],
            "images_with_captions": {str(n): images for n, images in sorted(self._with_captions.items())},
        }  # fmt: skip

    def _count(self, name: str) -> int:
        return self._written[name] + len(self._waiting[name])

    def _flush(self) -> None:
        for name, values in self._waiting.items():
            self._files[name].write(np.asarray(values, self._dtypes[name]).tobytes())
            self._written[name] += len(values)
            self._waiting[name] = array("q")


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "table.json").read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise TableError(f"{folder}: expected a token table, {error}") from None
    if not isinstance(about, dict) or about.get("version") != TABLE_VERSION:
        raise TableError(f"{folder}: expected a token table of version {TABLE_VERSION}, got another")
    return about


def _map(folder: Path, name: str, dtype: Any, count: int) -> np.ndarray:
    """A file as an array, mapped; TableError where its size is wrong."""
    path, expected = folder / f"{name}.bin", np.dtype(dtype).itemsize * count
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        raise TableError(f"{path}: expected {expected:,} bytes, got {'no file' if found < 0 else f'{found:,}'}")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def in_chunks(items: Iterable[Any], size: int = IMAGES_AT_ONCE) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
