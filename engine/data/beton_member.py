"""An image inside a packed set, read in place: where a record's `path` is a file, it can be a `BetonMember` as well."""

from __future__ import annotations

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
