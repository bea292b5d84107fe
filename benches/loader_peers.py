"""The loaders that bench_loader.py compares, and one measurement of one of them in a process of its own.

bench_loader.py writes a set (`bench_loader.write_set` says what lies where) and runs, for every figure it reports,

    python benches/loader_peers.py PEER SET --batch N --workers N --epochs N

which imports torch, NumPy and Pillow, then starts the clock: what the peer imports beyond them, opening the set, whatever
it compiles and its first batch are `first_batch_ms`. That epoch is checked; the ones after it are timed. Result: one JSON
object, the last line of the output. A peer is a function (set, batch size, workers) -> (epoch -> its batches), uint8
[images, 3, 224, 224], random order, crop of 50-100 % of the area and flip.

One worker decodes in the calling process where a peer can do that (torch's DataLoader and its kin: no worker process, no
copies between processes, the least CPU time); more are that many threads (ours, FFCV) or worker processes (all others).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, JpegImagePlugin  # noqa: F401  the plugin, so that nobody's clock meets its import

SIZE = 224
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
SEED = 0
# FFCV allocates its buffers anew for every epoch, up to 2 ms an image in a set of 192: it gets one epoch of many passes.
FFCV_PASSES = 100

Epochs = Callable[[int], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Peer:
    label: str
    make: Callable[[Path, int, int], Epochs]
    needs: str | None = None  # the module without which it is not installed
    filter: str = "bicubic, antialiased"
    cannot: str = ""


def ours(folder: Path, batch: int, workers: int, *, packed: bool = True, mode: str = "exact") -> Epochs:
    """What training's LiveFeatures.prepare does, over the records that training reads."""
    from vpgtrans.engine.data.coco import read_captions, read_pack
    from vpgtrans.engine.data.decode import load_batch
    from vpgtrans.engine.data.images import sample_rng

    if packed:
        records = read_pack(folder / "packed", verify_images="none").records
    else:
        records = read_captions(folder / "captions.json", folder / "images", verify_images="none").records
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        for chosen in np.array_split(order(len(records), epoch), range(batch, len(records), batch)):
            wanted = [records[i] for i in chosen]
            rngs = [sample_rng(SEED, epoch, record.image_id) for record in wanted]
            yield load_batch([record.path for record in wanted], SIZE, rngs, pool, workers, mode=mode)

    return batches


