"""Decodes a batch of JPEGs to squares: decode -> crop -> antialiased bicubic -> flip -> normalise, on threads.

It replaces, for every image of a batch and one after the other,

    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    out[i] = (to_tensor(image.transpose(FLIP_LEFT_RIGHT) if flip else image) - mean) / std

and gives the same numbers: libjpeg-turbo decodes with its accurate DCT and smooth chroma upsampling, as Pillow's does,
and the filter is Pillow's fixed-point arithmetic, rounded to 8 bits between its two passes. Only rows and columns that
the crop needs are decoded, and rows are filtered while they are in the cache; no full image is kept. Where the
extension was built without libjpeg-turbo, simplejpeg and torch's antialiased uint8 bicubic take its place if simplejpeg
is installed: the same decoded pixels, filtered with weights of 16 bits, within 2 levels of Pillow and a mean of 0.01
(200 photographs to 224 and 364, torch 2.13: at most 2, mean 0.009 in the worst); else Pillow does. An image costs its
entropy decoding, mostly, and 3 * size * (crop height * taps across + size * taps down) multiply-adds, the taps being
4 * crop side / size.

Bench: benches/bench_decode.py.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import io
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from . import compiled

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

logger = logging.getLogger(__name__)

MAX_SIZE = 8192  # kMaxOutputSize of csrc/image_decode.h
MAX_THREADS = 256  # kMaxThreads of csrc/worker_pool.h
PIXEL_LIMIT = 89_478_485  # width x height; engine/data/images.py's

Slice = bytes | bytearray | memoryview | NDArray[np.uint8] | torch.Tensor | tuple[int, int]

_ELEMENT_BYTES = {torch.uint8: 1, torch.bfloat16: 2, torch.float32: 4}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeCode(enum.IntEnum):
    """What became of an image. The lower-case names that `engine/data/images.py` has as well mean the same there."""

    OK = 0
    EMPTY = 1  # no bytes
    NOT_AN_IMAGE = 2  # does not start as a JPEG
    TRUNCATED = 3  # the data end before the image does
    UNREADABLE = 4  # damaged data
    TOO_MANY_PIXELS = 5  # more than max_pixels
    BOX_OUTSIDE = 6  # the crop box is not inside the image
    OUT_OF_MEMORY = 7


_NEEDS_PILLOW = 8  # kNeedsPillow of csrc/image_decode.h; never leaves this module


def decode_batch(
    slices: Sequence[Slice],  # [images]
    boxes: Sequence[Sequence[int]] | NDArray[np.integer] | torch.Tensor | None,  # [images, 4], pixels
    flips: Sequence[bool] | NDArray[np.bool_] | torch.Tensor | None,  # [images]
    size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: torch.Tensor | None = None,  # [images, 3, size, size], channels-last in memory
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    mode: Literal["exact", "fast"] = "exact",
    max_pixels: int = PIXEL_LIMIT,
    impl: Literal["reference", "simplejpeg", "cpp"] | None = None,
    raw_sizes: Sequence[Sequence[int]] | NDArray[np.integer] | torch.Tensor | None = None,  # [images, 2], pixels
) -> tuple[torch.Tensor, NDArray[np.int32]]:
    """Decode, crop, resize, flip and normalise a batch of JPEGs, or of stored pixels.

    CMYK photographs and those that EXIF or XMP says are stored rotated are decoded by Pillow, upright, whatever `impl`
    is. Colour profiles are ignored. A JPEG is only read as far down as its crop reaches: damage below is not found,
    but a file whose end is missing is. `impl="reference"` finds damage as Pillow does, which decodes some damaged data
    to a wrong picture without a word.

    Args:
        slices: the JPEGs: bytes or anything else with a contiguous buffer, uint8 tensors on the CPU, or pairs
            (address, bytes) into memory that the caller keeps mapped until the call returns.
        boxes: (left, top, width, height) of each crop in pixels of the full upright image, as `crop_box` gives them;
            four zeros, or `None` for all, take the whole image.
        flips: whether each image is mirrored left to right; `None` flips none.
        size: side of the output in pixels, 1..8192.
        mean, std: per channel, of pixels in 0..1: values are (pixels / 255 - mean) / std. Needed where the output is
            of floating point, and not used where it is uint8.
        out: where to write, on the CPU (pinned or not), of any of the three dtypes; `None` makes a tensor.
        dtype: torch.uint8, torch.bfloat16 or torch.float32; `None` takes that of `out`, else uint8.
        threads: how many threads work, 1..256, the calling one among them; `None` takes one a core this process may use.
            The result does not depend on it.
        mode: "exact" equals Pillow. "fast" decodes at 1/2, 1/4 or 1/8 where the crop stays at least `size` on both
            sides; it differs visibly where it does. Only the compiled one does that; the others decode exactly in both.
        max_pixels: the largest width x height that is decoded.
        impl: `None` takes the compiled one where it is there, else simplejpeg where that is, else the reference.
        raw_sizes: (width, height) of each slice that holds no JPEG but interleaved RGB pixels, uint8 [height, width,
            3]; two zeros for a JPEG. `None`: all are JPEGs.

    Returns:
        `out`, or a new tensor [images, 3, size, size] in channels-last memory, and the `DecodeCode` of each image, an
        int32 array [images]. An image whose code is not `OK` is all zeros.

    Raises:
        ValueError, TypeError: a wrong argument; never for what is inside a JPEG.
        RuntimeError: `impl` names one that is missing.
    """
    if impl not in (None, "reference", "simplejpeg", "cpp"):
        raise ValueError(f"decode_batch: impl is {impl!r}, expected None, 'reference', 'simplejpeg' or 'cpp'")
    if mode not in ("exact", "fast"):
        raise ValueError(f"decode_batch: mode is {mode!r}, expected 'exact' or 'fast'")
    size = _int_in_range("size", size, 1, MAX_SIZE)
    threads = _default_threads() if threads is None else _int_in_range("threads", threads, 1, MAX_THREADS)
    max_pixels = _int_in_range("max_pixels", max_pixels, 1, PIXEL_LIMIT)
    box_array, flip_array = _boxes(boxes, len(slices)), _flips(flips, len(slices))
    raw_array = _raw_sizes(raw_sizes, len(slices))
    out = _output(out, dtype, len(slices), size)
    table = _value_table(out.dtype, mean, std)
    buffers = [_address(item, i) for i, item in enumerate(slices)]

    missing = {"cpp": image_decode_unsupported_reason, "simplejpeg": simplejpeg_unsupported_reason}
    if impl in missing and (reason := missing[impl]()) is not None:
        raise RuntimeError(f"decode_batch: impl={impl!r} cannot run here: {reason}")
    if impl is None:
        impl = live_decoder()
        if impl != "cpp":
            _log_fallback_once(impl, str(image_decode_unsupported_reason()))
    if impl != "cpp":
        codes, everything = np.empty(len(slices), np.int32), range(len(slices))
        one = reference_decode_image if impl == "reference" else simplejpeg_decode_image
        _decode_one_by_one(
            one, everything, buffers, box_array, flip_array, raw_array, table, max_pixels, threads, out, codes
        )
        return out, codes
    codes = compiled.C.decode_images(
        np.array([address for address, _, _ in buffers], np.uint64),
        np.array([byte_count for _, byte_count, _ in buffers], np.uint64),
        box_array,
        flip_array,
        size,
        out.data_ptr(),
        out.element_size(),
        np.empty(0, np.uint8) if table is None else table.view(torch.uint8).flatten().numpy(),
        max_pixels,
        threads,
        mode == "fast",
        _pillow_filters_tall_images_down_first(),
        True,
        raw_array,
    )
    for_pillow = np.flatnonzero(codes == _NEEDS_PILLOW).tolist()
    if for_pillow:
        _decode_one_by_one(
            reference_decode_image,
            for_pillow,
            buffers,
            box_array,
            flip_array,
            raw_array,
            table,
            max_pixels,
            threads,
            out,
            codes,
        )
    return out, codes


def reference_decode_image(
    data: bytes,
    box: Sequence[int],
    flip: bool,
    size: int,
    max_pixels: int = PIXEL_LIMIT,
    raw_size: Sequence[int] = (0, 0),
) -> tuple[NDArray[np.uint8] | None, DecodeCode]:
    """One image of `decode_batch` with Pillow: pixels [size, size, 3] and `OK`, or `None` and what is wrong.

    Args:
        data: the JPEG, or pixels.
        box: (left, top, width, height) in pixels of the upright image; four zeros take all of it.
        flip: whether it is mirrored left to right.
        size: side of the output in pixels.
        max_pixels: the largest width x height that is decoded.
        raw_size: width and height where `data` are RGB pixels; two zeros for a JPEG.
    """
    if not data:
        return None, DecodeCode.EMPTY
    raw_width, raw_height = (int(value) for value in raw_size)
    if raw_width:
        if raw_width * raw_height > max_pixels:
            return None, DecodeCode.TOO_MANY_PIXELS
        if len(data) != 3 * raw_width * raw_height:
            return None, DecodeCode.UNREADABLE
        return _resized(Image.frombytes("RGB", (raw_width, raw_height), data), box, flip, size)
    if not data.startswith(b"\xff\xd8\xff"):
        return None, DecodeCode.NOT_AN_IMAGE
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data), "")
        if image.width * image.height > max_pixels:
            return None, DecodeCode.TOO_MANY_PIXELS
        image.load()
        upright = UPRIGHT.get(_orientation(image))
        image = image.convert("RGB")
    except MemoryError:
        return None, DecodeCode.OUT_OF_MEMORY
    except Exception as error:  # Pillow raises anything from SyntaxError to struct.error on damaged data
        cut = "truncated" in str(error).lower() or b"\xff\xd9" not in data[-4096:]
        return None, DecodeCode.TRUNCATED if cut else DecodeCode.UNREADABLE
    if upright is not None:
        image = image.transpose(upright)
    return _resized(image, box, flip, size)


def _resized(
    image: Image.Image, box: Sequence[int], flip: bool, size: int
) -> tuple[NDArray[np.uint8] | None, DecodeCode]:
    left, top, width, height = (int(value) for value in box)
    if (left, top, width, height) == (0, 0, 0, 0):
        width, height = image.size
    if min(left, top) < 0 or min(width, height) < 1 or left + width > image.width or top + height > image.height:
        return None, DecodeCode.BOX_OUTSIDE
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return pixels[:, ::-1].copy() if flip else pixels, DecodeCode.OK


def simplejpeg_decode_image(
    data: bytes,
    box: Sequence[int],
    flip: bool,
    size: int,
    max_pixels: int = PIXEL_LIMIT,
    raw_size: Sequence[int] = (0, 0),
) -> tuple[NDArray[np.uint8] | None, DecodeCode]:
    """`reference_decode_image` with simplejpeg and torch's bicubic, close to it and not equal.

    What simplejpeg does not take or may take wrongly is the reference's: stored pixels, damage, CMYK, rotated ones.
    """
    may_be_rotated = b"Exif" in data or b"Orientation" in data
    try:
        if any(raw_size) or may_be_rotated:
            raise ValueError
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if width * height > max_pixels or colours not in ("YCbCr", "RGB", "Gray"):
            raise ValueError
        image = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return reference_decode_image(data, box, flip, size, max_pixels, raw_size)
    left, top, crop_width, crop_height = (int(value) for value in box)
    if (left, top, crop_width, crop_height) == (0, 0, 0, 0):
        crop_width, crop_height = width, height
    inside = min(left, top) >= 0 and left + crop_width <= width and top + crop_height <= height
    if not inside or min(crop_width, crop_height) < 1:
        return None, DecodeCode.BOX_OUTSIDE
    # Channels-last, which is what torch's vector code wants.
    crop = torch.from_numpy(image[top : top + crop_height, left : left + crop_width]).permute(2, 0, 1)[None]
    bicubic = functools.partial(F.interpolate, mode="bicubic", antialias=True)
    tall = crop_height > size and crop_height - size > 2 * (crop_width - size)
    if tall and _pillow_filters_tall_images_down_first():
        crop = bicubic(crop, (size, crop_width))
    pixels = bicubic(crop, (size, size))[0].permute(1, 2, 0).numpy()
    return (pixels[:, ::-1] if flip else pixels).copy(), DecodeCode.OK


def live_decoder() -> Literal["cpp", "simplejpeg", "reference"]:
    """What `impl=None` takes."""
    if image_decode_unsupported_reason() is None:
        return "cpp"
    return "simplejpeg" if simplejpeg_unsupported_reason() is None else "reference"


def simplejpeg_unsupported_reason() -> str | None:
    """Why simplejpeg cannot stand in for the compiled implementation; `None` where it can."""
    return "simplejpeg is not installed: pip install 'vpgtrans[simplejpeg]'" if simplejpeg is None else None


def image_decode_unsupported_reason() -> str | None:
    """Why the compiled implementation cannot run here; `None` where it can."""
    if reason := compiled.missing_reason():
        return reason
    if not hasattr(compiled.C, "decode_images"):
        return (
            "vpgtrans.kernels._C was built without libjpeg-turbo; install its headers (Debian, Ubuntu: libjpeg-dev, "
            "Fedora: libjpeg-turbo-devel), then the package again: pip install ."
        )
    return None


def _decode_one_by_one(
    decode_image: Callable[..., tuple[NDArray[np.uint8] | None, DecodeCode]],
    which: Sequence[int],
    buffers: list[tuple[int, int, object]],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    raw_sizes: NDArray[np.int32],
    table: torch.Tensor | None,
    max_pixels: int,
    threads: int,
    out: torch.Tensor,
    codes: NDArray[np.int32],
) -> None:
    """Writes the images `which` to `out`, and their codes."""

    def decode(i: int) -> None:
        address, byte_count, _ = buffers[i]
        data = ctypes.string_at(address, byte_count)
        raw_size = raw_sizes[i] if len(raw_sizes) else (0, 0)
        pixels, codes[i] = decode_image(data, boxes[i], bool(flips[i]), out.shape[-1], max_pixels, raw_size)
        if pixels is None:
            out[i] = 0
            return
        levels = torch.from_numpy(pixels).permute(2, 0, 1)
        if table is None:
            out[i] = levels
        else:
            for channel in range(3):
                out[i, channel] = table[channel][levels[channel].long()]

    with ThreadPoolExecutor(min(threads, max(len(which), 1))) as pool:
        list(pool.map(decode, which))


@functools.cache
def _pillow_filters_tall_images_down_first() -> bool:
    """Whether this Pillow filters columns before rows where the height shrinks by more than twice what the width does.

    Pillow 13 does, its earlier versions never; since the pixels are rounded to 8 bits between, the results differ.
    """
    levels = np.random.default_rng(0).integers(0, 256, (64, 12, 3), np.uint8)
    image, bicubic = Image.fromarray(levels), Image.Resampling.BICUBIC
    down_first = image.resize((12, 8), bicubic).resize((8, 8), bicubic)
    return image.resize((8, 8), bicubic).tobytes() == down_first.tobytes()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image; 1 where the tag is absent or its block is damaged."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block must not cost a readable image
        return 1
    return value if isinstance(value, int) else 1


def _address(item: Slice, i: int) -> tuple[int, int, object]:
    """(address, bytes, what keeps them alive) of a slice."""
    if isinstance(item, tuple):
        if len(item) != 2 or not all(isinstance(value, (int, np.integer)) and 0 <= value < 2**63 for value in item):
            raise TypeError(f"decode_batch: slices[{i}] is {item!r}, expected (address, bytes) where it is a tuple")
        address, byte_count = int(item[0]), int(item[1])
        if byte_count and not address:
            raise ValueError(f"decode_batch: slices[{i}] is {byte_count} bytes at address 0")
        return address, byte_count, None
    if isinstance(item, torch.Tensor):
        if item.dtype != torch.uint8 or item.device.type != "cpu" or not item.is_contiguous():
            raise TypeError(
                f"decode_batch: slices[{i}] is a tensor of {item.dtype} on {item.device}, expected contiguous uint8 on "
                "the CPU"
            )
        return item.data_ptr(), item.numel(), item
    try:
        view = np.frombuffer(item, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(
            f"decode_batch: slices[{i}] is {type(item).__name__}, expected bytes, a contiguous buffer, a uint8 tensor "
            f"or (address, bytes): {error}"
        ) from error
    return view.ctypes.data, view.nbytes, view


def _boxes(boxes: object, images: int) -> NDArray[np.int32]:
    if boxes is None:
        return np.zeros((images, 4), np.int32)
    array = np.asarray(boxes)
    if array.size == 0:
        array = array.astype(np.int32).reshape(-1, 4)
    if array.dtype.kind not in "iu" or array.shape != (images, 4):
        raise ValueError(
            f"decode_batch: boxes has shape {array.shape} and dtype {array.dtype}, expected [{images}, 4] integers: "
            "left, top, width, height of each image"
        )
    # A number that no image is as large as stays one.
    return np.ascontiguousarray(array.clip(-1, 2**30), np.int32)


def _flips(flips: object, images: int) -> NDArray[np.bool_]:
    if flips is None:
        return np.zeros(images, np.bool_)
    array = np.asarray(flips)
    if array.size == 0:
        array = array.astype(np.bool_)
    if array.dtype != np.bool_ or array.shape != (images,):
        raise ValueError(
            f"decode_batch: flips has shape {array.shape} and dtype {array.dtype}, expected [{images}] booleans"
        )
    return np.ascontiguousarray(array)


def _raw_sizes(raw_sizes: object, images: int) -> NDArray[np.int32]:
    """[images, 2], or nothing where all are JPEGs."""
    if raw_sizes is None:
        return np.zeros((0, 2), np.int32)
    array = np.asarray(raw_sizes)
    if array.size == 0:
        array = array.astype(np.int32).reshape(-1, 2)
    if array.dtype.kind not in "iu" or array.shape != (images, 2) or (array < 0).any():
        raise ValueError(
            f"decode_batch: raw_sizes has shape {array.shape} and dtype {array.dtype}, expected [{images}, 2] integers: "
            "width and height of stored pixels, 0 and 0 for a JPEG"
        )
    return np.ascontiguousarray(array.clip(0, 2**30), np.int32)


def _output(out: torch.Tensor | None, dtype: torch.dtype | None, images: int, size: int) -> torch.Tensor:
    wanted = dtype if dtype is not None or out is None else out.dtype
    wanted = torch.uint8 if wanted is None else wanted
    if wanted not in _ELEMENT_BYTES:
        raise ValueError(f"decode_batch: dtype is {wanted}, expected torch.uint8, torch.bfloat16 or torch.float32")
    shape = (images, 3, size, size)
    if out is None:
        return torch.empty(shape, dtype=wanted, memory_format=torch.channels_last)
    if out.dtype != wanted or tuple(out.shape) != shape or out.device.type != "cpu":
        raise ValueError(
            f"decode_batch: out is {out.dtype} {tuple(out.shape)} on {out.device}, expected {wanted} {shape} on the CPU"
        )
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"decode_batch: out has strides {out.stride()}, expected channels-last memory; "
            "make it with memory_format=torch.channels_last"
        )
    return out


def _value_table(
    dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None
) -> torch.Tensor | None:  # [3, 256]
    """What becomes of each level of each channel; `None` for uint8."""
    if dtype == torch.uint8:
        return None
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"decode_batch: mean is {mean!r} and std {std!r}, expected 3 numbers each, std above 0, for {dtype}; "
            "only uint8 is written without them"
        )
    return _cached_value_table(dtype, tuple(float(x) for x in mean), tuple(float(x) for x in std))


@functools.lru_cache(maxsize=16)
def _cached_value_table(dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    levels = torch.arange(256, dtype=torch.float32).expand(3, 256).clone()
    mean_3, std_3 = (torch.tensor(values, dtype=torch.float32).view(3, 1) for values in (mean, std))
    return levels.div_(255).sub_(mean_3).div_(std_3).to(dtype)


def _int_in_range(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"decode_batch: {name} is {value!r} ({type(value).__name__}), expected an int")
    if not low <= value <= high:
        raise ValueError(f"decode_batch: {name} is {value}, expected {low}..{high}")
    return int(value)


def _default_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@functools.cache
def _log_fallback_once(impl: str, reason: str) -> None:
    logger.warning("decode_batch decodes with %s: %s", {"reference": "Pillow"}.get(impl, impl), reason)
