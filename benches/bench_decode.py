"""Decoding JPEGs to 224 x 224 training crops: ours exact and fast, Pillow, simplejpeg + torch, on the same images.

Seeded photograph-like JPEGs of 480 x 360, 640 x 480 and 960 x 720, and real photographs where VPGTRANS_DATA names a folder
that holds daquar/images or flickr8k/images. One thread each. Ours exact is compared with Pillow bit by bit before anything
is timed. Runs are interleaved, so that a change in the machine's load meets all of them; medians of CPU milliseconds an
image are reported, since on a shared machine CPU time is steadier than the clock.

    python benches/bench_decode.py [--images N] [--repeats N] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpgtrans.engine.data.images import crop_box, sample_rng
from vpgtrans.kernels.image_decode import decode_batch, image_decode_unsupported_reason

SIZE = 224
SIDES = ((480, 360), (640, 480), (960, 720))
REAL_FOLDERS = ("daquar/images", "flickr8k/images")
QUALITY = 90

Crop = tuple[int, int, int, int]


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have it: octaves of smooth noise, coarser ones stronger."""
    rng = np.random.default_rng(seed)
    total = rng.normal(0, 1.5, (height, width, 1)).repeat(3, 2)
    for octave in range(1, 8):
        step = 2**octave
        noise = rng.normal(0, step**0.8, (height // step + 2, width // step + 2, 3)).astype(np.float32)
        channels = [Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(channel) for channel in channels], -1)
    levels = (total - total.mean()) / total.std() * 50 + 120
    buffer = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def image_sets(images: int) -> dict[str, list[bytes]]:
    sets = {f"{w} x {h}": [photograph(w, h, seed) for seed in range(images)] for w, h in SIDES}
    root = os.environ.get("VPGTRANS_DATA")
    for folder in REAL_FOLDERS if root else ():
        files = sorted((Path(root) / folder).glob("*.jpg"))[:images]
        if files:
            sets[folder] = [file.read_bytes() for file in files]
    return sets


def pillow(datas: list[bytes], crops: list[Crop], flips: list[bool]) -> torch.Tensor:
    out = torch.empty(len(datas), 3, SIZE, SIZE, dtype=torch.uint8)
    for i, (data, (left, top, width, height), flip) in enumerate(zip(datas, crops, flips, strict=True)):
        image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        out[i] = pixels.flip(-1) if flip else pixels
    return out


def simplejpeg_torch(datas: list[bytes], crops: list[Crop], flips: list[bool]) -> torch.Tensor:
    import simplejpeg

    out = torch.empty(len(datas), 3, SIZE, SIZE, dtype=torch.uint8)
    for i, (data, (left, top, width, height), flip) in enumerate(zip(datas, crops, flips, strict=True)):
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)[None]
        crop = image[:, :, top : top + height, left : left + width]
        pixels = torch.nn.functional.interpolate(crop, (SIZE, SIZE), mode="bicubic", antialias=True)[0]
        out[i] = pixels.flip(-1) if flip else pixels
    return out


def ours(mode: str) -> Callable[[list[bytes], list[Crop], list[bool]], torch.Tensor]:
    return lambda datas, crops, flips: decode_batch(datas, crops, flips, SIZE, threads=1, mode=mode)[0]


def measure(datas: list[bytes], peers: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    crops, flips = [], []
    for i, data in enumerate(datas):
        rng = sample_rng(0, 0, i)
        crops.append(crop_box(*Image.open(io.BytesIO(data)).size, rng))
        flips.append(bool(rng.random() < 0.5))
    results = {name: run(datas, crops, flips) for name, run in peers.items()}
    assert torch.equal(results["ours, exact"], results["Pillow"]), "ours differs from Pillow"

    cpu_ms: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, run in peers.items():
            start = time.process_time()
            run(datas, crops, flips)
            cpu_ms[name].append(1e3 * (time.process_time() - start) / len(datas))
    medians = {name: statistics.median(values) for name, values in cpu_ms.items()}
    exact = results["Pillow"].int()
    return {
        name: {
            "cpu_ms_an_image": round(median, 3),
            "share_of_pillow": round(median / medians["Pillow"], 3),
            "mean_difference_levels": round(float((results[name].int() - exact).abs().float().mean()), 4),
        }
        for name, median in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="images of each set")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to a file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    peers: dict[str, Callable] = {"ours, exact": ours("exact"), "ours, fast": ours("fast"), "Pillow": pillow}
    absent = []
    if importlib.util.find_spec("simplejpeg"):
        peers["simplejpeg + torch"] = simplejpeg_torch
    else:
        absent.append("simplejpeg")
    results = {
        name: {"kilobytes_an_image": round(sum(map(len, datas)) / len(datas) / 1e3, 1)}
        | {"peers": measure(datas, peers, options.repeats)}
        for name, datas in image_sets(options.images).items()
    }
    found = {
        "bench": "decode",
        "machine": platform.machine(),
        "pillow": importlib.metadata.version("pillow"),
        "images": options.images,
        "repeats": options.repeats,
        "size": SIZE,
        "ours_runs_its_reference_because": image_decode_unsupported_reason(),
        "not_installed": absent,
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"decoding to {SIZE} x {SIZE} crops, one thread, median of {options.repeats} runs over {options.images} images"
    )
    if reason := found["ours_runs_its_reference_because"]:
        print(f"ours is its Pillow reference here: {reason}")
    for name in absent:
        print(f"not installed, so not measured: {name}")
    for name, result in results.items():
        print(f"{name}, {result['kilobytes_an_image']} kB an image")
        for peer, row in result["peers"].items():
            print(
                f"  {peer:20} {row['cpu_ms_an_image']:8.3f} CPU ms {row['share_of_pillow']:7.3f} x Pillow's   "
                f"differs from Pillow by {row['mean_difference_levels']:.3f} levels"
            )


if __name__ == "__main__":
    main()
