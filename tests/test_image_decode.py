"""Batch decoding: equal to Pillow bit by bit, a code for everything that is not a picture, no crash whatever comes."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpgtrans.engine.data.images import CLIP_MEAN, CLIP_STD, crop_box, load_pixels, normalise, sample_rng
from vpgtrans.kernels import image_decode
from vpgtrans.kernels.image_decode import (
    DecodeCode,
    decode_batch,
    image_decode_unsupported_reason,
    reference_decode_image,
)

ROOT = Path(__file__).resolve().parents[1]
FUZZ = Path(__file__).with_name("fuzz_image_decode.py")

_spec = importlib.util.spec_from_file_location("fuzz_image_decode", FUZZ)
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

needs_cpp = pytest.mark.skipif(
    image_decode_unsupported_reason() is not None, reason=str(image_decode_unsupported_reason())
)


@pytest.fixture(params=[pytest.param("cpp", marks=needs_cpp), "reference"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def resampled(data: bytes, width: int, height: int, vertical: int, horizontal: int) -> bytes:
    """A JPEG with other luma sampling factors and as many blocks an MCU: its blocks are shuffled, but it is valid."""
    array = bytearray(data)
    at = array.find(b"\xff\xc0")
    assert at > 0 and array[at + 9] == 3
    array[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    array[at + 11] = horizontal << 4 | vertical
    return bytes(array)


def jpegs_of_every_kind() -> dict[str, bytes]:
    image = fuzz.photograph(160, 96, 3)
    return {
        "4:4:4": fuzz.encode(image, quality=90, subsampling="4:4:4"),
        "4:2:2": fuzz.encode(image, quality=90, subsampling="4:2:2"),
        "4:2:0": fuzz.encode(image, quality=90, subsampling="4:2:0"),
        "4:4:0": resampled(fuzz.encode(image, subsampling="4:2:2"), 80, 192, vertical=2, horizontal=1),
        "4:1:1": resampled(fuzz.encode(image, subsampling="4:2:0"), 320, 48, vertical=1, horizontal=4),
        "odd size": fuzz.encode(fuzz.photograph(131, 77, 4), subsampling="4:2:0"),
        "progressive": fuzz.encode(image, progressive=True, subsampling="4:2:0"),
        "restart markers": fuzz.encode(image, restart_marker_blocks=3),
        "grayscale": fuzz.encode(image.convert("L")),
        "CMYK": fuzz.encode(image.convert("CMYK")),
        "tall": fuzz.encode(fuzz.photograph(40, 300, 5), subsampling="4:2:0"),
        "one pixel": fuzz.encode(fuzz.photograph(1, 1, 6).resize((1, 1))),
        "noise": fuzz.encode(Image.fromarray(np.random.default_rng(7).integers(0, 256, (90, 61, 3), np.uint8))),
    }


def random_boxes(width: int, height: int, count: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    boxes = []
    for _ in range(count):
        crop_width, crop_height = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        left, top = int(rng.integers(0, width - crop_width + 1)), int(rng.integers(0, height - crop_height + 1))
        boxes.append((left, top, crop_width, crop_height))
    return boxes


def pillow_pixels(data: bytes, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    """Pillow's decode, crop, bicubic and flip: uint8 [3, size, size]."""
    left, top, width, height = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", list(jpegs_of_every_kind()))
def test_equals_pillow_bit_by_bit(impl: str, kind: str) -> None:
    data = jpegs_of_every_kind()[kind]
    rng = np.random.default_rng(8)
    width, height = Image.open(io.BytesIO(data)).size
    for size in (1, 5, 32, 57, 224):
        boxes = [(0, 0, width, height), *random_boxes(width, height, 12, rng)]
        flips = rng.random(len(boxes)) < 0.5
        out, codes = decode_batch([data] * len(boxes), boxes, flips, size, threads=2, impl=impl)
        assert codes.tolist() == [DecodeCode.OK] * len(boxes)
        for i, box in enumerate(boxes):
            expected = pillow_pixels(data, box, flips[i], size)
            np.testing.assert_array_equal(out[i].numpy(), expected, err_msg=f"{box} to {size}, flip {flips[i]}")


