"""Writing `.beton` files (FFCV's format, version 2, see `beton`), each whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import fsync
from .beton import (
    DESCRIPTOR,
    HEADER,
    JPG,
    KINDS,
    MIN_PAGE_BYTES,
    PAGE_BYTES,
    RAW,
    ROWS,
    TABLE_ROW,
    VERSION,
    BetonError,
    round_up,
)
from .jpeg_header import jpeg_header


class BetonWriter:
    """Writes one `.beton` file; under its own name only once it is whole, and the same bytes for the same samples.

    Use it as a context manager: an exception inside leaves nothing behind. One writer a file: a set is sharded by
    opening one after another.

    Args:
        path: the file; replaced where it exists.
        fields: kind of each field by name, in order: 'rgb', 'json', 'bytes', 'int' or 'float'.
        capacity: the most samples that will be written, which fixes where the data starts.
        page_bytes: a power of two from 2 MiB up; the largest sample, all its fields together.

    Raises:
        BetonError: an argument cannot be used, or a sample cannot be stored. OSError: the disk is full, say.
    """

    def __init__(
        self, path: str | os.PathLike[str], fields: Mapping[str, str], capacity: int, page_bytes: int = PAGE_BYTES
    ):  # fmt: skip
        self.path = Path(path)
        if page_bytes < MIN_PAGE_BYTES or page_bytes & (page_bytes - 1) or page_bytes >= 2**32:
            raise BetonError(path, f"page_bytes: expected a power of two from 2 MiB to 2 GiB, got {page_bytes}")
        if not fields or not {"rgb", "json", "bytes", "int", "float"}.issuperset(fields.values()):
            raise BetonError(path, f"fields: expected kinds rgb, json, bytes, int or float by name, got {dict(fields)}")
        for name in fields:
            if not (name.isascii() and name.isprintable() and 1 <= len(name) <= 16):
                raise BetonError(path, f"fields: expected ASCII names of 1 to 16 characters, got {name!r}")
        if not 1 <= capacity < 2**48:
            raise BetonError(path, f"capacity: expected the number of samples, 1 or more, got {capacity}")
        self.fields, self.page_bytes, self.capacity = dict(fields), page_bytes, capacity
        self._row = np.dtype([(f"f{i}", ROWS[kind]) for i, kind in enumerate(fields.values())], align=True)
        self._metadata = np.zeros(capacity, self._row)
        self._table: list[tuple[int, int, int]] = []
        self.samples = 0
        head = HEADER.size + len(fields) * DESCRIPTOR.size
        self._at = round_up(head + self._metadata.nbytes, page_bytes)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by `finish` and `abort`

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def write(self, values: Mapping[str, Any]) -> int:
        """Add a sample and return its number.

        values: by field name. rgb: a JPEG as bytes, or uint8 (height, width, 3); json: what `json.dumps` takes; bytes:
        one or more of them; int, float: numbers.
        """
        if self.samples == self.capacity:
            raise BetonError(self.path, f"capacity: expected at most {self.capacity:,} samples, got one more")
        if values.keys() != self.fields.keys():
            raise BetonError(
                self.path, f"values: expected {', '.join(self.fields)}, got {', '.join(values)}", self.samples
            )
        parts = [self._encode(name, kind, values[name]) for name, kind in self.fields.items()]
        total = sum(len(content) for _, content in parts if content is not None)
        if total > self.page_bytes:
            what = f"{total:,} bytes do not fit a page of {self.page_bytes:,}; enlarge the pages or shrink the image"
            raise BetonError(self.path, what, self.samples)
        if self._at % self.page_bytes + total > self.page_bytes:
            self._at = round_up(self._at, self.page_bytes)
        self._file.seek(self._at)
        for index, (row, content) in enumerate(parts):
            self._metadata[f"f{index}"][self.samples] = row
            if content is not None:
                self._file.write(content)
                self._metadata[f"f{index}"]["pointer"][self.samples] = self._at
                self._table.append((self.samples, self._at, len(content)))
                self._at += len(content)
        self.samples += 1
        return self.samples - 1

    def finish(self) -> None:
        """Write table, rows and header, bring everything to the disk and give the file its name."""
        try:
            table_at = round_up(self._at, self.page_bytes)
            self._file.seek(table_at)
            self._file.write(np.array(self._table, TABLE_ROW).tobytes())
            self._file.truncate(table_at + len(self._table) * TABLE_ROW.itemsize)  # full pages without any rows, too
            self._file.seek(0)
            self._file.write(HEADER.pack(VERSION, len(self.fields), self.page_bytes, self.samples, table_at))
            type_ids = {kind: type_id for type_id, kind in KINDS.items()}
            for name, kind in self.fields.items():
                self._file.write(DESCRIPTOR.pack(type_ids[kind], name.encode("ascii"), b""))
            self._file.write(self._metadata[: self.samples].tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            fsync(self.path.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Leave nothing behind; a finished file stays."""
        with contextlib.suppress(OSError):  # what the full disk has not taken yet
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _encode(self, name: str, kind: str, value: Any) -> tuple[Any, bytes | memoryview | None]:
        """(row with its pointer still 0, bytes for the page or None)."""
        if kind == "int":
            if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
                raise BetonError(self.path, f"expected an integer of 64 bits, got {value!r}", self.samples, name)
            return value, None
        if kind == "float":
            return float(value), None
        if kind == "rgb":
            return self._encode_image(name, value)
        content = json.dumps(value).encode("ascii") + b"\0" if kind == "json" else bytes(value)
        if not content:
            raise BetonError(self.path, "expected one byte or more, because FFCV cannot read none", self.samples, name)
        return (0, len(content)), content

    def _encode_image(self, name: str, value: Any) -> tuple[tuple[int, ...], bytes | memoryview]:
        if isinstance(value, np.ndarray):
            height, width = value.shape[:2] if value.ndim == 3 else (0, 0)
            if (
                value.dtype != np.uint8
                or value.shape[2:] != (3,)
                or not 0 < max(height, width) < 2**16
                or not value.size
            ):
                what = f"expected uint8 (height, width, 3) of 1 to 65,535 a side, got {value.dtype} {value.shape}"
                raise BetonError(self.path, what, self.samples, name)
            return (RAW, width, height, 0), np.ascontiguousarray(value).tobytes()
        header = jpeg_header(value) if isinstance(value, (bytes, memoryview)) else None
        if header is None or not header.is_plain:
            what = f"expected a JPEG of three components of 8 bits, or an array, got {header or type(value).__name__}"
            raise BetonError(self.path, what, self.samples, name)
        return (JPG, header.width, header.height, 0), value
