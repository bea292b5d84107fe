"""An image inside a tar, read in place: where a record's `path` is a file, it can be a `TarMember` as well."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class TarMember:
    """`size` bytes at byte `offset` of the uncompressed archive `tar`, stored there under the name `member`."""

    tar: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name

    def __str__(self) -> str:
        return f"{self.tar}/{self.member}"

    def resolve(self) -> TarMember:
        """The same member by the absolute path of its tar."""
        return replace(self, tar=self.tar.resolve())

    def stat(self) -> os.stat_result:
        """The tar's status with the member's own size; raises OSError where the tar is gone."""
        status = list(os.stat(self.tar)[:10])
        status[6] = self.size
        return os.stat_result(status)