@needs_cpp
@pytest.mark.parametrize("kind", list(jpegs_of_every_kind()))
def test_the_portable_code_gives_what_the_vector_code_gives(kind: str) -> None:
    data = jpegs_of_every_kind()[kind]
    bytes_of = np.frombuffer(data, np.uint8)
    for size in (1, 9, 50, 200):
        results = []
        for vector in (False, True):
            out = np.zeros((2, size, size, 3), np.uint8)
            codes = image_decode.compiled.C.decode_images(
                np.full(2, bytes_of.ctypes.data, np.uint64),
                np.full(2, len(data), np.uint64),
                np.array([(0, 0, 0, 0), (0, 0, 1, 1)], np.int32),
                np.array([True, False]),
                size,
                out.ctypes.data,
                element_bytes=1,
                value_table=np.empty(0, np.uint8),
                max_pixels=1 << 20,
                threads=1,
                fast=False,
                tall_down_first=True,
                vector=vector,
            )
            assert out.any() == (kind != "CMYK")
            results.append((codes.tolist(), out.tobytes()))
        assert results[0] == results[1]


def test_equals_the_transforms_of_training_and_evaluation(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(200, 150, 9), quality=90)
    rngs = [sample_rng(1, 2, i) for i in range(8)]
    boxes, flips = [], []
    for rng in rngs:
        boxes.append(crop_box(200, 150, rng))
        flips.append(rng.random() < 0.5)
    out, _ = decode_batch([data] * 8, boxes, flips, 64, impl=impl)
    assert torch.equal(out, torch.stack([load_pixels(data, 64, sample_rng(1, 2, i)) for i in range(8)]))
    assert torch.equal(decode_batch([data], None, None, 64, impl=impl)[0][0], load_pixels(data, 64))


