"""Batches against images one by one: bit for bit, whatever the format."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vpgtrans.engine.data import decode
from vpgtrans.engine.data.beton_member import BetonMember
from vpgtrans.engine.data.decode import load_batch
from vpgtrans.engine.data.images import ImageRefused, load_pixels, sample_rng
from vpgtrans.kernels.image_decode import image_decode_unsupported_reason


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """JPEGs of several kinds and sizes, one of them stored on its side, a grey one, a CMYK one, and a PNG."""
    folder, rng, made = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for n, (width, height) in enumerate(
        [(61, 40), (200, 333), (480, 360), (31, 90), (224, 224), (97, 64), (80, 80), (50, 70)]
    ):
        small = Image.fromarray(rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        kind = {4: "L", 5: "CMYK"}.get(n, "RGB")
        path = folder / f"{n}.{'png' if n == 6 else 'jpg'}"
        exif = Image.Exif()
        exif[0x0112] = 6 if n == 3 else 1
        image.convert(kind).save(path, **({"exif": exif} if n in (3, 7) else {}), **({"quality": 90} if n != 6 else {}))
        made.append(path)
    return made


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("augmented", [True, False])
def test_a_batch_is_its_images(native, augmented, pictures, monkeypatch):
    if not native:
        monkeypatch.setattr(decode, "live_decoder", lambda: "reference")
    elif reason := image_decode_unsupported_reason():
        pytest.skip(reason)

    def rngs():
        return [sample_rng(1, 0, n) if augmented and n != 2 else None for n in range(len(pictures))]

    with ThreadPoolExecutor(2) as pool:
        batch = load_batch(pictures, 48, rngs(), pool)
    assert torch.equal(batch, torch.stack([load_pixels(p, 48, r) for p, r in zip(pictures, rngs(), strict=True)]))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no picture", "cut"])
def test_a_bad_image_is_named(content, pictures, tmp_path):
    whole = pictures[2].read_bytes()
    (tmp_path / "bad.jpg").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ImageRefused, match=r"bad\.jpg"):
        load_batch([pictures[0], tmp_path / "bad.jpg"], 48, [None, None], pool)


def test_fast_differs_where_a_crop_is_twice_as_large_and_nowhere_else(pictures):
    if reason := image_decode_unsupported_reason():
        pytest.skip(reason)
    with ThreadPoolExecutor(2) as pool:
        exact, fast = (load_batch(pictures, 48, [None] * len(pictures), pool, mode=mode) for mode in ("exact", "fast"))
    # The others are too small, or Pillow's: stored on its side, grey, CMYK, a PNG.
    differs = [not torch.equal(a, b) for a, b in zip(exact, fast, strict=True)]
    assert differs == [False, True, True, False, False, False, False, False]
    assert (exact.int() - fast.int()).abs().float().mean() < 4


@pytest.mark.parametrize("augmented", [True, False])
def test_stored_pixels_of_a_packed_set_beside_jpegs(augmented, pictures, tmp_path):
    """Natively where that is built, and as `load_pixels` gives them; the pixels stand anywhere in a file."""
    members, at = [], 5
    with open(tmp_path / "shard", "wb") as file:
        file.write(bytes(at))
        for n, (width, height) in enumerate([(90, 61), (300, 200), (40, 333)]):
            pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8).tobytes()
            members.append(BetonMember(tmp_path / "shard", n, at, len(pixels), (width, height)))
            at += file.write(pixels)
    sources = [pictures[0], members[0], members[1], pictures[2], members[2]]

    def rngs():
        return [sample_rng(1, 0, n) if augmented else None for n in range(len(sources))]

    with ThreadPoolExecutor(2) as pool:
        batch = load_batch(sources, 48, rngs(), pool)
        assert torch.equal(batch, torch.stack([load_pixels(s, 48, r) for s, r in zip(sources, rngs(), strict=True)]))
        damaged = replace(members[1], size=members[1].size - 3)
        with pytest.raises(ImageRefused, match="300 x 200 RGB pixels are not"):
            load_batch([*sources[:2], damaged], 48, [None] * 3, pool)


@pytest.mark.parametrize(
    ("decoder", "mode", "pixels"),
    [("cpp", "exact", "exact"), ("cpp", "fast", "fast"), ("reference", "fast", "exact"), ("simplejpeg", "exact", "simplejpeg")],
)  # fmt: skip
def test_which_pixels_a_process_gives(decoder, mode, pixels, monkeypatch):
    """A cache made by Pillow because nothing else was there is no cache of the fast decoder."""
    monkeypatch.setattr(decode, "live_decoder", lambda: decoder)
    assert decode.pixels_of(mode) == pixels
