"""Word embeddings and soft prompts into packed rows: ours against torch's embedding, index_copy and their backward.

Rows are packed as in training, from 5 captions of about 13 tokens behind 32 visual ones. Correctness first (forward bit by bit), then time
(interleaved, medians) of forward and of forward and backward, GB/s, share of the floor (every row read and written once at the measured copy
bandwidth) and, on a GPU, peak memory above the operands.

    python benches/bench_prompt_assembly.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import about, copy_bandwidth, device_title, interleaved_ms, peak_mib
from torch import Tensor

from vpgtrans.engine.data.packing import CaptionData, Group, PackedBatch, pack_update
from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.prompt_assembly import (
    prompt_assembly,
    prompt_assembly_unsupported_reason,
    reference_prompt_assembly,
)

VISUAL, CAPTIONS = 32, 5
# name, rows, tokens of a row, vocabulary, width
CUDA_SHAPES = (
    ("OPT-6.7B", 8, 2048, 50272, 4096),
    ("OPT-2.7B", 8, 2048, 50272, 2560),
    ("Qwen3-8B", 8, 2048, 151936, 4096),
    ("OPT-125M", 16, 512, 50272, 768),
)
CPU_SHAPES = (("demo", 4, 256, 160, 192), ("OPT-125M", 4, 512, 50272, 768))


def packed_rows(rows: int, tokens: int, vocabulary: int) -> PackedBatch:
    rng = np.random.default_rng(0)
    images = 2 * rows * tokens // (VISUAL + 13 * CAPTIONS) + 1
    lengths = rng.normal(13, 2.5, (images, CAPTIONS)).round().clip(8, 30).astype(int)
    ids = [[rng.integers(0, vocabulary, n).tolist() for n in row] for row in lengths]
    groups = [Group(image, 0, tuple(range(CAPTIONS))) for image in range(images)]
    return pack_update(groups, CaptionData("bench", [None] * images, ids), VISUAL, tokens, rows, 0, fixed_shape=True)[0]


def measure(device: torch.device, shape: tuple, repeats: int, bandwidth: float) -> dict:
    torch.manual_seed(0)
    _, rows, tokens, vocabulary, width = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = packed_rows(rows, tokens, vocabulary).to(device)
    table = torch.randn(vocabulary, width, device=device, dtype=dtype)
    prompts = torch.randn(len(batch.groups), VISUAL, width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, tokens, width, device=device, dtype=dtype)
    indices = (batch.visual_slots, batch.visual_source)
    peers: dict[str, Callable[[Tensor], Tensor]] = {}
    if device.type == "cuda" and prompt_assembly_unsupported_reason(batch.ids, table, prompts) is None:
        peers["ours"] = lambda p: prompt_assembly(batch.ids, table, p, *indices, impl="triton")
    peers["torch"] = lambda p: reference_prompt_assembly(batch.ids, table, p, *indices)

    def forward(run: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            run(prompts)

    def both(run: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(run(prompts), prompts, gradient)[0]

    if "ours" in peers:
        assert torch.equal(peers["ours"](prompts), peers["torch"](prompts)), f"{shape[0]}: rows differ from torch's"
        wide = torch.zeros(prompts[..., 0].numel(), width, dtype=torch.float64, device=device)
        wide.index_add_(0, batch.visual_source, gradient.flatten(0, 1)[batch.visual_slots].double())
        assert_within_budget("gradient", both(peers["ours"]), wide.view_as(prompts), both(peers["torch"]))
    parts = {"forward": forward, "forward_backward": both}
    calls = {
        (name, part): lambda call=call, run=run: call(run)
        for name, run in peers.items()
        for part, call in parts.items()
    }
    times = interleaved_ms(device, calls, repeats)
    moved = {"forward": 2 * gradient.nbytes}
    moved["forward_backward"] = moved["forward"] + len(batch.visual_slots) * width * dtype.itemsize + prompts.nbytes
    results = {}
    for name in peers:
        results[name] = row = {}
        for part in parts:
            ms = times[name, part]
            row[part] = {
                "ms": round(ms, 4), "gb_per_s": round(moved[part] / ms / 1e6, 1), "share_of_floor": round(1e3 * moved[part] / bandwidth / ms, 3),
                "times_torch": round(ms / times["torch", part], 3),
            }  # fmt: skip
        if device.type == "cuda":
            row["peak_mib"] = peak_mib(lambda run=peers[name]: both(run))
    sizes = dict(zip(("rows", "tokens", "vocabulary", "width"), shape[1:], strict=True))
    return sizes | {"visual_share": round(len(batch.visual_slots) / (rows * tokens), 3), "peers": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON object to a file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    described = device_title(device)
    unit = "ms" if device.type == "cuda" else "CPU ms"
    bandwidth = copy_bandwidth(device)
    print(
        f"prompt_assembly, {described}, copies at {bandwidth / 1e9:.0f} GB/s, median of {options.repeats} interleaved runs"
    )
    head = about("prompt_assembly", device, repeats=options.repeats)
    results: dict = {}
    for shape in CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES:
        result = results[shape[0]] = measure(device, shape, options.repeats, bandwidth)
        print(
            f"{shape[0]}: {shape[1]} rows of {shape[2]}, {shape[4]} wide, {100 * result['visual_share']:.0f} % visual"
        )
        for name, row in result["peers"].items():
            for part in ("forward", "forward_backward"):
                print(
                    f"  {name:6} {part.replace('_', ' + '):20} {row[part]['ms']:9.3f} {unit}, {row[part]['times_torch']:.3f} x torch's, "
                    f"{row[part]['gb_per_s']:8.1f} GB/s, {100 * row[part]['share_of_floor']:5.1f} % of the floor"
                )
            if "peak_mib" in row:
                print(f"  {name:6} peak {row['peak_mib']:.0f} MiB")
        if options.out:
            options.out.write_text(json.dumps(head | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
