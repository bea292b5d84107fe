"""The .beton format: what FFCV writes is read, what is written reads back, and no damage leads outside the file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpgtrans.engine.data import beton_writer
from vpgtrans.engine.data.beton import MIN_PAGE_BYTES, BetonError, BetonReader
from vpgtrans.engine.data.beton_writer import BetonWriter
from vpgtrans.engine.data.jpeg_header import jpeg_header

GOLDEN = Path(__file__).parent / "data" / "ffcv.beton.gz"
FIELDS = {"image": "rgb", "captions": "json"}


def jpeg(width: int = 16, height: int = 8, shade: int = 0, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 90, 255 - shade)).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def write(path: Path, count: int = 6) -> list[dict[str, Any]]:
    samples = []
    with BetonWriter(path, FIELDS, count, MIN_PAGE_BYTES) as writer:
        for i in range(count):
            image = np.full((5, 4 + i, 3), i, np.uint8) if i % 3 == 2 else jpeg(16 + i, 8, i * 9)
            samples.append({"image": image, "captions": {"image_id": i, "captions": [f"café {i}"]}})
            assert writer.write(samples[-1]) == i
    return samples


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    if found.keys() != expected.keys() or found["captions"] != expected["captions"]:
        return False
    image, wanted = found["image"], expected["image"]
    if isinstance(wanted, np.ndarray):
        return isinstance(image, np.ndarray) and np.array_equal(image, wanted)
    return isinstance(image, memoryview) and image == wanted


def test_what_is_written_reads_back(tmp_path):
    samples = write(tmp_path / "a.beton")
    reader = BetonReader(tmp_path / "a.beton")
    assert len(reader) == 6 and [(f.name, f.kind) for f in reader.fields] == [("image", "rgb"), ("captions", "json")]
    assert all(same(reader.read(i), samples[i]) for i in range(6))
    assert reader.read(0)["image"].readonly and not reader.read(2)["image"].flags.writeable
    again = pickle.loads(pickle.dumps(reader))
    assert same(again.read(4), samples[4])
    offsets, sizes = reader.spans("image", np.array([4, 2, 0]))
    assert bytes(reader.bytes_at(int(offsets[0]), int(sizes[0]))) == samples[4]["image"]
    assert sizes.tolist() == [len(samples[4]["image"]), samples[2]["image"].nbytes, len(samples[0]["image"])]
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton"]  # nothing had to be indexed
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match="0 to 5"):
            reader.read(wrong)


def test_the_layout_is_that_of_version_2(tmp_path):
    """Against hand-read bytes, so that a mistake shared by reader and writer shows."""
    path = tmp_path / "a.beton"
    with BetonWriter(
        path, {"label": "int", "image": "rgb", "score": "float", "blob": "bytes"}, 2, MIN_PAGE_BYTES
    ) as writer:
        writer.write({"label": -7, "image": jpeg(20, 10), "score": 0.5, "blob": b"xyz"})
        writer.write({"label": 8, "image": np.zeros((2, 3, 3), np.uint8), "score": 2.0, "blob": b"!"})
    content, page = path.read_bytes(), MIN_PAGE_BYTES
    assert struct.unpack("<HHIQQ", content[:24]) == (2, 4, page, 2, 2 * page)
    assert [content[24 + 1041 * i] for i in range(4)] == [1, 2, 0, 3] and content[25 + 1041 : 30 + 1041] == b"image"
    row = 24 + 4 * 1041  # int64 at 0, the packed 13 bytes at 8, float64 aligned to 24, the packed pair at 32
    size = len(jpeg(20, 10))
    assert struct.unpack("<q", content[row : row + 8]) == (-7,)
    assert struct.unpack("<BHHQ", content[row + 8 : row + 21]) == (0, 20, 10, page)
    assert struct.unpack("<dQQ", content[row + 24 : row + 48]) == (0.5, page + size, 3)
    assert struct.unpack("<BHHQ", content[row + 48 + 8 : row + 48 + 21]) == (1, 3, 2, page + size + 3)
    table = struct.unpack("<12Q", content[2 * page :])
    assert table == (0, page, size, 0, page + size, 3, 1, page + size + 3, 18, 1, page + size + 21, 1)
    assert content[page : page + size] == jpeg(20, 10)
    assert BetonReader(path).read(1)["label"] == 8 and bytes(BetonReader(path).read(0)["blob"]) == b"xyz"


def test_a_sample_stays_within_its_page(tmp_path):
    path, part = tmp_path / "a.beton", MIN_PAGE_BYTES // 8 * 3
    values = [{"a": bytes([i]) * part, "b": bytes([i]) * part} for i in range(1, 4)]
    with BetonWriter(path, {"a": "bytes", "b": "bytes"}, 4, MIN_PAGE_BYTES) as writer:
        for value in values:
            writer.write(value)
        with pytest.raises(BetonError, match="do not fit a page"):
            writer.write({"a": b"x" * MIN_PAGE_BYTES, "b": b"y"})
    reader = BetonReader(path)
    assert [reader.read(i) for i in range(len(reader))] == values
    assert path.stat().st_size == 4 * MIN_PAGE_BYTES + 6 * 24


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a.beton")
    write(tmp_path / "b.beton")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"image": jpeg(), "captions": 1, "more": 1}, "values: expected image, captions, got image, captions, more"),
        ({"image": b"GIF89a", "captions": 1}, "expected a JPEG of three components"),
        ({"image": np.zeros((2, 2), np.uint8), "captions": 1}, "expected uint8 (height, width, 3)"),
        ({"image": np.zeros((0, 2, 3), np.uint8), "captions": 1}, "expected uint8 (height, width, 3)"),
    ],
)
def test_what_cannot_be_stored_is_refused(values, words, tmp_path):
    with BetonWriter(tmp_path / "a.beton", FIELDS, 2, MIN_PAGE_BYTES) as writer:
        with pytest.raises(BetonError) as caught:
            writer.write(values)
        assert words in str(caught.value)
        writer.write({"image": jpeg(), "captions": 1})  # the writer is as it was
    assert len(BetonReader(tmp_path / "a.beton")) == 1


def test_an_empty_value_is_never_allocated(tmp_path):
    with BetonWriter(tmp_path / "a.beton", {"blob": "bytes"}, 1) as writer:
        with pytest.raises(BetonError, match="FFCV cannot read none"):
            writer.write({"blob": b""})
        writer.write({"blob": b"1"})
        with pytest.raises(BetonError, match="at most 1 samples"):
            writer.write({"blob": b"2"})


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), BetonWriter(tmp_path / "a.beton", FIELDS, 1) as writer:
        writer.write({"image": jpeg(), "captions": 1})
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_failing_sync_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "a.beton")
    before = (tmp_path / "a.beton").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beton_writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.beton", 3)
    assert (tmp_path / "a.beton").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.beton"]


@pytest.fixture
def ffcv_file(tmp_path) -> Path:
    path = tmp_path / "ffcv.beton"
    path.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    return path


def test_what_ffcv_wrote_is_read(ffcv_file):
    """Its table is not in the order of the samples, so the sizes of its JPEGs come through the index."""
    reader = BetonReader(ffcv_file)
    expected = json.loads((GOLDEN.parent / "ffcv.json").read_text())
    assert len(reader) == len(expected) == 7
    offsets, sizes = reader.spans("image", np.arange(7))
    for i, wanted in enumerate(expected):
        found = reader.read(i)
        assert hashlib.sha256(found["image"]).hexdigest() == wanted["image_sha256"]
        assert bytes(reader.bytes_at(int(offsets[i]), int(sizes[i]))) == bytes(found["image"])
        assert Image.open(io.BytesIO(found["image"])).size == tuple(wanted["size"])
        for name in ("pixels", "vector", "grid"):
            assert found[name].tolist() == wanted[name]
        assert (found["label"], found["score"], found["captions"]) == (
            wanted["label"],
            wanted["score"],
            wanted["captions"],
        )
        assert list(found["blob"]) == wanted["blob"]


def images(path: Path) -> list[bytes]:
    reader = BetonReader(path)
    return [bytes(reader.read(i)["image"]) for i in range(len(reader))]


def test_the_index_of_a_foreign_file_is_kept(ffcv_file, monkeypatch):
    wanted, kept = images(ffcv_file), BetonReader(ffcv_file).index_path
    assert kept.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(np, "argsort", lambda *_, **__: pytest.fail("indexed again"))
        assert images(ffcv_file) == wanted
    good = kept.read_bytes()
    for damaged in (good[:-1], good + b"\0", good[:60] + bytes([good[60] ^ 1]) + good[61:], b"", b"VPGTIDX1"):
        kept.write_bytes(damaged)
        assert images(ffcv_file) == wanted
        assert kept.read_bytes() == good
    os.utime(ffcv_file, ns=(1, 1))  # another file under the same name: the kept index is not for it
    assert images(ffcv_file) == wanted and kept.read_bytes() != good


def test_a_folder_that_cannot_be_written_to_is_no_error(ffcv_file, monkeypatch):
    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    assert len(images(ffcv_file)) == 7 and not BetonReader(ffcv_file).index_path.exists()


START = """
import resource, sys, time
from pathlib import Path
from vpgtrans.engine.data.beton import BetonReader, BetonError
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def seconds(path):
    path, spent = Path(path), []
    for _ in range(5):
        start = time.process_time()
        BetonReader(path, keep_index=False).read(0)
        spent.append(time.process_time() - start)
    return min(spent)
