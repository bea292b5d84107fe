"""Images: reading them safely, and the two transforms of the method.

`read_image` turns a file into upright RGB pixels or raises `ImageRefused` with one of a few reasons; nothing else
comes out of it, whatever the bytes are. Only the formats in `_FORMATS` are opened, by their Pillow plugin and not by
`Image.open`: so no other plugin (EPS starts Ghostscript) ever sees a file, and Pillow's decompression-bomb warning,
which could only be silenced through process-wide state, is never raised. Pillow's global settings stay as they are,
and all functions here may be called from several threads at once.

Transforms (arXiv 2305.01278 uses BLIP-2's): training takes a random crop of 50-100 % of the area, resized, and a
horizontal flip; evaluation squashes the whole image to the square. Both use Pillow's bicubic filter.
"""

from __future__ import annotations

import hashlib
import io
import math
import operator
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ...kernels.image_decode import UPRIGHT
from .beton_member import BetonMember
from .tar_member import TarMember

Member = TarMember | BetonMember

PIXEL_LIMIT = 89_478_485  # 1 GiB at 12 bytes a pixel, Pillow's own limit; beyond it Pillow's crop warns

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOBILENET_MEAN = (0.5, 0.5, 0.5)  # maps 0..255 to -1..1
MOBILENET_STD = (0.5, 0.5, 0.5)

RefusalReason = Literal["missing", "empty", "truncated", "not_an_image", "too_many_pixels", "unreadable"]
REFUSAL_REASONS: tuple[str, ...] = get_args(RefusalReason)