def test_rotated_photographs_come_upright(impl: str) -> None:
    exif = Image.Exif()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="%d"/></x:xmpmeta>'
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        image = fuzz.photograph(60, 40, 10)
        datas = [fuzz.encode(image, exif=exif), fuzz.encode(image, xmp=xmp % orientation)]
        out, codes = decode_batch(datas, None, None, 30, impl=impl)
        assert codes.tolist() == [0, 0]
        for i, data in enumerate(datas):
            assert torch.equal(out[i], load_pixels(data, 30)), (orientation, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalises_as_the_tensors_do(impl: str, dtype: torch.dtype) -> None:
    data = fuzz.encode(fuzz.photograph(80, 60, 11))
    pixels, _ = decode_batch([data, data], None, [False, True], 24, impl=impl)
    values, codes = decode_batch(
        [data, data], None, [False, True], 24, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype, impl=impl
    )
    assert values.dtype == dtype and values.is_contiguous(memory_format=torch.channels_last) and not codes.any()
    assert torch.equal(values, normalise(pixels).to(dtype))


def test_writes_into_the_given_tensor_and_nowhere_else(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(80, 60, 12))
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        guarded = torch.full((5, 3, 17, 17), 99, dtype=dtype).to(memory_format=torch.channels_last)
        out, codes = decode_batch(
            [data, b"", data], None, None, 17, mean=CLIP_MEAN, std=CLIP_STD, out=guarded[1:4], impl=impl
        )
        assert out.data_ptr() == guarded[1:].data_ptr() and codes.tolist() == [0, DecodeCode.EMPTY, 0]
        assert (guarded[0] == 99).all() and (guarded[4] == 99).all()
        assert not out[1].any() and torch.equal(out[0], out[2]) and out[0].any()


def test_slices_of_every_kind(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(50, 40, 13))
    padded = np.frombuffer(b"???" + data + b"???", np.uint8)
    slices = [
        data,
        bytearray(data),
        memoryview(padded)[3:-3],
        padded[3:-3],
        torch.frombuffer(bytearray(data), dtype=torch.uint8),
        (padded.ctypes.data + 3, len(data)),
    ]
    out, codes = decode_batch(slices, None, None, 20, impl=impl)
    assert not codes.any() and all(torch.equal(out[i], out[0]) for i in range(len(slices)))
    assert decode_batch([], [], [], 20, impl=impl)[0].shape == (0, 3, 20, 20)


def test_codes_of_what_is_not_a_picture(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(120, 90, 14), quality=90)
    absurd = bytearray(data)
    at = absurd.find(b"\xff\xc0")
    absurd[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"
    no_tables = data[:2] + data[data.find(b"\xff\xc0") :]
    cases = {
        "nothing": (b"", DecodeCode.EMPTY),
        "text": (b"not a JPEG at all", DecodeCode.NOT_AN_IMAGE),
        "two bytes": (b"\xff\xd8", DecodeCode.NOT_AN_IMAGE),
        "PNG": (b"\x89PNG\r\n\x1a\n" + data, DecodeCode.NOT_AN_IMAGE),
        "start only": (data[:3], DecodeCode.TRUNCATED),
        "header only": (data[:400], DecodeCode.TRUNCATED),
        "half": (data[: len(data) // 2], DecodeCode.TRUNCATED),
        "half, of which the crop needs the upper part": (data[: len(data) // 2], DecodeCode.TRUNCATED),
        "65500 x 65500": (bytes(absurd), DecodeCode.TOO_MANY_PIXELS),
        "no quantisation tables": (no_tables, DecodeCode.UNREADABLE),
        "whole": (data, DecodeCode.OK),
    }
    boxes = [(0, 0, 120, 12) if "upper part" in name else (0, 0, 0, 0) for name in cases]
    out, codes = decode_batch([case[0] for case in cases.values()], boxes, None, 16, impl=impl)
    named = {name: DecodeCode(code).name for name, code in zip(cases, codes.tolist(), strict=True)}
    assert named == {name: code.name for name, (_, code) in cases.items()}
    assert not out[:-1].any() and out[-1].any()
    assert decode_batch([data], None, None, 8, max_pixels=120 * 90, impl=impl)[1].tolist() == [DecodeCode.OK]
    assert decode_batch([data], None, None, 8, max_pixels=120 * 90 - 1, impl=impl)[1].tolist() == [
        DecodeCode.TOO_MANY_PIXELS
    ]


@needs_cpp
@pytest.mark.parametrize("progressive", [False, True])
def test_damage_inside_the_data_is_reported_not_painted(progressive: bool) -> None:
    whole = fuzz.encode(fuzz.photograph(200, 150, 15), quality=90, progressive=progressive)
    # An end-of-image marker in the middle: Pillow paints the rest grey.
    cut = whole[: len(whole) // 2] + b"\xff\xd9"
    middle = len(whole) // 2
    lacking = whole[: middle - 200] + whole[middle:]
    repeated = whole[:middle] + whole[middle - 200 :]
    _, codes = decode_batch([cut, lacking, repeated, whole], None, None, 16, impl="cpp")
    assert codes.tolist() == [DecodeCode.UNREADABLE] * 3 + [DecodeCode.OK]
    for options in ({"exif": _rotated()}, {}):
        image = fuzz.photograph(200, 150, 15).convert("RGB" if options else "CMYK")
        for_pillow = fuzz.encode(image, quality=90, progressive=progressive, **options)
        cut = for_pillow[: len(for_pillow) * 3 // 4] + b"\xff\xd9"
        assert decode_batch([cut, for_pillow], None, None, 16, impl="cpp")[1].tolist() == [DecodeCode.UNREADABLE, 0]


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 8
    return exif


def test_bytes_behind_the_end_are_no_damage(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(60, 40, 16))
    out, codes = decode_batch([data, data + bytes(100), data + bytes(9000)], None, None, 16, impl=impl)
    assert not codes.any() and torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_boxes_outside_the_image(impl: str) -> None:
    data = fuzz.encode(fuzz.photograph(60, 40, 17))
    good = [(0, 0, 60, 40), (59, 39, 1, 1), (0, 0, 0, 0)]
    bad = [
        (1, 0, 60, 40),
        (0, 1, 60, 40),
        (-1, 0, 5, 5),
        (0, -1, 5, 5),
        (0, 0, 0, 5),
        (5, 5, -3, 5),
        (2**40, 0, 2**40, 1),
    ]
    codes = decode_batch([data] * 10, good + bad, None, 8, impl=impl)[1]
    assert codes.tolist() == [DecodeCode.OK] * 3 + [DecodeCode.BOX_OUTSIDE] * 7


@needs_cpp
def test_the_number_of_threads_changes_nothing() -> None:
    datas = [*jpegs_of_every_kind().values(), b"", b"\xff\xd8\xff\x00"]
    one, one_codes = decode_batch(datas, None, None, 40, threads=1)
    for threads in (2, 3, 16):
        out, codes = decode_batch(datas, None, None, 40, threads=threads)
        assert torch.equal(out, one) and codes.tolist() == one_codes.tolist()
    with ThreadPoolExecutor(4) as pool:
        for out, _ in pool.map(lambda _: decode_batch(datas, None, None, 40, threads=3), range(24)):
            assert torch.equal(out, one)


@needs_cpp
def test_works_in_the_child_of_a_fork() -> None:
    data = fuzz.encode(fuzz.photograph(60, 40, 18))
    decode_batch([data] * 4, None, None, 8, threads=3)
    child = os.fork()
    if child == 0:
        done = threading.Thread(target=lambda: decode_batch([data] * 4, None, None, 8, threads=3), daemon=True)
        done.start()
        done.join(20)
        os._exit(int(done.is_alive()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_cpp
def test_fast_decodes_smaller_and_stays_close() -> None:
    data = fuzz.encode(fuzz.photograph(640, 480, 19), quality=92, subsampling="4:2:0")
    boxes = [(0, 0, 640, 480), (17, 33, 480, 430), (100, 40, 500, 127)]
    exact, _ = decode_batch([data] * 3, boxes, [False, True, False], 64, mode="exact")
    fast, codes = decode_batch([data] * 3, boxes, [False, True, False], 64, mode="fast")
    difference = (exact.int() - fast.int()).abs().float().mean((1, 2, 3))
    # Shifted by one output pixel the same picture differs more than three times as much.
    shifted = (exact[:2, :, :, 1:].int() - exact[:2, :, :, :-1].int()).abs().float().mean((1, 2, 3))
    assert not codes.any() and (difference[:2] > 0).all() and (difference[:2] * 3 < shifted).all()
    assert difference[2] == 0  # 127 rows are less than twice 64


def test_equals_pillow_on_real_photographs(impl: str, measuring_data: Path) -> None:
    files = sorted((measuring_data / "daquar" / "images").glob("*.jpg"))[:12]
    files += sorted((measuring_data / "flickr8k" / "images").glob("*.jpg"))[:12]
    assert len(files) == 24
    boxes, flips = [], []
    for i, file in enumerate(files):
        rng = sample_rng(0, 0, i)
        boxes.append(crop_box(*Image.open(file).size, rng))
        flips.append(rng.random() < 0.5)
    out, _ = decode_batch([file.read_bytes() for file in files], boxes, flips, 224, impl=impl)
    for i, file in enumerate(files):
        assert torch.equal(out[i], load_pixels(file, 224, sample_rng(0, 0, i))), file.name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size is 0, expected 1\.\.8192"),
        ({"size": 8.0}, TypeError, r"size is 8\.0 \(float\), expected an int"),
        ({"threads": 0}, ValueError, r"threads is 0, expected 1\.\.256"),
        ({"max_pixels": 1 << 40}, ValueError, "max_pixels is 1099511627776"),
        ({"mode": "quick"}, ValueError, "mode is 'quick', expected 'exact' or 'fast'"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ({"boxes": [(0, 0, 1)]}, ValueError, r"boxes has shape \(1, 3\).*expected \[1, 4\] integers"),
        ({"boxes": [(0.0, 0, 1, 1)]}, ValueError, "dtype float64, expected"),
        ({"flips": [True, False]}, ValueError, r"flips has shape \(2,\).*expected \[1\] booleans"),
        ({"flips": [1]}, ValueError, "dtype int64, expected"),
        ({"dtype": torch.float16}, ValueError, "dtype is torch.float16, expected torch.uint8"),
        ({"dtype": torch.float32}, ValueError, "mean is None and std None, expected 3 numbers each"),
        ({"dtype": torch.float32, "mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, "std above 0"),
        (
            {"out": torch.empty(1, 3, 9, 9)},
            ValueError,
            r"out is torch.float32 \(1, 3, 9, 9\).*expected .* \(1, 3, 8, 8\)",
        ),
        ({"out": torch.empty(1, 3, 8, 8, dtype=torch.uint8)}, ValueError, "channels-last"),
        ({"slices": ["photo.jpg"]}, TypeError, r"slices\[0\] is str, expected bytes"),
        ({"slices": [(1, 2, 3)]}, TypeError, r"slices\[0\] is \(1, 2, 3\), expected \(address, bytes\)"),
        ({"slices": [(0, 2)]}, ValueError, r"slices\[0\] is 2 bytes at address 0"),
        ({"slices": [torch.zeros(4)]}, TypeError, r"slices\[0\] is a tensor of torch.float32"),
        ({"slices": [memoryview(b"abcdef")[::2]]}, TypeError, r"slices\[0\] is memoryview"),
    ],
)
def test_wrong_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"slices": [b"x"], "boxes": None, "flips": None, "size": 8, **changes}
    with pytest.raises(error, match=message):
        decode_batch(**arguments)


def test_falls_back_with_a_reason_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = fuzz.encode(fuzz.photograph(60, 40, 20))
    monkeypatch.setattr(image_decode.compiled, "C", object())  # a build without libjpeg-turbo
    monkeypatch.setattr(image_decode, "simplejpeg", None)
    image_decode._log_fallback_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=image_decode.__name__):
        for _ in range(2):
            out, codes = decode_batch([data], None, None, 8)
    pixels, code = reference_decode_image(data, (0, 0, 0, 0), False, 8)
    assert codes.tolist() == [code] == [0] and np.array_equal(out[0].permute(1, 2, 0).numpy(), pixels)
    assert len(caplog.records) == 1 and "libjpeg-dev" in caplog.text
    with pytest.raises(RuntimeError, match=r"impl='cpp' cannot run here: .*built without libjpeg-turbo"):
        decode_batch([data], None, None, 8, impl="cpp")
    with pytest.raises(RuntimeError, match=r"impl='simplejpeg' cannot run here: .*vpgtrans\[simplejpeg\]"):
        decode_batch([data], None, None, 8, impl="simplejpeg")


def run_fuzz(*arguments: str, seconds: int) -> str:
    done = subprocess.run([sys.executable, str(FUZZ), *arguments], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@needs_cpp
def test_300_mutated_files() -> None:
    tally = json.loads(run_fuzz("--count", "300", "--seed", "0", seconds=120))
    assert tally["UNREADABLE"] > 50 and tally["TRUNCATED"] > 20 and tally["OK"] > 20


@pytest.mark.slow
@needs_cpp
def test_5000_mutated_files() -> None:
    tally = json.loads(run_fuzz("--count", "5000", "--seed", "1", seconds=600))
    assert sum(tally.values()) - tally.get("accepted, refused by Pillow", 0) == 5000


@pytest.mark.slow
def test_5000_mutated_files_under_sanitizers(tmp_path: Path) -> None:
    """The address and the undefined-behaviour sanitizer over decoder, resampling and thread pool."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    sources = [
        ROOT / "csrc" / f"{name}.cpp" for name in ("image_decode", "jpeg_orientation", "resample", "worker_pool")
    ]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    driver = tmp_path / "driver"
    build = ["g++", "-std=c++17", "-O1", "-g", *sanitizers, FUZZ.with_name("image_decode_driver.cpp"), *sources]
    built = subprocess.run([*build, "-ljpeg", "-lpthread", "-o", driver], capture_output=True, text=True, timeout=300)
    if "jpeglib.h" in built.stderr:
        pytest.skip("libjpeg-turbo's headers are not installed")
    assert built.returncode == 0, built.stderr
    run_fuzz("--count", "5000", "--seed", "2", "--write", str(tmp_path / "records"), seconds=300)
    done = subprocess.run([driver, tmp_path / "records"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.split()) == 5000 and len(set(done.stdout.split())) > 4


@pytest.mark.parametrize("width, height", [(64, 48), (500, 333), (1, 1), (3, 200), (300, 7), (37, 400)])
def test_stored_pixels_equal_pillow_bit_by_bit(impl: str, width: int, height: int) -> None:
    """Beside JPEGs in one batch, up to the last byte of the pixels."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    jpeg = fuzz.encode(fuzz.photograph(80, 60, 1))
    rng = np.random.default_rng(9)
    for size in (1, 17, 48, 224):
        boxes = [(0, 0, width, height), *random_boxes(width, height, 6, rng), (0, 0, 0, 0)]
        flips = rng.random(len(boxes)) < 0.5
        slices, raw_sizes = [pixels.copy().tobytes() for _ in boxes], [(width, height)] * len(boxes)
        slices[-1], raw_sizes[-1] = jpeg, (0, 0)
        out, codes = decode_batch(slices, boxes, flips, size, threads=2, impl=impl, raw_sizes=raw_sizes)
        assert not codes.any()
        for i, (left, top, w, h) in enumerate(boxes[:-1]):
            cropped = Image.fromarray(pixels).crop((left, top, left + w, top + h))
            expected = np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC))
            expected = (expected[:, ::-1] if flips[i] else expected).transpose(2, 0, 1)
            np.testing.assert_array_equal(out[i].numpy(), expected, err_msg=f"{boxes[i]} to {size}, flip {flips[i]}")
        np.testing.assert_array_equal(out[-1].numpy(), pillow_pixels(jpeg, (0, 0, 80, 60), flips[-1], size))


def test_codes_of_stored_pixels(impl: str) -> None:
    whole, cut = bytes(3 * 8 * 6), bytes(3 * 8 * 6 - 1)
    cases = [
        (whole, (8, 6), (0, 0, 8, 6), DecodeCode.OK),
        (whole, (8, 6), (0, 0, 8, 7), DecodeCode.BOX_OUTSIDE),
        (cut, (8, 6), (0, 0, 8, 6), DecodeCode.UNREADABLE),
        (whole, (6, 6), (0, 0, 0, 0), DecodeCode.UNREADABLE),
        (whole, (8, 0), (0, 0, 0, 0), DecodeCode.UNREADABLE),
        (whole, (9, 6), (0, 0, 0, 0), DecodeCode.TOO_MANY_PIXELS),
        (whole, (2**40, 2**40), (0, 0, 0, 0), DecodeCode.TOO_MANY_PIXELS),
        (b"", (8, 6), (0, 0, 0, 0), DecodeCode.EMPTY),
        (whole, (0, 0), (0, 0, 0, 0), DecodeCode.NOT_AN_IMAGE),
    ]
    slices, raw_sizes, boxes, expected = map(list, zip(*cases, strict=True))
    _, codes = decode_batch(slices, boxes, None, 4, max_pixels=48, impl=impl, raw_sizes=raw_sizes)
    assert codes.tolist() == expected
    for wrong in ([(8, 6)], [(8,)] * 9, [(8, -1)] * 9, [(8.0, 6.0)] * 9):
        with pytest.raises(ValueError, match=r"raw_sizes has shape .*expected \[9, 2\] integers"):
            decode_batch(slices, boxes, None, 4, impl=impl, raw_sizes=wrong)


@pytest.fixture
def needs_simplejpeg() -> None:
    if reason := image_decode.simplejpeg_unsupported_reason():
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_simplejpeg")
@pytest.mark.parametrize("kind", list(jpegs_of_every_kind()))
def test_simplejpeg_is_close_to_pillow(kind: str) -> None:
    data = jpegs_of_every_kind()[kind]
    width, height = Image.open(io.BytesIO(data)).size
    for size in (1, 32, 57, 224):
        boxes = [(0, 0, width, height), *random_boxes(width, height, 12, np.random.default_rng(8))]
        flips = np.arange(len(boxes)) % 2 == 1
        out, codes = decode_batch([data] * len(boxes), boxes, flips, size, threads=2, impl="simplejpeg")
        assert not codes.any()
        for i, box in enumerate(boxes):
            difference = np.abs(out[i].numpy().astype(int) - pillow_pixels(data, box, flips[i], size))
            assert difference.max() <= 2 and (difference.mean() <= 0.05 or size == 1), (box, size)


@pytest.mark.usefixtures("needs_simplejpeg")
def test_simplejpeg_is_close_to_pillow_on_real_photographs(measuring_data: Path) -> None:
    """2 levels of 255 and a mean of 0.05; measured 2 and 0.009."""
    files = sorted((measuring_data / "daquar" / "images").glob("*.jpg"))[:20]
    files += sorted((measuring_data / "flickr8k" / "images").glob("*.jpg"))[:40]
    contents = [file.read_bytes() for file in files]
    boxes = [crop_box(*Image.open(file).size, sample_rng(0, 0, i)) for i, file in enumerate(files)]
    for size in (224, 364):
        for crops in (boxes, None):
            out, _ = decode_batch(contents, crops, None, size, impl="simplejpeg")
            exact, _ = decode_batch(contents, crops, None, size, impl="reference")
            difference = (out.int() - exact.int()).abs()
            assert difference.max() <= 2 and difference.float().mean((1, 2, 3)).max() < 0.05


@pytest.mark.usefixtures("needs_simplejpeg")
def test_simplejpeg_stands_in_for_the_compiled_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage and limits get the reference's codes, and what it does not take the reference's pixels."""
    monkeypatch.setattr(image_decode.compiled, "C", object())
    image_decode._log_fallback_once.cache_clear()
    whole = fuzz.encode(fuzz.photograph(60, 40, 20))
    raw = bytes(range(3 * 4 * 4))
    slices = [whole, whole[:-300], b"", b"GIF89a", fuzz.seeds()[6], fuzz.seeds()[5], raw, whole, whole]
    boxes = [(0, 0, 0, 0)] * 7 + [(0, 0, 61, 40), (-1, 0, 8, 8)]
    raw_sizes = [(0, 0)] * 6 + [(4, 4)] + [(0, 0)] * 2
    with caplog.at_level(logging.WARNING, logger=image_decode.__name__):
        out, codes = decode_batch(slices, boxes, None, 8, raw_sizes=raw_sizes)
    exact, expected = decode_batch(slices, boxes, None, 8, impl="reference", raw_sizes=raw_sizes)
    assert codes.tolist() == expected.tolist() and "decodes with simplejpeg" in caplog.text
    assert torch.equal(out[4:], exact[4:]) and (out.int() - exact.int()).abs().max() <= 2
    assert len(caplog.records) == 1 and image_decode.live_decoder() == "simplejpeg"
