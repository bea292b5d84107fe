"""Row packing: the compiled one against its plain Python reference and a NumPy first-fit-decreasing.

All pack the same caption-like lengths; the compiled result is compared with the reference before anything is timed.
Runs are interleaved, so that a change in the machine's load meets all of them; medians are reported.

    python benches/bench_row_packing.py [--items N] [--budget TOKENS] [--repeats N] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import numpy as np

from vpgtrans.kernels import pack_rows


def caption_lengths(items: int) -> np.ndarray:
    """Token counts like COCO's captions: 10 and a few, a long tail to the right."""
    return np.clip(10 + np.random.default_rng(0).negative_binomial(2, 0.4, items), 8, 50).astype(np.int32)


def numpy_first_fit(lengths: np.ndarray, budget: int) -> np.ndarray:
    """The usual loop: sort with NumPy, scan the rows' free space for the first that fits."""
    free_of_row = np.full(len(lengths), budget)
    row_of_item = np.empty(len(lengths), np.int32)
    row_count = 1
    for item in np.argsort(-lengths, kind="stable"):
        fits = free_of_row[:row_count] >= lengths[item]
        row = int(fits.argmax())
        if not fits[row]:
            row = row_count
            row_count += 1
        free_of_row[row] -= lengths[item]
        row_of_item[item] = row
    return row_of_item


def fill(lengths: np.ndarray, budget: int, rows: np.ndarray) -> float:
    """Share of the rows' tokens that items take."""
    return float(lengths.sum() / ((int(rows.max()) + 1) * budget))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--budget", type=int, default=512, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()

    lengths = caption_lengths(options.items)
    peers = {
        "cpp": lambda: pack_rows(lengths, options.budget, impl="cpp"),
        "reference": lambda: pack_rows(lengths, options.budget, impl="reference"),
        "numpy first-fit": lambda: numpy_first_fit(lengths, options.budget),
    }
    rows = {name: pack() for name, pack in peers.items()}
    np.testing.assert_array_equal(rows["cpp"], rows["reference"])

    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.repeats):
        for name, pack in peers.items():
            start = time.perf_counter()
            pack()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        name: {
            "median_ms": round(1e3 * median, 3),
            "items_per_s": round(options.items / median),
            "times_cpp": round(median / medians["cpp"], 1),
            "fill_percent": round(100 * fill(lengths, options.budget, rows[name]), 2),
        }
        for name, median in medians.items()
    }
    if options.json:
        settings = {"items": options.items, "budget": options.budget, "repeats": options.repeats}
        print(json.dumps({"bench": "row_packing", "machine": platform.machine(), **settings, "results": results}))
        return
    print(f"row packing: {options.items} items, {options.budget} tokens a row, median of {options.repeats} runs")
    for name, result in results.items():
        print(
            f"  {name:16} {result['median_ms']:10.2f} ms {result['items_per_s']:12,} items/s "
            f"{result['times_cpp']:8.1f} x cpp's time   fill {result['fill_percent']:.2f} %"
        )


if __name__ == "__main__":
    main()