_FORMATS = (
    ("JPEG", (b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ("GIF", (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    ("WebP", (b"RIFF",), WebPImagePlugin.WebPImageFile),
    ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    ("BMP", (b"BM",), BmpImagePlugin.BmpImageFile),
)
_EXIF_ORIENTATION = 0x0112
_WHITE = (255, 255, 255, 255)


class ImageRefused(ValueError):
    """An image that cannot be used. `reason` is one of `REFUSAL_REASONS`, `path` the file or `<bytes>`."""

    def __init__(self, reason: RefusalReason, path: str | os.PathLike[str], detail: str = "") -> None:
        assert reason in REFUSAL_REASONS, reason
        self.reason: RefusalReason = reason
        self.path = os.fspath(path)
        self.detail = detail
        super().__init__(f"{self.path}: image refused ({reason}){': ' + detail if detail else ''}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reason, self.path, self.detail)


def read_image(
    path_or_bytes: str | os.PathLike[str] | Member | bytes | bytearray | memoryview, max_pixels: int = PIXEL_LIMIT
) -> Image.Image:
    """Read one image as upright RGB, 8 bits a channel.

    EXIF orientation is applied. Transparent parts become white, as a viewer on a white page shows them (the reference
    keeps the hidden colour under them instead; its JPEG data has none). 16-bit grey is scaled to 8 bits. CMYK JPEGs
    are taken as stored inverted, Adobe's convention, with or without its marker. Colour profiles are ignored. Of an
    animation the first frame is used. The size is checked in the header, before any pixel is decoded.

    Args:
        path_or_bytes: a file, an image inside a tar or a packed set, or the whole content.
        max_pixels: the largest width x height that is decoded; 1..89,478,485.

    Raises:
        ImageRefused: with the reason.
        ValueError, TypeError: a wrong argument.
    """
    _check_limit(max_pixels)
    with _opened(path_or_bytes) as (fp, name):
        if isinstance(path_or_bytes, BetonMember) and path_or_bytes.raw_size is not None:
            return Image.frombytes("RGB", _raw_size(path_or_bytes, max_pixels), fp.read())
        image, format_name = _parse_header(fp, name, max_pixels)
        try:
            image.load()
            rgb = _to_rgb(image)
        except Exception as error:  # plugins raise anything from SyntaxError to struct.error on damaged data
            raise _damaged(fp, name, format_name, error) from error
        upright = UPRIGHT.get(_orientation(image))
        if upright is not None:
            rgb = rgb.transpose(upright)
        rgb.info = {}  # an orientation tag left here would make a second reader rotate again
        return rgb


def read_header(
    path_or_bytes: str | os.PathLike[str] | Member | bytes | bytearray | memoryview, max_pixels: int = PIXEL_LIMIT
) -> tuple[int, int]:
    """Stored (width, height) from the header alone, before orientation; pixel data may still be damaged.

    Raises:
        ImageRefused: as `read_image`, as far as the header shows it.
    """
    _check_limit(max_pixels)
    with _opened(path_or_bytes) as (fp, name):
        if isinstance(path_or_bytes, BetonMember) and path_or_bytes.raw_size is not None:
            return _raw_size(path_or_bytes, max_pixels)
        return _parse_header(fp, name, max_pixels)[0].size


def check_image(
    path_or_bytes: str | os.PathLike[str] | Member | bytes | bytearray | memoryview, max_pixels: int = PIXEL_LIMIT
) -> tuple[int, int]:
    """Decode an image completely and return its upright (width, height).

    Raises:
        ImageRefused: exactly where `read_image` would.
    """
    return read_image(path_or_bytes, max_pixels).size


def read_bytes(path: str | os.PathLike[str] | Member) -> bytes:
    """The whole stored content, whatever it is; raises ImageRefused where it is missing, empty or cannot be read."""
    with _opened(path) as (fp, name):
        try:
            return fp.read()
        except OSError as error:
            raise ImageRefused("unreadable", name, error.strerror or str(error)) from error


def is_stored_upright(content: bytes) -> bool:
    """Whether a readable image's pixels need no turning: its EXIF orientation is absent, damaged or 1."""
    with _opened(content) as (fp, name):
        return _orientation(_parse_header(fp, name, PIXEL_LIMIT)[0]) not in UPRIGHT


def _raw_size(member: BetonMember, max_pixels: int) -> tuple[int, int]:
    assert member.raw_size is not None
    width, height = member.raw_size
    if width * height > max_pixels:
        raise ImageRefused("too_many_pixels", str(member), f"{width} x {height} pixels, the limit is {max_pixels:,}")
    if width * height * 3 != member.size:
        raise ImageRefused("unreadable", str(member), f"{width} x {height} RGB pixels are not {member.size:,} bytes")
    return width, height


@contextmanager
def _opened(
    path_or_bytes: str | os.PathLike[str] | Member | bytes | bytearray | memoryview,
) -> Iterator[tuple[BinaryIO, str]]:
    """(binary file, its name) for a path or for bytes; refuses what cannot hold an image."""
    if isinstance(path_or_bytes, (bytes, bytearray, memoryview)):
        name, fp = "<bytes>", io.BytesIO(path_or_bytes)
        size_bytes = len(fp.getbuffer())
    elif isinstance(path_or_bytes, Member):
        name = str(path_or_bytes)
        fp, size_bytes = _open_member(path_or_bytes, name), path_or_bytes.size
    elif isinstance(path_or_bytes, (str, os.PathLike)):
        name = str(os.fspath(path_or_bytes))
        fp, size_bytes = _open_file(name)
    else:
        kind = type(path_or_bytes).__name__
        raise TypeError(f"path_or_bytes: expected a path or bytes, got {kind}; pass a file name or its content")
    with fp:
        if size_bytes == 0:
            raise ImageRefused("empty", name, "0 bytes")
        yield fp, name


def _open_file(name: str) -> tuple[BinaryIO, int]:
    try:
        status = os.stat(name)
        # a FIFO would block for ever, a directory cannot be read
        if not stat.S_ISREG(status.st_mode):
            raise ImageRefused("unreadable", name, "not a regular file")
        return open(name, "rb"), status.st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageRefused("missing", name, "no such file") from error
    except OSError as error:
        raise ImageRefused("unreadable", name, error.strerror or str(error)) from error
    except ValueError as error:
        if isinstance(error, ImageRefused):
            raise
        raise ImageRefused("unreadable", name, f"not a possible file name: {error}") from error


def _open_member(member: Member, name: str) -> BinaryIO:
    kind, file = ("tar", member.tar) if isinstance(member, TarMember) else ("shard", member.shard)
    archive, _ = _open_file(str(file))
    with archive:
        try:
            archive.seek(member.offset)
            content = archive.read(member.size)
        except OSError as error:
            raise ImageRefused("unreadable", name, error.strerror or str(error)) from error
    if len(content) < member.size:
        raise ImageRefused("truncated", name, f"the {kind} holds {len(content):,} of its {member.size:,} bytes")
    return io.BytesIO(content)


def _parse_header(fp: BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, str]:
    """The lazily opened image (header parsed, no pixel decoded) and the name of its format."""
    try:
        head = fp.read(16)
        fp.seek(0)
    except OSError as error:
        raise ImageRefused("unreadable", name, error.strerror or str(error)) from error
    matches = [entry for entry in _FORMATS if head.startswith(entry[1])]
    if not matches or (matches[0][0] == "WebP" and head[8:12] != b"WEBP"):
        known = ", ".join(entry[0] for entry in _FORMATS)
        raise ImageRefused("not_an_image", name, f"starts with {head!r}; readable are {known}")
    format_name, _, plugin = matches[0]
    try:
        image = plugin(fp, "")
        width, height = image.size
    except Exception as error:
        raise _damaged(fp, name, format_name, error) from error
    if width * height > max_pixels:
        raise ImageRefused("too_many_pixels", name, f"{width} x {height} pixels, the limit is {max_pixels:,}")
    return image, format_name


def _damaged(fp: BinaryIO, name: str, format_name: str, error: Exception) -> ImageRefused:
    cut = "truncated" in str(error).lower() or _end_is_missing(fp, format_name)
    detail = f"{format_name}: {type(error).__name__}: {error}"
    return ImageRefused("truncated" if cut else "unreadable", name, detail)


def _end_is_missing(fp: BinaryIO, format_name: str) -> bool:
    """Whether the file stops before its format says so; TIFF has no end to look for."""
    try:
        size_bytes = fp.seek(0, os.SEEK_END)
        fp.seek(max(0, size_bytes - 4096))  # some writers append a few bytes after the end marker
        tail = fp.read()
        fp.seek(0)
        head = fp.read(12)
    except (OSError, ValueError):
        return False
    if format_name == "JPEG":
        return b"\xff\xd9" not in tail
    if format_name == "PNG":
        return b"IEND" not in tail
    if format_name == "GIF":
        return not tail.rstrip(b"\0").endswith(b";")
    if format_name == "WebP":
        return int.from_bytes(head[4:8], "little") + 8 > size_bytes
    if format_name == "BMP":
        return int.from_bytes(head[2:6], "little") > size_bytes
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    """A plain RGB copy of a loaded image."""
    # Pillow clips 16-bit grey at 255 on conversion: nearly everything would turn white
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.int64)
        grey = ((levels + 128) // 257).clip(0, 255).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[levels == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no fixed range of brightness; store 8 or 16 bits a channel")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, _WHITE)
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of a loaded image; 1 where the tag is absent or its block is damaged."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block must not cost a readable image
        return 1
    return value if isinstance(value, int) else 1


def _check_limit(max_pixels: int) -> None:
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or not 1 <= max_pixels <= PIXEL_LIMIT:
        raise ValueError(
            f"max_pixels: expected an integer from 1 to {PIXEL_LIMIT:,}, got {max_pixels!r}; "
            "scale larger images down before packing them"
        )


def sample_rng(seed: int, epoch: int, sample_id: int | str) -> np.random.Generator:
    """The random stream of one sample in one epoch (or one stored view).

    Counter-based (Philox): the stream depends on the three arguments only, not on the order of samples, the number
    of workers or of ranks, and needs no state to resume. The key is a hash of seed and sample, the counter's upper
    half the epoch, so streams of one key are 2**128 draws apart.

    Raises:
        TypeError, ValueError: seed or epoch not an integer, epoch negative, sample_id neither integer nor string.
    """
    seed, epoch = operator.index(seed), operator.index(epoch)
    if not 0 <= epoch < 2**63:
        raise ValueError(f"epoch: expected 0 or more, got {epoch}; count epochs from 0")
    key_text = f"{seed} text {sample_id}" if isinstance(sample_id, str) else f"{seed} int {operator.index(sample_id)}"
    digest = hashlib.blake2b(key_text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    counter = np.array([0, 0, epoch, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.frombuffer(digest, dtype=np.uint64)))


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Sample (left, top, crop width, crop height) in pixels as torchvision's RandomResizedCrop does.

    Area uniform in `scale`, width / height log-uniform in `ratio`, up to 10 tries for a box that fits, then the
    largest centred box whose ratio lies within `ratio`.
    """
    _check_ranges(scale, ratio)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(log_low, log_high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return left, top, crop_width, crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _check_ranges(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, shares of the image's area, got {tuple(scale)}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < low <= high, width over height, got {tuple(ratio)}")


def eval_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """Squash an RGB image to uint8 (3, size, size), Pillow bicubic, no crop."""
    return _to_tensor(image, size)


def train_pixels(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Random resized crop and horizontal flip (one in two) of an RGB image: uint8 (3, size, size).

    All randomness comes from `rng`, in a fixed order: `sample_rng` makes it a function of seed, epoch and sample.
    """
    left, top, width, height = crop_box(image.width, image.height, rng, scale, ratio)
    pixels = _to_tensor(image.crop((left, top, left + width, top + height)), size)
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


def _to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}; open it with read_image")
    if size < 1:
        raise ValueError(f"size: expected a side of 1 pixel or more, got {size}")
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def normalise(pixels: torch.Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> torch.Tensor:
    """uint8 (..., 3, H, W) -> float32 of the same shape and device, (pixels / 255 - mean) / std per channel."""
    if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(
            f"pixels: expected uint8 (..., 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}; "
            "pass what load_pixels returns, not yet normalised"
        )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean, std: expected 3 numbers each, std above 0, got mean={mean!r}, std={std!r}")
    mean_3 = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    std_3 = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    return pixels.to(torch.float32).div_(255).sub_(mean_3).div_(std_3)


def eval_transform(
    image: Image.Image, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> torch.Tensor:
    """RGB image -> normalised float32 (3, size, size), squashed without a crop."""
    return normalise(eval_pixels(image, size), mean, std)


def train_transform(
    image: Image.Image,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """RGB image -> normalised float32 (3, size, size), random crop and flip from `rng`."""
    return normalise(train_pixels(image, size, rng, scale, ratio), mean, std)


def load_pixels(
    path: str | Path | Member | bytes,
    size: int,
    rng: np.random.Generator | None = None,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    max_pixels: int = PIXEL_LIMIT,
) -> torch.Tensor:
    """Read and transform one image: uint8 (3, size, size). With `rng` the training transform, without it evaluation's.

    Raises:
        ImageRefused: as `read_image`.
    """
    image = read_image(path, max_pixels)
    return eval_pixels(image, size) if rng is None else train_pixels(image, size, rng, scale, ratio)
