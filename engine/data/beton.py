"""The `.beton` format, version 2: FFCV's (ffcv.io, 1.0.2), read and written here without FFCV.

Little-endian throughout:

| what | where | content |
| --- | --- | --- |
| header | 0, 24 bytes | u16 version, u16 fields, u32 page bytes (a power of two, 2 MiB or more), u64 samples, u64 pointer to the table |
| descriptors | 1,041 bytes a field | u8 type, 16 bytes of name, 1,024 bytes of arguments |
| metadata | one row a sample | a NumPy aligned struct of the fields' rows, see `ROWS` |
| data | from the next page on | a sample never spans pages; the last page has its full length; pointers are absolute |
| allocation table | to the end of the file | {u64 sample, u64 pointer, u64 bytes}, in any order: the only place where a JPEG's size stands |

Opening a file costs the same for any number of samples: it is mapped and nothing is built. Files written here have their
table in the order of the samples; for others the order is made once, at the first sample that needs it, and kept beside
the file. No pointer and no size is used before it is checked against the map and against the table, so that a damaged
sample is a `BetonError` that names it and never a read outside. (A JPEG's size has no second copy: one that is wrong but
stays within the page shows when the JPEG is decoded.)

FFCV's own reader fails on allocations of zero bytes, so none is ever written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .jpeg_header import jpeg_header

VERSION = 2
MIN_PAGE_BYTES = 1 << 21
PAGE_BYTES = 8 << 20
JPG, RAW = 0, 1

HEADER = struct.Struct("<HHIQQ")
DESCRIPTOR = struct.Struct("<B16s1024s")
TABLE_ROW = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
_RGB_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_SIZED_ROW = np.dtype([("pointer", "<u8"), ("size", "<u8")])
KINDS = {0: "float", 1: "int", 2: "rgb", 3: "bytes", 4: "ndarray", 5: "json", 6: "tensor"}
ROWS = {
    "float": np.dtype("<f8"), "int": np.dtype("<i8"), "rgb": _RGB_ROW, "bytes": _SIZED_ROW, "json": _SIZED_ROW,
    "ndarray": np.dtype("<u8"), "tensor": np.dtype("<u8"),
}  # fmt: skip
_SHAPE_ARGUMENT = struct.Struct("<32QQ")
_INDEX_MAGIC = b"VPGTIDX1"
_INDEX_HEADER = struct.Struct("<8s32sQI4x")


class BetonError(ValueError):
    """A `.beton` file, or a sample of one, that cannot be used; `sample` and `field` are None where it is the file."""

    def __init__(self, path: str | os.PathLike[str], what: str, sample: int | None = None, field: str | None = None):
        self.path, self.what, self.sample, self.field = os.fspath(path), what, sample, field
        where = "" if sample is None else f": sample {sample}" + (f", field {field!r}" if field else "")
        super().__init__(f"{self.path}{where}: {what}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.what, self.sample, self.field)


@dataclass(frozen=True)
class BetonField:
    """One field; `dtype` and `shape` are those of an ndarray or tensor."""

    name: str
    kind: str
    dtype: np.dtype | None = None
    shape: tuple[int, ...] = ()

    @property
    def array_bytes(self) -> int:
        assert self.dtype is not None
        return self.dtype.itemsize * math.prod(self.shape)


class BetonReader:
    """A memory-mapped `.beton` file. Pickled by its path; several threads may read at once.

    Args:
        path: the file.
        keep_index: keep the order of a foreign file's allocation table beside it (`.NAME.index`); a folder that cannot
            be written to is no error.

    Raises:
        BetonError: not there, not a `.beton` file of version 2, or a header that contradicts the file's size.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_index: bool = True):
        self.path = Path(path)
        self._keep_index = keep_index
        try:
            with open(self.path, "rb") as file:
                self._status = os.fstat(file.fileno())
                if self._status.st_size < HEADER.size:
                    raise BetonError(path, f"expected a .beton file, got {self._status.st_size} bytes; write it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, BetonError):
                raise
            raise BetonError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        version, field_count, self.page_bytes, self.samples, table_at = HEADER.unpack_from(self._map)
        if version != VERSION:
            raise BetonError(path, f"expected .beton version {VERSION}, got {version}; is this a .beton file?")
        if self.page_bytes < MIN_PAGE_BYTES or self.page_bytes & (self.page_bytes - 1):
            raise BetonError(path, f"page size: expected a power of two from 2 MiB up, got {self.page_bytes} bytes")
        self._header_bytes = HEADER.size + field_count * DESCRIPTOR.size
        if field_count == 0 or self._header_bytes > len(self._map):
            raise BetonError(path, f"{field_count} fields: expected at least one, described within the file")
        self.fields = self._read_fields(field_count)
        self._positions = {field.name: f"f{index}" for index, field in enumerate(self.fields)}
        pointed = [f.name for f in self.fields if f.kind not in ("int", "float")]
        self._slots = {name: slot for slot, name in enumerate(pointed)}
        row = np.dtype([(f"f{i}", ROWS[field.kind]) for i, field in enumerate(self.fields)], align=True)
        metadata_end = self._header_bytes + self.samples * row.itemsize
        if not metadata_end <= table_at <= len(self._map) or (len(self._map) - table_at) % TABLE_ROW.itemsize:
            raise BetonError(
                path, f"{self.samples:,} samples and an allocation table at byte {table_at:,} do not fit its "
                f"{len(self._map):,} bytes; cut or damaged, copy or write it again",
            )  # fmt: skip
        self._data_start = round_up(metadata_end, self.page_bytes)
        self._data_end = table_at
        self._metadata = np.frombuffer(self._map, row, self.samples, self._header_bytes)
        rows = (len(self._map) - table_at) // TABLE_ROW.itemsize
        self._table = np.frombuffer(self._map, TABLE_ROW, rows, table_at)
        self._rows_per_sample = rows // self.samples if self.samples else 0
        self._order: np.ndarray | None = None
        self._order_known = False

    def __len__(self) -> int:
        return self.samples

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self._keep_index)

    @property
    def header_hash(self) -> str:
        """SHA-256 of the header and the descriptors."""
        return hashlib.sha256(self._map[: self._header_bytes]).hexdigest()

    def read(self, sample: int) -> dict[str, Any]:
        """All fields of a sample by name.

        rgb: a read-only memoryview of the JPEG, or a read-only uint8 array (height, width, 3) where pixels are stored;
        bytes: a memoryview; json: the parsed value; ndarray and tensor: a read-only array. Nothing is copied.

        Raises:
            BetonError: the sample is damaged. IndexError: there is no such sample.
        """
        row = self._row(sample)
        return {field.name: self._value(field, row[f"f{index}"], sample) for index, field in enumerate(self.fields)}

    def read_field(self, sample: int, name: str) -> Any:
        """One field of a sample, as in `read`."""
        row = self._row(sample)
        field = self.field(name)
        return self._value(field, row[self._positions[name]], sample)

    def field(self, name: str) -> BetonField:
        for field in self.fields:
            if field.name == name:
                return field
        raise BetonError(self.path, f"expected a field {name!r}, found {', '.join(f.name for f in self.fields)}")

    def image_rows(self, name: str, samples: np.ndarray) -> np.ndarray:
        """Rows {mode, width, height, pointer} of an rgb field for int64 sample numbers (n,); unchecked but for the range."""
        if self.field(name).kind != "rgb":
            raise BetonError(self.path, f"field {name!r}: expected kind rgb, got {self.field(name).kind}")
        return self._metadata[self._positions[name]][self._checked(samples)]

    def spans(self, name: str, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a field's bytes lie: (offsets, sizes in bytes), int64 (n,), for sample numbers (n,).

        A sample that is damaged (or empty bytes) has size 0; `read_field` then raises what is wrong with it. For JPEGs the content is
        not looked at.
        """
        field, samples = self.field(name), self._checked(samples)
        if name not in self._slots:
            raise BetonError(self.path, f"field {name!r}: expected one that lies in pages, got kind {field.kind}")
        rows = self._metadata[self._positions[name]][samples]
        pointers = rows if field.kind in ("ndarray", "tensor") else rows["pointer"]
        sizes = np.zeros(len(samples), np.uint64)
        found = np.zeros(len(samples), bool)
        if len(self._table):
            guesses = samples * self._rows_per_sample + self._slots[name]
            guessed = self._table[np.minimum(guesses, len(self._table) - 1)]
            found = (guessed["sample"] == samples.astype(np.uint64)) & (guessed["pointer"] == pointers)
            sizes[found] = guessed["size"][found]
        for i in np.flatnonzero(~found):
            sizes[i] = max(self._search(int(samples[i]), int(pointers[i])), default=0)
        page = np.uint64(self.page_bytes)
        inside = (pointers >= np.uint64(self._data_start)) & (pointers < np.uint64(self._data_end)) & (sizes <= page)
        pointers, sizes = np.where(inside, pointers, 0).astype(np.int64), np.where(inside, sizes, 0).astype(np.int64)
        sizes[(pointers % self.page_bytes + sizes > self.page_bytes) | (pointers + sizes > self._data_end)] = 0
        if field.kind == "rgb":
            stored = rows["width"].astype(np.int64) * rows["height"] * 3
            sizes[(rows["mode"] > RAW) | (stored == 0) | ((rows["mode"] == RAW) & (stored != sizes))] = 0
        elif field.kind in ("ndarray", "tensor"):
            sizes[sizes != field.array_bytes] = 0
        else:
            sizes[sizes.astype(np.uint64) != rows["size"]] = 0
        return np.where(sizes > 0, pointers, 0), sizes

    def bytes_at(self, offset: int, size: int) -> memoryview:
        """The bytes of a span, not copied."""
        if not 0 <= offset <= offset + size <= len(self._map):
            raise BetonError(
                self.path, f"bytes {offset:,} to {offset + size:,} lie outside its {len(self._map):,} bytes"
            )
        return memoryview(self._map)[offset : offset + size]

    def _read_fields(self, count: int) -> tuple[BetonField, ...]:
        fields: dict[str, BetonField] = {}
        for index in range(count):
            type_id, raw_name, arguments = DESCRIPTOR.unpack_from(self._map, HEADER.size + index * DESCRIPTOR.size)
            try:
                name = raw_name.rstrip(b"\0").decode("ascii")
            except UnicodeDecodeError:
                name = ""
            if not name.isprintable() or not name or name in fields:
                raise BetonError(self.path, f"field {index}: expected a printable name of its own, got {raw_name!r}")
            kind = KINDS.get(type_id)
            if kind is None:
                what = "a custom field, whose rows only its author's code knows" if type_id == 255 else "unknown"
                raise BetonError(self.path, f"field {name!r}: type {type_id} is {what}; write it as bytes or JSON")
            is_array = kind in ("ndarray", "tensor")
            fields[name] = self._array_field(name, kind, arguments) if is_array else BetonField(name, kind)
        return tuple(fields.values())

    def _array_field(self, name: str, kind: str, arguments: bytes) -> BetonField:
        *shape, length = _SHAPE_ARGUMENT.unpack_from(arguments)
        while shape and shape[-1] == 0:
            shape.pop()
        try:
            described = json.loads(arguments[_SHAPE_ARGUMENT.size :][:length].decode("ascii"))
            (_, text), *more = described
            dtype = np.dtype(text) if isinstance(text, str) and not more else None
        except (ValueError, TypeError, RecursionError, SyntaxError):
            dtype = None
        if dtype is None or dtype.hasobject or math.prod(shape) * dtype.itemsize not in range(1, self.page_bytes + 1):
            raise BetonError(self.path, f"field {name!r}: expected a shape and a dtype of at most a page, both damaged")
        return BetonField(name, kind, dtype, tuple(shape))

    def _row(self, sample: int) -> np.void:
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample: expected 0 to {self.samples - 1:,} in {self.path}, got {sample}")
        return self._metadata[sample]

    def _checked(self, samples: np.ndarray) -> np.ndarray:
        samples = np.asarray(samples, np.int64)
        if samples.size and not 0 <= samples.min() <= samples.max() < self.samples:
            raise IndexError(f"samples: expected 0 to {self.samples - 1:,} in {self.path}, got others")
        return samples

    def _value(self, field: BetonField, row: Any, sample: int) -> Any:
        if field.kind in ("int", "float"):
            return row.item()
        if field.kind in ("bytes", "json"):
            content = self._content(field, sample, int(row["pointer"]), int(row["size"]))
            return content if field.kind == "bytes" else self._parse(field, content, sample)
        if field.kind in ("ndarray", "tensor"):
            content = self._content(field, sample, int(row), field.array_bytes)
            return np.frombuffer(content, field.dtype).reshape(field.shape)
        mode, width, height = int(row["mode"]), int(row["width"]), int(row["height"])
        if mode not in (JPG, RAW) or width == 0 or height == 0:
            raise BetonError(
                self.path,
                f"mode {mode}, {width} x {height} pixels: expected mode 0 or 1 and a size",
                sample,
                field.name,
            )
        content = self._content(field, sample, int(row["pointer"]), width * height * 3 if mode == RAW else None)
        if mode == RAW:
            return np.frombuffer(content, np.uint8).reshape(height, width, 3)
        header = jpeg_header(content)
        if header is None or (header.width, header.height) != (width, height):
            got = "no JPEG" if header is None else f"a JPEG of {header.width} x {header.height}"
            raise BetonError(self.path, f"expected a JPEG of {width} x {height} pixels, got {got}", sample, field.name)
        return content

    def _parse(self, field: BetonField, content: memoryview, sample: int) -> Any:
        try:
            return json.loads(bytes(content).partition(b"\0")[0].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BetonError(self.path, f"not valid JSON: {error}", sample, field.name) from error

    def _content(self, field: BetonField, sample: int, pointer: int, expected: int | None) -> memoryview:
        """The checked bytes of an allocation; `expected` None where only the table knows the size."""
        if not self._data_start <= pointer < self._data_end + (expected == 0):
            what = f"pointer {pointer:,} lies outside the data, bytes {self._data_start:,} to {self._data_end:,}"
            raise BetonError(self.path, what, sample, field.name)
        sizes = self._table_sizes(field.name, sample, pointer)
        size = max(sizes, default=0) if expected is None else expected
        if size not in sizes:
            wanted = "an allocation" if expected is None else f"an allocation of {expected:,} bytes"
            allocated = " and ".join(f"{size:,} bytes" for size in sizes[:3]) or "nothing"
            what = f"expected {wanted} at byte {pointer:,}, the allocation table has {allocated} there for this sample"
            raise BetonError(self.path, what, sample, field.name)
        if size == 0 and field.kind == "bytes":  # FFCV writes empty values, though it cannot read them
            return memoryview(b"")
        if size == 0 or pointer % self.page_bytes + size > self.page_bytes or pointer + size > self._data_end:
            what = f"{size:,} bytes at {pointer:,} are none, or leave their page or the data"
            raise BetonError(self.path, what, sample, field.name)
        return memoryview(self._map)[pointer : pointer + size]

    def _table_sizes(self, name: str, sample: int, pointer: int) -> list[int]:
        """Sizes of a sample's allocations at `pointer`: one, or several where some are empty."""
        guess = sample * self._rows_per_sample + self._slots[name]
        if guess < len(self._table):
            row = self._table[guess]
            if int(row["sample"]) == sample and int(row["pointer"]) == pointer:
                return [int(row["size"])]
        return self._search(sample, pointer)

    def _search(self, sample: int, pointer: int) -> list[int]:
        """The same by binary search in the order of the samples."""
        order = self._sorted_order()
        ids, everything = self._table["sample"], range(len(self._table))

        def id_at(position: int) -> int:
            return int(ids[position if order is None else order[position]])

        low = bisect_left(everything, sample, key=id_at)
        high = bisect_right(everything, sample, lo=low, key=id_at)
        rows = self._table[low:high] if order is None else self._table[order[low:high]]
        mine = (rows["pointer"] == np.uint64(pointer)) & (rows["sample"] == np.uint64(sample))
        return rows["size"][mine].tolist()

    def _sorted_order(self) -> np.ndarray | None:
        """Row numbers of the table by sample, read or built once; None where the table is in that order already."""
        if not self._order_known:
            ids = self._table["sample"]
            if not np.all(ids[:-1] <= ids[1:]):
                self._order = self._load_order()
                if self._order is None:
                    self._order = np.argsort(ids, kind="stable").astype("<u4" if len(ids) < 2**32 else "<u8")
                    self._save_order(self._order)
            self._order_known = True
        return self._order

    @property
    def index_path(self) -> Path:
        """Where the order of a foreign file's table is kept."""
        return self.path.with_name(f".{self.path.name}.index")

    def _order_key(self) -> bytes:
        key = f"{self._status.st_size} {self._status.st_mtime_ns} {self.header_hash}"
        return hashlib.sha256(key.encode()).digest()

    def _load_order(self) -> np.ndarray | None:
        count = len(self._table)
        dtype = np.dtype("<u4" if count < 2**32 else "<u8")
        try:
            with open(self.index_path, "rb") as file:
                head = file.read(_INDEX_HEADER.size)
                if len(head) < _INDEX_HEADER.size:
                    return None
                magic, key, rows, checksum = _INDEX_HEADER.unpack(head)
                if magic != _INDEX_MAGIC or key != self._order_key() or rows != count:
                    return None
                content = file.read(count * dtype.itemsize + 1)
        except OSError:
            return None
        whole = len(content) == count * dtype.itemsize and zlib.crc32(content) == checksum
        return np.frombuffer(content, dtype) if whole else None

    def _save_order(self, order: np.ndarray) -> None:
        if not self._keep_index:
            return
        content = order.tobytes()
        head = _INDEX_HEADER.pack(_INDEX_MAGIC, self._order_key(), len(order), zlib.crc32(content))
        temporary = self.index_path.with_name(f"{self.index_path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(head + content)
            temporary.replace(self.index_path)
        except OSError:  # a read-only folder: the order is made again next time
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _reopen(path: Path, keep_index: bool) -> BetonReader:
    return BetonReader(path, keep_index=keep_index)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
