"""The frame header of a JPEG (ITU-T T.81, annex B): its size and coding, read without decoding anything."""

from __future__ import annotations

from dataclasses import dataclass

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables and the reserved JPG marker are no frames
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length
_FILL_LIMIT = 1024  # any number of 0xFF may stand before a marker; a file of nothing else must not take long


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """`process` is the low nibble of the SOF marker: 0 baseline, 1 extended sequential, 2 progressive, 3 lossless."""

    width: int
    height: int
    components: int
    precision_bits: int
    process: int

    @property
    def is_plain(self) -> bool:
        """Whether every JPEG decoder takes it to RGB: three components of 8 bits, sequential or progressive, Huffman."""
        return self.components == 3 and self.precision_bits == 8 and self.process <= 2 and self.width * self.height > 0


def jpeg_header(content: bytes | memoryview) -> JpegHeader | None:
    """The first frame header of a JPEG's bytes; None where there is none to be found."""
    if bytes(content[:2]) != b"\xff\xd8":
        return None
    at, end, fills = 2, len(content), 0
    while at + 4 <= end and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:
            at, fills = at + 1, fills + 1
            if fills > _FILL_LIMIT:
                return None
            continue
        if marker in _ALONE:
            at += 2
            continue
        length = content[at + 2] << 8 | content[at + 3]
        if marker in _FRAMES:
            if length < 8 or at + 10 > end:
                return None
            precision, height_2, width_2, components = (
                content[at + 4], content[at + 5 : at + 7], content[at + 7 : at + 9], content[at + 9],
            )  # fmt: skip
            height, width = int.from_bytes(height_2, "big"), int.from_bytes(width_2, "big")
            return JpegHeader(width, height, components, precision, marker & 0x0F)
        if length < 2 or marker in (0xD8, 0xD9, 0xDA):  # another start, the end, or pixels before any frame
            return None
        at += 2 + length
    return None