reader = BetonReader(sys.argv[1])
found = [reader.read(i)["captions"] for i in (0, 4_999_999, 9_999_999)]
offsets, sizes = reader.spans("image", np.array([9_999_999, 5]))
print(len(reader), found, sizes.tolist(), seconds(sys.argv[1]) / seconds(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_ten_million_samples_open_at_once(tmp_path):
    """A synthetic index in a sparse file: the first, the middle and the last sample are real."""
    path, samples, real = tmp_path / "large.beton", 10_000_000, (0, 5, 4_999_999, 9_999_999)
    write(tmp_path / "head.beton", 1)
    image, text = jpeg(), b'{"image_id": 1}\0'
    head = bytearray((tmp_path / "head.beton").read_bytes()[: 24 + 2 * 1041])
    data = -(-(len(head) + samples * 29) // MIN_PAGE_BYTES) * MIN_PAGE_BYTES
    table = data + MIN_PAGE_BYTES
    struct.pack_into("<HHIQQ", head, 0, 2, 2, MIN_PAGE_BYTES, samples, table)
    with path.open("wb") as file:
        file.write(head)
        file.seek(data)
        file.write(image + text)
        for sample in real:
            file.seek(len(head) + sample * 29)
            file.write(struct.pack("<BHHQQQ", 0, 16, 8, data, data + len(image), len(text)))
            file.seek(table + sample * 48)
            file.write(struct.pack("<6Q", sample, data, len(image), sample, data + len(image), len(text)))
        file.truncate(table + samples * 48)
    result = subprocess.run(
        [sys.executable, "-c", START, path, tmp_path / "head.beton"], capture_output=True, text=True, check=True
    ).stdout
    assert result.startswith(
        f"10000000 [{{'image_id': 1}}, {{'image_id': 1}}, {{'image_id': 1}}] [{len(image)}, {len(image)}]"
    )
    times_a_small_file, kib = map(float, result.split()[-2:])
    assert times_a_small_file < 20 and kib < 100 * 1024


def test_a_damaged_sample_is_named(tmp_path):
    path = tmp_path / "a.beton"
    samples = write(path)
    content = bytearray(path.read_bytes())
    row = 24 + 2 * 1041 + 29 * 3
    struct.pack_into("<Q", content, row + 5, 2**63)
    path.write_bytes(content)
    reader = BetonReader(path)
    with pytest.raises(
        BetonError, match="sample 3, field 'image': pointer 9,223,372,036,854,775,808 lies outside"
    ) as caught:
        reader.read(3)
    assert (caught.value.path, caught.value.sample, caught.value.field) == (str(path), 3, "image")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert same(reader.read(2), samples[2]) and reader.spans("image", np.arange(6))[1].astype(bool).tolist() == [
        1,
        1,
        1,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "at, value, words",
    [
        (0, b"\3\0", "expected .beton version 2, got 3"),
        (2, b"\0\0", "0 fields"),
        (4, b"\1\0\0\0", "power of two"),
        (8, b"\xff" * 8, "do not fit"),
        (16, b"\xff" * 8, "do not fit"),
        (24, b"\xff", "custom field"),
        (24, b"\x07", "type 7 is unknown"),
        (25, b"\0" * 16, "printable name"),
        (25 + 1041, b"image\0\0\0\0", "name of its own"),
        (24, b"\x04", "shape and a dtype"),
    ],
)
def test_a_damaged_header_says_what_is_wrong(at, value, words, tmp_path):
    path = tmp_path / "a.beton"
    write(path)
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(BetonError) as caught:
        BetonReader(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_not_a_file_at_all(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name, words in (("absent", "No such file"), ("empty", "0 bytes"), (".", "directory")):
        with pytest.raises(BetonError, match=words):
            BetonReader(tmp_path / name)


def mutate(content: bytes, rng: random.Random, regions: list[tuple[int, int]]) -> tuple[bytes, int]:
    """(mutated copy, first position changed): flipped bits, extreme values, or a cut."""
    if rng.random() < 0.1:
        length = rng.choice([rng.randrange(len(content)), len(content) - rng.randrange(1, 100)])
        return content[:length], length
    start, end = rng.choice(regions)
    at = rng.randrange(start, end)
    changed = bytearray(content)
    if rng.random() < 0.5:
        changed[at] ^= 1 << rng.randrange(8)
    else:
        value = rng.choice(
            [0, 1, 2**16 - 1, 2**32, 2**63, 2**64 - 1, len(content), len(content) - 1, rng.getrandbits(21)]
        )
        changed[at : at + 8] = struct.pack("<Q", value)[: end - at]
    return bytes(changed), at


@pytest.mark.parametrize("source", ["ours", "ffcv"])
def test_mutations_read_right_or_are_refused(source, tmp_path, ffcv_file):
    """Seeded damage to header, descriptors, rows and table. A changed name or kind of a field is another valid file,
    a changed number in a row is another valid number; all else is found."""
    path = tmp_path / "m.beton"
    if source == "ours":
        write(path, 8)
    else:
        ffcv_file.rename(path)
    content = path.read_bytes()
    whole = BetonReader(path, keep_index=False)
    wanted = [comparable(whole.read(i)) for i in range(len(whole))]
    fields = len(whole.fields)
    rows, width = 24 + fields * 1041, whole._metadata.dtype.itemsize
    table = struct.unpack_from("<Q", content, 16)[0]
    described = [(24 + i * 1041, 24 + i * 1041 + 17 + 300) for i in range(fields)]
    regions = [(0, 24), (rows, rows + width * len(whole)), (table, len(content)), *described]
    del whole
    rng, refused, right, slowest = random.Random(5), 0, 0, 0.0
    numbers = {name for name, value in wanted[0].items() if isinstance(value, (int, float))}
    for _ in range(150 if source == "ffcv" else 300):
        changed, at = mutate(content, rng, regions)
        path.write_bytes(changed)
        started = time.thread_time()
        try:
            reader = BetonReader(path, keep_index=False)
        except BetonError:
            refused += 1
            continue
        described_otherwise = 24 <= at < rows
        sizes = {
            f.name: reader.spans(f.name, np.arange(min(len(reader), 20)))[1]
            for f in reader.fields
            if f.name in reader._slots
        }
        for i in range(min(len(reader), 20)):
            try:
                found = comparable(reader.read(i))
            except BetonError as error:
                assert error.sample == i
                refused += 1
                continue
            assert all(size[i] > 0 for size in sizes.values())
            if not described_otherwise:
                assert i < len(wanted)
                assert all(k in numbers or v == wanted[i][k] or is_same_jpeg(v, wanted[i][k]) for k, v in found.items())
                right += 1
        slowest = max(slowest, time.thread_time() - started)
    assert refused > 50 and right > 100 and slowest < 2


def is_same_jpeg(found: bytes, wanted: bytes) -> bool:
    """Whether one starts with the other: a JPEG's size stands in the table alone, so only a decoder can notice a wrong one."""
    found, wanted = (value.removesuffix(b"()") for value in (found, wanted))
    return found[:2] == b"\xff\xd8" and (found.startswith(wanted) or wanted.startswith(found))


def comparable(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.tobytes() + (str(value.shape).encode() if isinstance(value, np.ndarray) else b"()")
        if hasattr(value, "tobytes")
        else value
        for name, value in sample.items()
    }


def test_jpeg_headers():
    assert jpeg_header(jpeg(20, 10)) == jpeg_header(memoryview(jpeg(20, 10)))
    header = jpeg_header(jpeg(20, 10))
    assert (header.width, header.height, header.components, header.process, header.is_plain) == (20, 10, 3, 0, True)
    assert jpeg_header(jpeg(progressive=True)).process == 2
    grey = io.BytesIO()
    Image.new("L", (3, 2)).save(grey, "JPEG")
    assert not jpeg_header(grey.getvalue()).is_plain
    frame = jpeg(20, 10).index(b"\xff\xc0")
    for cut in (0, 1, 2, 3, frame, frame + 3, frame + 8):
        assert jpeg_header(jpeg(20, 10)[:cut]) is None
    assert jpeg_header(b"\xff\xd8" + b"\xff" * 10_000_000) is None
    assert jpeg_header(b"\xff\xd8\xff\xe0\0\1" + jpeg()) is None
