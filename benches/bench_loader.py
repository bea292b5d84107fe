"""Whole loaders, from files to batches of 224 x 224 crops: ours, FFCV, Pillow, simplejpeg, webdataset and litdata on the same images.

Seeded photograph-like JPEGs of 480 x 360, 640 x 480 and 960 x 720, and real photographs where --data or VPGTRANS_DATA names
a folder that holds daquar/images or flickr8k/images. The JPEG bytes are the same for all (FFCV raw: their pixels), in the
format of each: `vpgtrans pack`'s .beton (ours and FFCV's), loose files, tars, litdata's chunks. Every figure comes from a
process of its own, loader_peers.py, which says what a peer does. Runs of different peers are interleaved.

    CPU ms         user and system time of the process and its workers, an image; the median of all epochs of all runs
    images/s       by the clock, the median likewise; with nothing but the loader running
    first batch    by the clock, in a fresh process: importing what the peer needs beyond torch, NumPy and Pillow, opening the
                   set, compiling (FFCV: Numba, at every start) and the first batch; files are in the page cache
    peak MiB       resident memory above that before the peer is imported, mapped files (also given) and workers included

Correctness first: ours, exact, gives the pixels of `load_pixels`; of every peer the number, shape and dtype of the images
are checked, and that they are as bright as Pillow's. Peers that are not installed are named.

    python benches/bench_loader.py [--quick] [--data FOLDER] [--workers N] [--python PEER=PATH ...] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_decode import REAL_FOLDERS, SIDES, photograph
from loader_peers import PEERS, SEED, SIZE, order

from vpgtrans.engine.data.coco import read_captions
from vpgtrans.engine.data.images import load_pixels, sample_rng
from vpgtrans.engine.data.pack import PackSettings, pack
from vpgtrans.kernels.image_decode import image_decode_unsupported_reason

DISTINCT = 48  # generated images of a set that differ; a quarter of a second each
TARS = 8  # webdataset gives each worker whole tars
BATCH = 32
RUN_LIMIT_S = 300  # FFCV's loader hangs where one of its threads fails
LEVELS_APART = 3.0  # mean level of a set over its random crops, from Pillow's


def image_sets(images: int, sides: tuple[tuple[int, int], ...], data: Path | None) -> Iterator[tuple[str, list[bytes]]]:
    with ThreadPoolExecutor() as pool:
        for width, height in sides:
            distinct = list(pool.map(functools.partial(photograph, width, height), range(min(images, DISTINCT))))
            yield f"{width} x {height}", list(itertools.islice(itertools.cycle(distinct), images))
    for name in REAL_FOLDERS if data else ():
        files = sorted((data / name).glob("*.jpg"))[:images]
        if files:
            yield name, [file.read_bytes() for file in files]


def write_set(folder: Path, datas: list[bytes], peers: dict[str, str]) -> None:
    """images/*.jpg, captions.json, packed/ and, for the peers there are, raw/, tars/ and litdata/."""
    (folder / "images").mkdir(parents=True)
    for i, data in enumerate(datas):
        (folder / "images" / f"{i:06}.jpg").write_bytes(data)
    images = [{"id": i, "file_name": f"{i:06}.jpg"} for i in range(len(datas))]
    captions = [{"id": i, "image_id": i, "caption": "a photograph"} for i in range(len(datas))]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    pack(folder / "captions.json", folder / "packed", images=folder / "images")
    if "ffcv-raw" in peers:
        pack(folder / "captions.json", folder / "raw", PackSettings(raw=True), images=folder / "images")
    if "webdataset" in peers:
        (folder / "tars").mkdir()
        for number in range(TARS):
            with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
                for i in range(number, len(datas), TARS):
                    tar.add(folder / "images" / f"{i:06}.jpg", f"{i:06}.jpg")
    if "litdata" in peers:
        run_peer(peers["litdata"], "litdata", str(folder), "--write")


def check_ours(folder: Path) -> None:
    """Ours, exact: the pixels that `load_pixels` makes of the loose files, one by one, bit by bit."""
    records = read_captions(folder / "captions.json", folder / "images", verify_images="none").records
    rngs = [sample_rng(SEED, 0, record.image_id) for record in records]
    one_by_one = [load_pixels(record.path, SIZE, rng) for record, rng in zip(records, rngs, strict=True)]
    expected = torch.stack(one_by_one)[torch.from_numpy(order(len(records), 0))]
    for peer in ("ours", "ours-loose"):
        found = torch.cat(list(PEERS[peer].make(folder, BATCH, 1)(0)))
        assert torch.equal(found, expected), f"{PEERS[peer].label}: pixels differ from load_pixels"


def installed_peers(pythons: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """(peer -> its interpreter, labels of the peers that are not installed)."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    found, absent = {}, []
    for name, peer in PEERS.items():
        python = pythons.get(name, sys.executable)
        if peer.needs and subprocess.run([python, "-c", find, peer.needs]).returncode:
            absent.append(peer.label)
        else:
            found[name] = python
    return found, absent


def run_peer(python: str, *arguments: str) -> str:
    """The output of loader_peers.py; raises RuntimeError with the last line of its errors."""
    command = [python, str(Path(__file__).with_name("loader_peers.py")), *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end within {RUN_LIMIT_S} s") from None
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1])
    return ran.stdout


def measure(
    title: str, folder: Path, peers: dict[str, str], options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(peer -> its figures, peer -> what went wrong)."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    failed: dict[str, str] = {}
    for number in range(options.repeats):
        for name, python in peers.items():
            if name in failed:
                continue
            print(f"{title}, run {number + 1} of {options.repeats}: {PEERS[name].label}", file=sys.stderr)
            settings = [f"--batch={BATCH}", f"--workers={options.workers}", f"--epochs={options.epochs}"]
            try:
                runs[name].append(json.loads(run_peer(python, name, str(folder), *settings).splitlines()[-1]))
            except RuntimeError as error:
                failed[name] = str(error)
    figures = {name: summary(runs[name]) for name in peers if name not in failed}
    if "pillow" in figures:
        for name, figure in figures.items():
            figure["levels_from_pillow"] = apart = round(abs(figure["mean_level"] - figures["pillow"]["mean_level"]), 1)
            if apart >= LEVELS_APART:
                assert not name.startswith("ours"), f"{PEERS[name].label}: {apart} levels from Pillow's in brightness"
                print(f"{title}, {PEERS[name].label}: {apart} levels from Pillow's in brightness", file=sys.stderr)
    for baseline in ("ffcv-jpg", "pillow"):
        for figure in figures.values():
            whole = figures.get(baseline, {}).get("cpu_ms_an_image")
            figure[f"share_of_{baseline.replace('-', '_')}"] = whole and round(figure["cpu_ms_an_image"] / whole, 3)
    return figures, failed


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    cpu_ms, wall_ms = ([value for run in runs for value in run[key]] for key in ("cpu_ms", "wall_ms"))
    medians = {
        key: round(statistics.median(run[key] for run in runs), 1)
        for key in ("first_batch_ms", "open_ms", "peak_mib", "of_it_mapped_files_mib", "mean_level")
    }
    return {
        "cpu_ms_an_image": round(statistics.median(cpu_ms), 3),
        "images_per_s": round(1e3 / statistics.median(wall_ms), 1),
        **medians,
        "version": runs[0]["version"],
        "torch": runs[0]["torch"],
    }


def print_table(found: dict[str, Any]) -> None:
    print(
        f"loaders to {SIZE} x {SIZE} crops, {found['workers']} worker(s), {found['images']} images, median of "
        f"{found['repeats']} processes x {found['epochs']} epochs"
    )
    if reason := found["ours_runs_its_reference_because"]:
        print(f"ours is its Pillow reference here: {reason}")
    for label in found["not_installed"]:
        print(f"not installed, so not measured: {label}")
    for title, result in found["results"].items():
        print(f"\n{title}, {result['kilobytes_an_image']} kB an image")
        print(f"  {'':20} {'CPU ms':>8} {'x FFCV jpg':>10} {'x Pillow':>8} {'images/s':>9} {'first batch s':>13}"
              f" {'peak MiB':>8} {'mapped':>7}")  # fmt: skip
        for name, row in result["peers"].items():
            ffcv, pillow = (
                "-" if share is None else f"{share:.3f}" for share in (row["share_of_ffcv_jpg"], row["share_of_pillow"])
            )
            print(
                f"  {PEERS[name].label:20} {row['cpu_ms_an_image']:8.3f} {ffcv:>10} {pillow:>8} {row['images_per_s']:9.0f} "
                f"{row['first_batch_ms'] / 1e3:13.2f} {row['peak_mib']:8.0f} {row['of_it_mapped_files_mib']:7.0f}"
            )
        for name, reason in result["failed"].items():
            print(f"  {PEERS[name].label:20} failed: {reason}")
    print()
    for name, words in found["limits"].items():
        print(f"{PEERS[name].label}: {words}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="images of each set; default: 192, or 64 with --quick")
    parser.add_argument(
        "--repeats", type=int, help="processes a peer and set; default: 2, or 1 where only Pillow is there"
    )
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs a process, after one that is not timed")
    parser.add_argument("--workers", type=int, default=1, help="threads or worker processes")
    parser.add_argument("--quick", action="store_true", help="the smallest size only, fewer images, one process a peer")
    data = os.environ.get("VPGTRANS_DATA")
    parser.add_argument("--data", type=Path, default=data, metavar="FOLDER", help="real photographs ($VPGTRANS_DATA)")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH",
        help=f"interpreter that has a peer, where this one has not; peers: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--only-photographs", action="store_true", help="the sets of --data and no generated ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to a file")
    options = parser.parse_args()
    if options.images is None:
        options.images = 64 if options.quick else 192
    if options.images < 1 or options.images % BATCH:
        parser.error(f"--images: expected a multiple of {BATCH}, got {options.images}")
    options.pythons = dict(entry.partition("=")[::2] for entry in options.python)
    for name, path in options.pythons.items():
        if name not in PEERS or shutil.which(path) is None:
            parser.error(
                f"--python: expected PEER=PATH of an interpreter, got {name}={path}; peers: {', '.join(PEERS)}"
            )
    return options


def main() -> None:
    options = parse_options()
    peers, absent = installed_peers(options.pythons)
    sides, data = (SIDES[:1], None) if options.quick else (SIDES, options.data)
    if options.only_photographs:
        sides, data = (), options.data
    if options.repeats is None:  # nothing to wait for where there is nobody to compare with
        options.repeats = 1 if options.quick or not any(PEERS[name].needs for name in peers) else 2
    torch.set_num_threads(1)
    results = {}
    for title, datas in image_sets(options.images, sides, data):
        with tempfile.TemporaryDirectory(prefix="bench_loader-") as folder:
            write_set(Path(folder) / "set", datas, peers)
            check_ours(Path(folder) / "set")
            figures, failed = measure(title, Path(folder) / "set", peers, options)
        kilobytes = round(sum(map(len, datas)) / len(datas) / 1e3, 1)
        results[title] = {"kilobytes_an_image": kilobytes, "peers": figures, "failed": failed}
    found = {
        "bench": "loader",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "images": options.images,
        "batch": BATCH,
        "workers": options.workers,
        "repeats": options.repeats,
        "epochs": options.epochs,
        "size": SIZE,
        "ours_runs_its_reference_because": image_decode_unsupported_reason(),
        "not_installed": absent,
        "limits": {
            name: "; ".join(filter(None, (f"filter: {PEERS[name].filter}", PEERS[name].cannot))) for name in peers
        },
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        print_table(found)
    if any(result["failed"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