def order(images: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((SEED, epoch)).permutation(images)


def ffcv(folder: Path, batch: int, workers: int, *, kind: str) -> Epochs:
    """FFCV's own pipeline over the files that `vpgtrans pack` writes."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    beton = next((folder / kind).glob("*.beton"))
    images = len(list((folder / "images").iterdir()))
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE, ratio=RATIO)
    pipelines = {"image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "captions": None}
    # Every pass in an order of its own, with every image once; OrderOption.RANDOM would mix the passes.
    passes = np.concatenate([order(images, n)[: images - images % batch] for n in range(FFCV_PASSES)])
    loader = Loader(
        str(beton), batch_size=batch, num_workers=workers, order=OrderOption.SEQUENTIAL, os_cache=True, pipelines=pipelines, indices=passes
    )  # fmt: skip
    stream = (part for (part,) in loader)
    return lambda _: itertools.islice(stream, images // batch)


def pillow_pixels(file: Path | io.BytesIO, rng: np.random.Generator) -> torch.Tensor:
    from vpgtrans.engine.data.images import crop_box

    image = Image.open(file)
    left, top, width, height = crop_box(*image.size, rng, SCALE, RATIO)
    image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def simplejpeg_pixels(file: Path, rng: np.random.Generator) -> torch.Tensor:
    import simplejpeg

    from vpgtrans.engine.data.images import crop_box

    data = file.read_bytes()
    image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    left, top, width, height = crop_box(image.shape[2], image.shape[1], rng, SCALE, RATIO)
    crop = image[None, :, top : top + height, left : left + width]
    pixels = torch.nn.functional.interpolate(crop, (SIZE, SIZE), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


class LooseImages(torch.utils.data.Dataset):
    def __init__(self, folder: Path, pixels: Callable[[Path, np.random.Generator], torch.Tensor]):
        self.files, self.pixels, self.rng = sorted((folder / "images").glob("*.jpg")), pixels, np.random.default_rng()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.pixels(self.files[i], self.rng)


def data_loader(folder: Path, batch: int, workers: int, *, pixels: Callable) -> Epochs:
    if pixels is simplejpeg_pixels:
        import simplejpeg  # noqa: F401  with the other imports, not in the first item
    loader = torch.utils.data.DataLoader(
        LooseImages(folder, pixels), batch_size=batch, shuffle=True, **worker_processes(workers)
    )
    return lambda _: loader


def worker_processes(workers: int) -> dict[str, Any]:
    if workers == 1:
        return {"num_workers": 0}
    return {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": "fork"}


def webdataset(folder: Path, batch: int, workers: int) -> Epochs:
    import webdataset as wds

    rng = np.random.default_rng()
    tars = sorted(str(path) for path in folder.glob("tars/*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).to_tuple("jpg")
    dataset = dataset.map_tuple(lambda data: pillow_pixels(io.BytesIO(data), rng))
    dataset = dataset.batched(batch, collation_fn=lambda samples: torch.stack([pixels for (pixels,) in samples]))
    loader = wds.WebLoader(dataset, batch_size=None, **worker_processes(workers))
    return lambda _: loader


def litdata(folder: Path, batch: int, workers: int) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset

    rng = np.random.default_rng()

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return pillow_pixels(io.BytesIO(super().__getitem__(index)["jpg"]), rng)

    dataset = Images(str(folder / "litdata"), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=batch, shuffle=True, **worker_processes(workers))
    return lambda _: loader


def litdata_sample(file: str) -> dict[str, bytes]:
    return {"jpg": Path(file).read_bytes()}


def write_litdata(folder: Path) -> None:
    from litdata import optimize

    files = sorted(str(path) for path in (folder / "images").glob("*.jpg"))
    optimize(litdata_sample, files, str(folder / "litdata"), chunk_bytes="64MB", num_workers=1, verbose=False)


AREA = "area interpolation only, no bicubic; crops cannot be seeded"
PEERS: dict[str, Peer] = {
    "ours": Peer("ours, exact", ours),
    "ours-fast": Peer("ours, fast", functools.partial(ours, mode="fast"), filter="DCT scaling, then bicubic"),
    "ours-loose": Peer("ours, loose files", functools.partial(ours, packed=False)),
    "ffcv-jpg": Peer("FFCV jpg", functools.partial(ffcv, kind="packed"), "ffcv", "area", AREA),
    "ffcv-raw": Peer("FFCV raw", functools.partial(ffcv, kind="raw"), "ffcv", "area", f"{AREA}; decoded pixels on disk"),
    "pillow": Peer("Pillow + DataLoader", functools.partial(data_loader, pixels=pillow_pixels)),
    "simplejpeg": Peer(
        "simplejpeg + torch", functools.partial(data_loader, pixels=simplejpeg_pixels), "simplejpeg",
        cannot="reads baseline and progressive JPEG only",
    ),
    "webdataset": Peer(
        "webdataset + Pillow", webdataset, "webdataset", cannot="random order within a buffer of 1,000 images only"
    ),
    "litdata": Peer("litdata + Pillow", litdata, "litdata", cannot="random order within its chunks only"),
}  # fmt: skip


def cpu_s() -> float:
    """CPU seconds, user and system, of this process and its worker processes, those that have ended included."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def memory_mib(key: str) -> float:
    """VmRSS, VmHWM (its peak) or RssFile (its part in mapped files) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def workers_own_mib() -> float:
    """What the worker processes do not share with others."""
    lines = [
        line
        for worker in multiprocessing.active_children()
        for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure(peer: str, folder: Path, batch: int, workers: int, epochs: int) -> dict[str, Any]:
    gc.collect()
    # Pages that importing has freed are given back, and the peak starts here: neither is the peer's.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_mib, files_before_mib = memory_mib("VmRSS"), memory_mib("RssFile")
    started = time.perf_counter()
    epoch = PEERS[peer].make(folder, batch, workers)
    batches = iter(epoch(0))
    open_s = time.perf_counter() - started
    first = next(batches)
    first_batch_s = time.perf_counter() - started

    images = len(list((folder / "images").iterdir()))
    level_sum, count = 0, 0
    for part in itertools.chain([first], batches):
        assert part.dtype == torch.uint8 and tuple(part.shape[1:]) == (3, SIZE, SIZE), (part.dtype, part.shape)
        count += len(part)
        level_sum += int(part.sum())
    assert count == images, f"{count} images in an epoch of {images}"
    del first, part

    cpu_ms, wall_ms = [], []
    for number in range(1, epochs + 1):
        cpu, wall, count = cpu_s(), time.perf_counter(), 0
        for part in epoch(number):
            count += len(part)
        cpu_ms.append(1e3 * (cpu_s() - cpu) / images)
        wall_ms.append(1e3 * (time.perf_counter() - wall) / images)
        assert count == images, f"{count} images in an epoch of {images}"
    needs = PEERS[peer].needs
    return {
        "cpu_ms": cpu_ms,
        "wall_ms": wall_ms,
        "open_ms": 1e3 * open_s,
        "first_batch_ms": 1e3 * first_batch_s,
        "peak_mib": memory_mib("VmHWM") - before_mib + workers_own_mib(),
        "of_it_mapped_files_mib": memory_mib("RssFile") - files_before_mib,
        "mean_level": level_sum / (images * 3 * SIZE * SIZE),
        "version": importlib.metadata.version(needs) if needs else None,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("set", type=Path, help="folder as bench_loader.py writes it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the peer's own files instead (litdata)")
    options = parser.parse_args()

    torch.set_num_threads(options.workers)
    if options.write:
        write_litdata(options.set)
        return
    print(json.dumps(measure(options.peer, options.set, options.batch, options.workers, options.epochs)), flush=True)


if __name__ == "__main__":
    main()
