"""Mutated JPEGs through the compiled decoder: `python tests/fuzz_image_decode.py [--count N] [--seed S] [--write FILE]`.

A crash or a hang is the caller's to notice: run it as a process of its own. It checks that every image has a code, that
nothing is written outside the output, that refused images are zeros and that accepted ones equal Pillow's, and prints
how many images got each code as JSON. `--write` writes the records that image_decode_driver.cpp reads instead.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpgtrans.kernels.image_decode import DecodeCode, decode_batch, reference_decode_image

MAX_PIXELS = 1 << 22
FLIP, FAST, TALL_DOWN_FIRST, VECTOR = 1, 2, 4, 8  # flags of a driver record


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colour with edges and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int64) + rng.normal(0, 6, (height, width, 1)).astype(np.int64)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    """One small JPEG of each kind."""
    image = photograph(75, 52, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(image, quality=85, subsampling="4:2:0"),
        encode(image, quality=60, subsampling="4:2:2", restart_marker_blocks=2),
        encode(image, quality=95, subsampling="4:4:4", optimize=True),
        encode(image, quality=75, progressive=True),
        encode(image.convert("L"), quality=80),
        encode(image.convert("CMYK"), quality=80),
        encode(image, quality=70, exif=exif),
        encode(photograph(20, 190, 1), quality=80, progressive=True, subsampling="4:4:4"),
    ]


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """`data` with one to four kinds of damage."""
    array = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if len(array) < 8:
            break
        at = int(rng.integers(2, len(array)))
        span = int(min(rng.integers(1, 64), len(array) - at))
        kind = int(rng.integers(9))
        if kind == 0:
            array[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            array[at : at + span] = rng.integers(0, 256, span, np.uint8).tobytes()
        elif kind == 2:
            del array[at:]
        elif kind == 3:
            del array[at : at + span]
        elif kind == 4:
            array[at:at] = array[at : at + span]
        elif kind == 5:
            array[at : at + 2] = bytes([0xFF, int(rng.integers(256))])
        elif kind == 6:
            array[at:] = other[min(at, len(other)) :]
        elif kind == 7:
            _damage_frame(array, rng)
        else:
            _damage_segment_length(array, rng)
    return bytes(array)


def _damage_frame(array: bytearray, rng: np.random.Generator) -> None:
    """Other numbers for height, width, components and sampling."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = array.find(marker)
        if at >= 0 and at + 19 < len(array):
            field = int(rng.integers(3))
            if field < 2:
                array[at + 5 + 2 * field : at + 7 + 2 * field] = struct.pack(
                    ">H", int(rng.choice([0, 1, 9, 700, 65535]))
                )
            else:
                array[at + 9 + int(rng.integers(10))] = int(rng.integers(256))


def _damage_segment_length(array: bytearray, rng: np.random.Generator) -> None:
    starts = [i for i in range(2, min(len(array) - 4, 700)) if array[i] == 0xFF and array[i + 1] not in (0, 0xFF)]
    if starts:
        at = starts[int(rng.integers(len(starts)))]
        array[at + 2 : at + 4] = struct.pack(">H", int(rng.choice([0, 1, 2, 3, 40, 65535])))


def samples(count: int, seed: int) -> Iterator[tuple[bytes, tuple[int, int, int, int], int, int]]:
    """(JPEG, box, size, flags), some of them whole, most damaged, some with boxes that are not in the image."""
    rng = np.random.default_rng(seed)
    originals = seeds()
    for i in range(count):
        data = originals[int(rng.integers(len(originals)))]
        if i % 16:
            data = mutated(data, originals[int(rng.integers(len(originals)))], rng)
        box = tuple(
            int(v) for v in (rng.integers(-1, 40), rng.integers(0, 40), rng.integers(1, 45), rng.integers(1, 30))
        )
        if rng.integers(3) == 0:
            box = (0, 0, 0, 0)
        yield data, box, int(rng.choice([1, 7, 16, 33, 64])), int(rng.integers(16))


def check(count: int, seed: int) -> Counter[str]:
    """Decodes batches of equal size and checks them; number of images by code."""
    tally: Counter[str] = Counter()
    by_kind: dict[tuple[int, bool], list] = {}
    for data, box, size, flags in samples(count, seed):
        by_kind.setdefault((size, bool(flags & FAST)), []).append((data, box, bool(flags & FLIP)))
    for (size, fast), batch in by_kind.items():
        datas, boxes, flips = map(list, zip(*batch, strict=True))
        guarded = torch.full((len(batch) + 2, 3, size, size), 165, dtype=torch.uint8).to(
            memory_format=torch.channels_last
        )
        mode = "fast" if fast else "exact"
        arguments = dict(threads=3, mode=mode, max_pixels=MAX_PIXELS, impl="cpp")
        out, codes = decode_batch(datas, boxes, flips, size, out=guarded[1:-1], **arguments)
        assert (guarded[0] == 165).all() and (guarded[-1] == 165).all(), "written outside the output"
        for i, code in enumerate(codes.tolist()):
            tally[DecodeCode(code).name] += 1
            if code != DecodeCode.OK:
                assert not out[i].any(), f"refused as {DecodeCode(code).name}, but not zeros"
            elif not fast:
                pixels, pillow_code = reference_decode_image(datas[i], boxes[i], flips[i], size, MAX_PIXELS)
                if pillow_code != DecodeCode.OK:
                    tally["accepted, refused by Pillow"] += 1
                else:
                    assert np.array_equal(out[i].permute(1, 2, 0).numpy(), pixels), f"seed {seed}: not Pillow's pixels"
    return tally


def write_records(path: Path, count: int, seed: int) -> None:
    with path.open("wb") as file:
        for data, box, size, flags in samples(count, seed):
            file.write(struct.pack("<7i", len(data), *box, size, flags) + data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the driver's records instead of decoding")
    options = parser.parse_args()
    if options.write:
        write_records(options.write, options.count, options.seed)
    else:
        print(json.dumps(check(options.count, options.seed)))


if __name__ == "__main__":
    main()
