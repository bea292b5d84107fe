"""The table of a vision or prompt cache: rows of (tokens, width) in memory-mapped shards, each row with its checksum.

    CACHE/vision-NAME-KEY/
        about.json          format, key, layout, and in words what the key was made of; written last of what makes a table
        shard-00000.bin     rows of equal size, as many as fit into SHARD_BYTES (more where there would be over MAX_SHARDS shards)
        rows.crc            8 bytes a row: 0 where it is absent, else CRC-32, PRESENT and, where its image could not be read, UNUSABLE
        unusable.jsonl      row and reason of those
        complete.json       only once every row is there and on the disk

A row is written before its checksum, under a lock of its own, and is never written again: a kill leaves absent rows, a power cut rows that
fail their checksum, and both are computed again.  So processes may fill one table at once, and what one of them has read all of them read.
Once the table is complete, a row that fails is damage and an error.

What is stored may depend, in its last bits, on who came first: a matrix product rounds a row by the shape of its batch.  Either result is as
right as the other; on one process the order of the data decides, and a resumed run reads what the stopped one wrote.

Row v * images + i is view v of image i.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import fsync, write_json
from .reading import DataError

FORMAT = "vpgtrans-features-1"
SHARD_BYTES, MAX_SHARDS = 2**30, 128  # an open map holds a file descriptor
ALIGNMENT = 64  # bytes; a row begins on a multiple
PRESENT, UNUSABLE = 1 << 32, 1 << 33
FP8_MAX = 448.0  # largest finite e4m3


@dataclass(frozen=True)
class Layout:
    """Shape and dtype of what is read; precision fp8 stores e4m3 with one float32 scale a token, which is not exact."""

    views: int
    images: int
    tokens: int
    width: int
    dtype: torch.dtype
    precision: str = "compute"

    @property
    def rows(self) -> int:
        return self.views * self.images

    @property
    def row_bytes(self) -> int:
        values = self.tokens * self.width
        used = values + 4 * self.tokens if self.precision == "fp8" else values * self.dtype.itemsize
        return -(-used // ALIGNMENT) * ALIGNMENT

    @property
    def bytes(self) -> int:
        return self.rows * (self.row_bytes + 8)

    @property
    def shard_rows(self) -> int:
        return max(1, SHARD_BYTES // self.row_bytes, -(-self.rows // MAX_SHARDS))

    def encode(self, values: Tensor) -> Tensor:
        """(B, tokens, width) -> uint8 (B, row_bytes), on the same device."""
        batch = len(values)
        if self.precision == "fp8":
            values = values.float()
            scales = values.abs().amax(-1) / FP8_MAX
            scales = torch.where(scales > 0, scales, 1.0)
            parts = [scales, (values / scales[..., None]).to(torch.float8_e4m3fn)]
        else:
            parts = [values.to(self.dtype)]
        raw = torch.zeros(batch, self.row_bytes, dtype=torch.uint8, device=values.device)
        at = 0
        for part in parts:
            stored = part.contiguous().view(batch, -1).view(torch.uint8)
            raw[:, at : at + stored.shape[1]] = stored
            at += stored.shape[1]
        return raw

    def decode(self, raw: Tensor) -> Tensor:
        """uint8 (B, row_bytes) -> (B, tokens, width) in `dtype`, on the same device."""
        shape, values = (self.tokens, self.width), self.tokens * self.width
        if self.precision == "fp8":
            start = 4 * self.tokens
            scales = raw[:, :start].view(torch.float32)
            stored = raw[:, start : start + values].view(torch.float8_e4m3fn).unflatten(1, shape)
            return (stored.float() * scales[..., None]).to(self.dtype)
        return raw[:, : values * self.dtype.itemsize].view(self.dtype).unflatten(1, shape).contiguous()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), "shard_rows": self.shard_rows}


class FeatureTable:
    """A table on the disk, made where there is none; `about` holds the key and what it was made of.

    Raises DataError when the folder holds something else, or less than it should.
    """

    def __init__(self, folder: Path, layout: Layout, about: dict[str, Any]):
        self.folder, self.layout = folder, layout
        self.damaged: set[int] = set()
        sizes = {
            self._shard(n): min(layout.shard_rows, layout.rows - n * layout.shard_rows) * layout.row_bytes
            for n in range(-(-layout.rows // layout.shard_rows))
        }
        sizes[folder / "rows.crc"] = 8 * layout.rows
        expected = {"format": FORMAT, **about, "layout": layout.to_dict()}
        self._check_about(expected)
        try:
            for path, size in sizes.items():
                self._make_or_check(path, size)
            if not (folder / "about.json").is_file():
                write_json(folder / "about.json", expected)
        except OSError as error:
            raise DataError(
                f"{folder}: expected a folder that can be written, as the cache is not there yet ({error.strerror}); set output.cache to another, "
                "or turn the cache off"
            ) from error
        self.entries: np.ndarray = np.memmap(folder / "rows.crc", dtype="<u8", mode="r").view(np.ndarray)
        self.is_complete = (folder / "complete.json").is_file()
        if self.is_complete and (absent := self.missing()):
            raise self._refused(
                folder / "rows.crc", f"{absent:,} rows have no checksum, although the cache was complete"
            )
        # A row is checked once a process: when it is read, and those that a power cut may have torn before the table is called complete.
        self._verified = np.zeros(layout.rows, bool)
        self._from_before = self.entries != 0
        self._checksums: Any = None
        self._maps: dict[int, np.ndarray] = {}
        self._reasons: dict[int, str] = {}

    def missing(self) -> int:
        """Rows that are absent."""
        return int(self.layout.rows - np.count_nonzero(self.entries))

    def holds(self, rows: Sequence[int]) -> bool:
        """Whether all rows are there; says nothing of their checksums."""
        return bool((self.entries[rows] != 0).all())

    def unusable(self, rows: Sequence[int] | slice = slice(None)) -> dict[int, str]:
        """Which of the rows are of images that could not be read, and why."""
        flagged = np.flatnonzero(self.entries[rows] & UNUSABLE)
        if not len(flagged):
            return {}
        found = flagged.tolist() if isinstance(rows, slice) else [rows[i] for i in flagged]
        if not self._reasons.keys() >= set(found):
            self._reasons = dict(_told(self.folder / "unusable.jsonl"))
        return {row: self._reasons.get(row, "unknown reason") for row in found}

    def read(self, rows: Sequence[int], pinned: bool = False) -> Tensor | None:
        """uint8 (rows, row_bytes); None where a row is absent or, in a table that is not complete, fails its checksum.

        A row is checked once a process: the CRC-32 of 724 kB takes 0.6 ms, copying it 0.1 ms.  Raises DataError when a complete table fails.
        """
        if not self.holds(rows):
            return None
        raw = torch.empty(len(rows), self.layout.row_bytes, dtype=torch.uint8, pin_memory=pinned)
        is_sound = True
        for out, row in zip(raw.numpy(), rows, strict=True):
            np.copyto(out, self._stored(row))
            if not self._verified[row] and not self._is_sound(row, out):
                self._damage(row)
                is_sound = False
        return raw if is_sound else None

    def write(self, rows: Sequence[int], raw: Tensor, unusable: dict[int, str] | None = None) -> None:
        """Store rows that are absent or damaged; what is there stays.  unusable: row -> reason.  Raises OSError when it cannot be written."""
        for row, values in zip(rows, raw.numpy(), strict=True):
            with self.claim(row, 1) as is_ours:
                if not is_ours or (self.entries[row] and row not in self.damaged):
                    continue
                entry = zlib.crc32(values) | PRESENT
                if unusable and row in unusable:
                    entry |= UNUSABLE
                    with (self.folder / "unusable.jsonl").open("a") as file:
                        file.write(json.dumps({"row": row, "why": unusable[row]}) + "\n")
                shard, place = divmod(row, self.layout.shard_rows)
                # Not through the map: a full disk is an error here, and would be a SIGBUS there.
                _write_at(self._shard(shard), values.data, place * self.layout.row_bytes)
                self._set_entry(row, entry)
            self._verified[row] = True
            self.damaged.discard(row)

    @contextlib.contextmanager
    def claim(self, first: int, count: int) -> Iterator[bool]:
        """Keep other processes from writing some rows while inside; False where one of them is at it.  Ends with the process."""
        try:
            fcntl.lockf(self._opened(), fcntl.LOCK_EX | fcntl.LOCK_NB, 8 * count, 8 * first)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: rows may be computed twice
            yield True
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._opened(), fcntl.LOCK_UN, 8 * count, 8 * first)

    def verify(self, rank: int = 0, world_size: int = 1) -> int:
        """Check the rows that were there before and have not been read, of several ranks each its share; those that fail become absent.

        Returns how many did.  Raises DataError where the table is complete.
        """
        failed = self.failing(rank, world_size)
        for row in failed:
            self._damage(row)
            self._set_entry(row, 0)
            self._from_before[row] = False
        self.damaged.clear()
        return len(failed)

    def failing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Rows of `rank`'s share that were there before, have not been read, and fail their checksum."""
        # By number: each rank has read other rows, so that places in its own list would leave some to nobody.
        unread = np.flatnonzero(self._from_before & ~self._verified)
        return [
            row for row in unread[unread % world_size == rank].tolist() if not self._is_sound(row, self._stored(row))
        ]

    def mark_complete(self) -> None:
        """Bring everything to the disk and say so; only after `verify`."""
        for path in sorted(self.folder.glob("shard-*.bin")):
            fsync(path)
        fsync(self.folder / "rows.crc")
        write_json(self.folder / "complete.json", {"rows": self.layout.rows})
        fsync(self.folder)
        self.is_complete = True

    def _is_sound(self, row: int, values: np.ndarray) -> bool:
        if zlib.crc32(values) != int(self.entries[row]) & 0xFFFFFFFF:
            return False
        self._verified[row] = True
        return True

    def _damage(self, row: int) -> None:
        if self.is_complete:
            shard = self._shard(row // self.layout.shard_rows)
            raise self._refused(shard, f"row {row % self.layout.shard_rows:,} fails its checksum")
        self.damaged.add(row)

    def _refused(self, path: Path, what: str) -> DataError:
        return DataError(
            f"{path}: {what}; build the cache again with `vpgtrans cache RECIPE --rebuild`, or delete {self.folder}"
        )

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.bin"

    def _stored(self, row: int) -> np.ndarray:
        """uint8 (row_bytes,) of the map."""
        shard, place = divmod(row, self.layout.shard_rows)
        if shard not in self._maps:
            with self._shard(shard).open("rb") as file:
                whole = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._maps[shard] = np.frombuffer(whole, np.uint8).reshape(-1, self.layout.row_bytes)
        return self._maps[shard][place]

    def _set_entry(self, row: int, entry: int) -> None:
        os.pwrite(self._opened().fileno(), entry.to_bytes(8, "little"), 8 * row)

    def _opened(self) -> Any:
        """rows.crc to write; POSIX locks end when any descriptor of the file is closed, so this one stays open."""
        if self._checksums is None:
            self._checksums = (self.folder / "rows.crc").open("r+b", buffering=0)
        return self._checksums

    def _check_about(self, expected: dict[str, Any]) -> None:
        path = self.folder / "about.json"
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text())
            differing = [k for k in ("format", "key", "layout") if found.get(k) != expected[k]]
        except (ValueError, AttributeError) as error:
            raise self._refused(path, f"expected what a cache was made of, found no such thing ({error})") from error
        if differing:
            name = differing[0]
            raise self._refused(
                path, f"{name}: expected {expected[name]!r}, found {found.get(name)!r}: a foreign cache"
            )

    def _make_or_check(self, path: Path, size: int) -> None:
        is_made = (self.folder / "about.json").is_file()
        if not is_made:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.seek(0, os.SEEK_END) == 0:
                    file.truncate(size)  # sparse
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise self._refused(path, f"expected {size:,} bytes, found {found:,}: truncated, or not of this cache")


def remove_table(folder: Path) -> None:
    """Delete a cache; first what makes it one, so that a kill leaves nothing that passes for it."""
    for name in ("complete.json", "about.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def disk_free_bytes(folder: Path) -> int:
    """Free bytes of the file system that a folder to be is on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def present_rows(folder: Path) -> int:
    """Rows that a table holds; 0 where there is none."""
    path = folder / "rows.crc"
    return int(np.count_nonzero(np.fromfile(path, "<u8"))) if path.is_file() else 0


def _told(path: Path) -> Iterator[tuple[int, str]]:
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a line that a kill cut off
            told = json.loads(line)
            yield told["row"], told["why"]


def _write_at(path: Path, data: memoryview, offset: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(file)
