"""Reading images, right or refused by name, and the two transforms."""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from vpgtrans.engine.data import images
from vpgtrans.engine.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    MOBILENET_MEAN,
    MOBILENET_STD,
    PIXEL_LIMIT,
    REFUSAL_REASONS,
    ImageRefused,
    check_image,
    crop_box,
    eval_pixels,
    eval_transform,
    load_pixels,
    normalise,
    read_header,
    read_image,
    sample_rng,
    train_pixels,
    train_transform,
)

DATA = Path(os.environ.get("VPGTRANS_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data")
RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


@pytest.fixture(autouse=True)
def pillow_stays_as_it_was():
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


def blocks(width: int = 60, height: int = 48, seed: int = 0) -> Image.Image:
    """A picture of 4x4 coloured blocks: survives JPEG, looks different in every orientation."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(4, axis=0).repeat(4, axis=1))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from raw rows (each led by filter byte 0); `extra` goes between header and pixels."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + pixels + png_chunk(b"IEND", b"")


def png_chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def pixels_of(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(source, **options) -> ImageRefused:
    with pytest.raises(ImageRefused) as caught:
        read_image(source, **options)
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_read_exactly(kind: str, tmp_path: Path) -> None:
    picture = blocks()
    path = tmp_path / "picture.jpg"  # the content decides, not the name
    path.write_bytes(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(pixels_of(read_image(path)), np.asarray(picture))
    assert np.array_equal(pixels_of(read_image(path.read_bytes())), np.asarray(picture))
    assert read_header(path) == check_image(str(path)) == (60, 48)


def test_jpeg_equals_pillow_and_frees_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for progressive in (False, True):
        path.write_bytes(encoded(blocks(), "JPEG", progressive=progressive))
        with Image.open(path) as direct:
            assert np.array_equal(pixels_of(read_image(path)), np.asarray(direct))
    image = read_image(path)
    path.unlink()
    assert image.resize((3, 3)).size == (3, 3)
    assert type(image) is Image.Image


def test_grey_and_bilevel() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(pixels_of(read_image(encoded(grey, "PNG"))), expected)
    assert np.abs(pixels_of(read_image(encoded(grey, "JPEG", quality=100))).astype(int) - expected).max() <= 2
    bilevel = grey.point(lambda level: 255 * (level > 99), "1")
    assert np.array_equal(pixels_of(read_image(encoded(bilevel, "PNG"))), 255 * (expected > 99))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    levels = np.array([[0, 127, 128, 129, 257, 32768, 65000, 65535]], dtype=np.uint16)
    if kind == "PNG":
        data = png_of(8, 1, 16, 0, b"\0" + levels.astype(">u2").tobytes())
    elif kind == "TIFF":
        data = encoded(Image.fromarray(levels), "TIFF")
    else:
        data = encoded(Image.frombytes("I;16B", (8, 1), levels.astype(">u2").tobytes()), "TIFF")
        assert data.startswith(b"MM") or b"MM" in data[:2]
    expected = np.rint(levels / 257).astype(int)
    assert pixels_of(read_image(data))[0, :, 0].tolist() == expected[0].tolist() == [0, 0, 0, 1, 1, 128, 253, 255]


def test_16_bit_grey_with_a_transparent_level_and_16_bit_rgb() -> None:
    levels = np.array([[0, 1000, 65535]], dtype=">u2")
    data = png_of(3, 1, 16, 0, b"\0" + levels.tobytes(), png_chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels_of(read_image(data))[0, :, 1].tolist() == [0, 255, 255]
    rgb = np.array([[[65535, 0, 257 * 40]]], dtype=">u2")
    assert pixels_of(read_image(png_of(1, 1, 16, 2, b"\0" + rgb.tobytes())))[0, 0].tolist() == [255, 0, 40]


def test_transparent_parts_become_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 0, 128)):
        rgba.putpixel((x, 0), (*RED, alpha))
    on_white = [list(RED), list(WHITE), [255, 127, 127]]
    assert pixels_of(read_image(encoded(rgba, "PNG")))[0].tolist() == on_white
    grey_alpha = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)))
    assert pixels_of(read_image(encoded(grey_alpha, "PNG")))[0, 0].tolist() == list(WHITE)
    data = png_of(2, 1, 8, 2, b"\0" + bytes(RED + BLUE), png_chunk(b"tRNS", struct.pack(">HHH", *BLUE)))
    assert pixels_of(read_image(data))[0].tolist() == [list(RED), list(WHITE)]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_and_without_transparency(kind: str) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *BLUE, *(0, 255, 0)])
    for x in range(3):
        palette.putpixel((x, 0), x)
    assert pixels_of(read_image(encoded(palette, kind)))[0].tolist() == [list(RED), list(BLUE), [0, 255, 0]]
    clear = pixels_of(read_image(encoded(palette, kind, transparency=1)))
    assert clear[0].tolist() == [list(RED), list(WHITE), [0, 255, 0]]
    if kind == "PNG":
        partly = pixels_of(read_image(encoded(palette, kind, transparency=bytes([255, 128, 0]))))
        assert partly[0].tolist() == [list(RED), [127, 127, 255], list(WHITE)]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels_of(read_image(data))[0, 0].tolist() == list(RED)


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg_has_the_colours_a_viewer_shows(adobe: bool) -> None:
    # ink (cyan, magenta, yellow, black) and the colour it prints
    inks = {(0, 0, 0, 0): WHITE, (0, 255, 255, 0): RED, (255, 255, 0, 0): BLUE, (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        assert b"Adobe" in data
        data = data if adobe else without_adobe_marker(data)
        assert np.abs(pixels_of(read_image(data)).astype(int) - np.array(colour)).max() <= 3, ink


def test_ycck_jpeg() -> None:
    luma, blue_part, red_part = 150, 90, 200
    stored = (255 - luma, 255 - blue_part, 255 - red_part, 40)
    data = bytearray(encoded(Image.new("CMYK", (16, 16), stored), "JPEG", quality=100))
    at = data.index(b"Adobe")
    data[at + 11] = 2  # the marker's transform byte: components are YCCK
    cmy = np.array(
        [
            luma + 1.402 * (red_part - 128),
            luma - 0.344136 * (blue_part - 128) - 0.714136 * (red_part - 128),
            luma + 1.772 * (blue_part - 128),
        ]
    ).clip(0, 255)
    expected = (255 - cmy) * (255 - 40) / 255
    assert np.abs(pixels_of(read_image(bytes(data)))[8, 8] - expected).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    upright = blocks()
    # what a camera stores: the inverse of what the tag tells a viewer to do
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    image = read_image(data)
    assert image.size == upright.size
    assert np.abs(pixels_of(image).astype(int) - np.asarray(upright)).max() <= (3 if kind == "JPEG" else 0)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), np.asarray(image))
    assert read_header(data) == (upright.size if orientation < 5 or kind == "TIFF" else upright.size[::-1])


@pytest.mark.parametrize("pillow_warnings", ["ignore", "error"])
def test_damaged_exif_does_not_cost_the_image(pillow_warnings: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    # with a density of its own the file is opened without a look at its EXIF block, so the block is read only once
    data = encoded(blocks(), "JPEG", exif=exif, dpi=(72, 72))
    at = data.index(b"Exif\0\0") + 6
    as_stored = pixels_of(read_image(encoded(blocks(), "JPEG")))
    assert read_image(data).size == (48, 60)
    text_for_a_number = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"
    with warnings.catch_warnings():
        warnings.simplefilter(pillow_warnings, UserWarning)
        for nonsense in (b"\xff" * 8, b"II*\0\xff\xff\xff\x7f", bytes(8), text_for_a_number):
            damaged = data[:at] + nonsense + data[at + len(nonsense) :]
            assert np.array_equal(pixels_of(read_image(damaged)), as_stored)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
    ],
)
def test_truncated_files_at_many_lengths(kind: str, options: dict) -> None:
    data = encoded(blocks(), kind, **options)
    whole = pixels_of(read_image(data))
    reasons = []
    for length in [*range(0, 64), *range(64, len(data), 37), *range(len(data) - 40, len(data))]:
        try:
            image = read_image(data[:length])
        except ImageRefused as error:
            reasons.append(error.reason)
            expected = {"empty"} if length == 0 else {"not_an_image"} if length < 2 else {"truncated", "not_an_image"}
            if length >= 16:
                expected = {"truncated"}
            # a BMP of two bytes has a name but no length field to compare with
            assert error.reason in expected or (kind == "BMP" and length < 6), (length, error.reason)
        else:
            # only bytes after the last pixel were lost (PNG's IEND, GIF's trailer)
            assert length > len(data) - 40 and np.array_equal(pixels_of(image), whole), length
    assert reasons.count("truncated") > 40


def test_truncated_tiff() -> None:
    data = encoded(blocks(), "TIFF", compression="tiff_lzw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for length in range(16, len(data), 101):
            assert refusal(data[:length]).reason in ("truncated", "unreadable")


def test_mutated_jpegs_are_read_or_refused(tmp_path: Path) -> None:
    data = encoded(blocks(96, 80), "JPEG", quality=85)
    rng = random.Random(7)
    outcomes: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for trial in range(600):
            mutated = bytearray(data)
            for _ in range(1 + trial % 5):
                # half of the flips hit the 623 bytes of headers, where the damage is most varied
                position = rng.randrange(640 if trial % 2 else len(mutated))
                mutated[position] ^= 1 << rng.randrange(8)
            try:
                image = read_image(bytes(mutated), max_pixels=200_000)
            except ImageRefused as error:
                outcome = error.reason
            else:
                outcome = "read"
                assert image.mode == "RGB" and image.width * image.height <= 200_000
                assert eval_pixels(image, 16).shape == (3, 16, 16)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["read"] > 100 and len(outcomes) >= 4, outcomes
    assert set(outcomes) <= {"read", *REFUSAL_REASONS}


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_mutated_files_of_other_formats(kind: str) -> None:
    data = encoded(blocks(), kind)
    rng = random.Random(kind)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(150):
            mutated = bytearray(data)
            for _ in range(3):
                mutated[rng.randrange(min(len(data), 300))] ^= 1 << rng.randrange(8)
            try:
                assert read_image(bytes(mutated), max_pixels=200_000).mode == "RGB"
            except ImageRefused:
                refused += 1
    assert refused > 5


def test_refusals_by_name(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "text.jpg").write_text("This is a caption, not a picture.\n")
    (tmp_path / "page.png").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "sound.webp").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    os.mkfifo(tmp_path / "fifo.jpg")
    expected = {
        "absent.jpg": "missing",
        "text.jpg/inside.jpg": "missing",
        "zero.jpg": "empty",
        "text.jpg": "not_an_image",
        "page.png": "not_an_image",
        "script.eps": "not_an_image",
        "sound.webp": "not_an_image",
        "fifo.jpg": "unreadable",
        "": "unreadable",
        "a\0b.jpg": "unreadable",
        "x" * 300 + ".jpg": "unreadable",
    }
    for name, reason in expected.items():
        path = tmp_path / name
        error = refusal(path)
        assert (error.reason, error.path) == (reason, str(path))
        assert str(path) in str(error) and reason in str(error)
        for function in (read_header, check_image):
            with pytest.raises(ImageRefused, match=reason):
                function(path)
    assert refusal(b"").reason == "empty"
    assert refusal(b"").path == "<bytes>"


def test_float_and_32_bit_grey_have_no_range() -> None:
    for dtype in (np.float32, np.int32):
        error = refusal(encoded(Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF"))
        assert error.reason == "unreadable" and "no fixed range" in error.detail


def test_huge_dimensions_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(images.PngImagePlugin.PngImageFile, "load", never)
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (PIXEL_LIMIT + 1, 1), (20_000, 9_000)):
        error = refusal(png_of(width, height, 8, 2, b"\0\0\0\0"))
        assert error.reason == "too_many_pixels"
        assert f"{width} x {height}" in error.detail and "89,478,485" in error.detail
    assert refusal(png_of(0, 5, 8, 2, b"")).reason == "unreadable"


def test_max_pixels_is_inclusive_and_checked() -> None:
    data = encoded(blocks(60, 48), "PNG")
    assert read_image(data, max_pixels=60 * 48).size == (60, 48)
    assert refusal(data, max_pixels=60 * 48 - 1).reason == "too_many_pixels"
    for wrong in (0, -1, PIXEL_LIMIT + 1, 2.5, True, None):
        with pytest.raises(ValueError, match="max_pixels: expected an integer from 1 to 89,478,485"):
            read_image(data, max_pixels=wrong)
    with pytest.raises(TypeError, match="expected a path or bytes, got int"):
        read_image(7)


def test_refusal_survives_a_process_boundary() -> None:
    error = ImageRefused("truncated", Path("a/b.jpg"), "JPEG: cut")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.path, copy.detail, str(copy)) == ("truncated", "a/b.jpg", "JPEG: cut", str(error))
    assert isinstance(copy, ValueError)


def test_threads_read_the_same_pixels(tmp_path: Path) -> None:
    paths = []
    for index in range(24):
        kind = ("JPEG", "PNG", "GIF")[index % 3]
        paths.append(tmp_path / f"{index}.img")
        data = encoded(blocks(seed=index), kind)
        paths[-1].write_bytes(data[: len(data) // 2] if index % 8 == 7 else data)

    def outcome(path: Path) -> bytes | str:
        try:
            return load_pixels(path, 32, sample_rng(0, 0, path.name)).numpy().tobytes()
        except ImageRefused as error:
            return error.reason

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, paths * 4)) == [outcome(path) for path in paths] * 4
    assert [outcome(path) for path in paths].count("truncated") == 3


def test_normalise_equals_the_formula_in_float64() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    kept = pixels.clone()
    for mean, std in ((CLIP_MEAN, CLIP_STD), (MOBILENET_MEAN, MOBILENET_STD)):
        exact = (pixels.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
            3, 1, 1
        )
        result = normalise(pixels, mean, std)
        assert result.dtype == torch.float32 and result.shape == pixels.shape
        assert (result - exact).abs().max() < 1e-6
    assert torch.equal(pixels, kept)
    assert result.min() == -1 and result.max() == 1


def test_eval_transform_squashes_without_crop() -> None:
    picture = blocks(80, 40)
    pixels = eval_pixels(picture, 24)
    expected = np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC))
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert torch.equal(eval_transform(picture, 24, CLIP_MEAN, CLIP_STD), normalise(pixels, CLIP_MEAN, CLIP_STD))
    pixels += 1  # writable, and not a view of Pillow's memory
    assert np.array_equal(np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC)), expected)


def test_crop_boxes_follow_the_distribution() -> None:
    width, height, rng = 400, 300, np.random.default_rng(3)
    boxes = np.array([crop_box(width, height, rng) for _ in range(20_000)], dtype=float)
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    ratio = w / h
    assert ratio.min() > 0.745 and ratio.max() < 1.343
    share = w * h / (width * height)
    assert share.min() > 0.495 and share.max() <= 1
    # acceptance by rejection, drawn directly: uniform area, log-uniform ratio, those that fit
    trials = np.random.default_rng(4)
    area = trials.uniform(0.5, 1, 200_000) * width * height
    aspect = np.exp(trials.uniform(math.log(3 / 4), math.log(4 / 3), 200_000))
    fits = (np.sqrt(area * aspect) <= width) & (np.sqrt(area / aspect) <= height)
    assert abs(share.mean() - area[fits].mean() / (width * height)) < 0.005
    assert abs(np.log(ratio).mean() - np.log(aspect[fits]).mean()) < 0.006
    free = width - w
    assert abs((left[free > 20] / free[free > 20]).mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 100, (434, 0, 133, 100)),  # too wide: full height, ratio 4/3, centred
        (100, 1000, (0, 433, 100, 133)),  # too tall: full width, ratio 3/4
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre(width: int, height: int, expected: tuple) -> None:
    # at least 90 % of such a strip cannot have a ratio within 3/4..4/3
    assert crop_box(width, height, np.random.default_rng(0), (0.9, 1.0)) == pytest.approx(expected, abs=1)
    left, top, w, h = crop_box(width, height, np.random.default_rng(0), (0.9, 1.0))
    assert left == (width - w) // 2 and top == (height - h) // 2


def test_fallback_comes_after_exactly_ten_tries() -> None:
    class Counting:
        def __init__(self) -> None:
            self.uniform_calls = 0

        def uniform(self, low: float, high: float) -> float:
            self.uniform_calls += 1
            return high

    rng = Counting()
    crop_box(1000, 100, rng)
    assert rng.uniform_calls == 20


def test_train_transform_is_a_function_of_seed_epoch_and_sample() -> None:
    picture = blocks(80, 64)
    first = train_pixels(picture, 24, sample_rng(1, 2, 3))
    assert first.shape == (3, 24, 24) and first.dtype == torch.uint8
    np.random.seed(0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for _ in range(3):
        np.random.random(5)
        assert torch.equal(train_pixels(picture, 24, sample_rng(1, 2, 3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, "3")):
        assert not torch.equal(train_pixels(picture, 24, sample_rng(*other)), first)
    normalised = train_transform(picture, 24, CLIP_MEAN, CLIP_STD, sample_rng(1, 2, 3))
    assert torch.equal(normalised, normalise(first, CLIP_MEAN, CLIP_STD))


def test_train_pixels_are_crop_resize_flip() -> None:
    picture, flips = blocks(80, 64), 0
    for sample_id in range(400):
        pixels = train_pixels(picture, 8, sample_rng(0, 0, sample_id))
        left, top, w, h = crop_box(80, 64, sample_rng(0, 0, sample_id))
        crop = picture.crop((left, top, left + w, top + h)).resize((8, 8), Image.Resampling.BICUBIC)
        straight = np.asarray(crop).transpose(2, 0, 1)
        is_flipped = np.array_equal(pixels.numpy(), straight[:, :, ::-1])
        assert is_flipped or np.array_equal(pixels.numpy(), straight)
        flips += is_flipped
    assert 160 < flips < 240  # 4 standard deviations


def test_sample_rng_streams() -> None:
    draws = np.array([sample_rng(0, epoch, sample).random(4) for epoch in range(20) for sample in range(200)])
    assert len(np.unique(draws)) == draws.size
    assert abs(draws.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06
    assert sample_rng(0, 0, np.int64(5)).random() == sample_rng(0, 0, 5).random()
    # a fixed stream: training that resumes under another version must see the same crops
    assert sample_rng(42, 3, 17).integers(0, 1000, 4).tolist() == [617, 718, 710, 321]
    with pytest.raises(ValueError, match="epoch: expected 0 or more"):
        sample_rng(0, -1, 0)
    with pytest.raises(TypeError):
        sample_rng(0, 0, 1.5)


def test_wrong_arguments_of_the_transforms() -> None:
    picture, rng = blocks(), np.random.default_rng(0)
    with pytest.raises(ValueError, match="image: expected mode RGB, got L; open it with read_image"):
        eval_pixels(picture.convert("L"), 8)
    with pytest.raises(ValueError, match="size: expected a side of 1 pixel or more, got 0"):
        eval_pixels(picture, 0)
    with pytest.raises(ValueError, match="scale: expected 0 < low <= high <= 1"):
        train_pixels(picture, 8, rng, scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="ratio: expected 0 < low <= high"):
        train_pixels(picture, 8, rng, ratio=(2, 1))
    with pytest.raises(ValueError, match=r"pixels: expected uint8 .*got torch.float32"):
        normalise(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="expected 3 numbers each"):
        normalise(torch.zeros(3, 4, 4, dtype=torch.uint8), CLIP_MEAN, (1, 1, 0))


def test_load_pixels_chooses_the_transform_by_rng(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    blocks().save(path)
    image = read_image(path)
    assert torch.equal(load_pixels(path, 16), eval_pixels(image, 16))
    assert torch.equal(load_pixels(path, 16, sample_rng(0, 0, 1)), train_pixels(image, 16, sample_rng(0, 0, 1)))
    with pytest.raises(ImageRefused, match="too_many_pixels"):
        load_pixels(path, 16, max_pixels=10)


@pytest.mark.skipif(not (DATA / "flickr8k" / "images").is_dir(), reason=f"no flickr8k images under {DATA}")
def test_real_photographs_are_read_as_pillow_reads_them() -> None:
    paths = sorted((DATA / "flickr8k" / "images").glob("*.jpg"))[::100]
    assert paths
    for path in paths:
        with Image.open(path) as direct:
            assert np.array_equal(pixels_of(read_image(path)), np.asarray(direct.convert("RGB")))
        assert load_pixels(path, 224).shape == (3, 224, 224)
