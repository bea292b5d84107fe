"""An image inside a packed set, read in place: where a record's `path` is a file, it can be a `BetonMember` as well."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BetonMember:
    """The image of `sample`: `size` bytes at byte `offset` of the `.beton` file `shard`.

    A JPEG, or, where `raw_size` gives (width, height), RGB pixels of 8 bits a channel.
    """

    shard: Path
    sample: int
    offset: int
    size: int
    raw_size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.shard.name}:{self.sample}"

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.sample}"

    def resolve(self) -> BetonMember:
        """The same member by the absolute path of its shard."""
        return replace(self, shard=self.shard.resolve())

    def stat(self) -> os.stat_result:
        """The shard's status with the image's own size; raises OSError where the shard is gone."""
        status = list(os.stat(self.shard)[:10])
        status[6] = self.size
        return os.stat_result(status)

    def read(self) -> bytes:
        """The stored bytes, through a file that stays open between samples; raises OSError, also where the shard is cut."""
        status = os.stat(self.shard)
        file = _open_shard(self.shard, status.st_ino, status.st_size, status.st_mtime_ns)
        content = os.pread(file.descriptor, self.size, self.offset)
        if len(content) != self.size:
            raise OSError(f"{self}: expected {self.size:,} bytes, got {len(content):,}")
        return content


class _OpenFile:
    """Closed when nobody uses it any more: a thread may read while the cache drops it."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=128)
def _open_shard(path: Path, inode: int, size: int, changed_ns: int) -> _OpenFile:
    """One open file a shard; a shard that was written anew is another one."""
    return _OpenFile(path)
