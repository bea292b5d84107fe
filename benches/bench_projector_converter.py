"""Projector and converter into packed rows: merged weight and one product that scatters, against the chain and a copy of rows.

Each peer is compared with float64 before anything is timed. Runs are interleaved, so that a change in the machine's load meets all of them;
medians are reported. The merged weight is already formed (once an optimiser step), its forming is timed apart. The floor on a GPU is the larger
of the merged product at the measured matmul rate and its bytes at the measured copy bandwidth.

    python benches/bench_projector_converter.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import about, copy_bandwidth, matmul_rate, timed_ms

from vpgtrans.kernels.checks import assert_within_budget
from vpgtrans.kernels.projector_converter import (
    MergedFactors,
    projector_converter,
    projector_converter_unsupported_reason,
    reference_projector_converter,
)

QUERIES = 32
ROW_TOKENS = 97  # of an image with five captions of 13 tokens
# images, d_v, d_s, d_t; the most telling first: OPT-2.7B to 6.7B, a large micro-batch of it, OPT-125M to 1.3B.
CUDA_SHAPES = [(36, 768, 2560, 4096), (256, 768, 2560, 4096), (36, 768, 768, 2048)]
CPU_SHAPES = [(4, 768, 768, 2048), (36, 192, 256, 512)]


def measure(
    shape: tuple[int, ...], backward: bool, device: str, dtype: torch.dtype, repeats: int, rates: dict
) -> dict[str, dict]:
    images, width, source_width, target_width = shape
    torch.manual_seed(0)

    def leaf(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, device=device) * sizes[-1] ** -0.5).to(dtype).requires_grad_(backward)

    x = leaf(images * QUERIES, width)
    factors = (
        leaf(source_width, width),
        leaf(source_width),
        leaf(target_width, source_width).detach(),
        leaf(target_width).detach(),
    )
    into = torch.randn(images * ROW_TOKENS, target_width, device=device).to(dtype)
    slots = (torch.arange(images, device=device)[:, None] * ROW_TOKENS + torch.arange(QUERIES, device=device)).flatten()
    merged = MergedFactors()

    def merged_by_torch():
        weight, bias = merged.form(*factors, dtype)
        return into.index_copy(0, slots, F.linear(x, weight, bias))

    def ours(impl):
        return lambda: projector_converter(x, *factors, merged=merged, into=into, slots=slots, impl=impl)

    peers = {
        "chain, index_copy": lambda: reference_projector_converter(x, *factors, into, slots),
        "merged, torch": ours("reference"),
    }
    if not backward:
        peers["merged, index_copy"] = merged_by_torch
    if projector_converter_unsupported_reason(dtype, torch.device(device)) is None:
        peers["merged, kernel"] = ours("triton")
    exact = reference_projector_converter(*(t.double() for t in (x, *factors)), into.double(), slots)
    plain = reference_projector_converter(x, *factors, into, slots)
    for name, run in peers.items():
        assert_within_budget(name, run().detach(), exact.detach(), plain.detach())

    def once(run):
        into.detach_()  # written in place, it joins the graph
        with torch.set_grad_enabled(backward):
            out = run()
        if backward:
            torch.autograd.grad(out, (x, *factors[:2]), out.detach())
        return out

    times: dict[str, list[float]] = {name: [] for name in peers}
    peak_mib = {}
    for name, run in peers.items():
        once(run)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(run)
            peak_mib[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    for _ in range(repeats):
        for name, run in peers.items():
            times[name].append(timed_ms(device, lambda run=run: once(run)))
    flops = 2 * len(x) * width * target_width
    rows = {}
    for name in peers:
        step_ms = statistics.median(times[name])
        rows[name] = {"step_ms": round(step_ms, 4)}
        if rates and not backward:
            moved = x.element_size() * (x.numel() + width * target_width + len(x) * target_width)
            floor_ms = max(flops / rates["matmul_tflop_s"] / 1e9, moved / rates["copy_gb_s"] / 1e6)
            rows[name] |= {"floor_ms": round(floor_ms, 4), "share_of_floor": round(floor_ms / step_ms, 3)}
        if rates:
            rows[name]["peak_mib"] = peak_mib[name]
    for row in rows.values():
        row["times_chain"] = round(rows["chain, index_copy"]["step_ms"] / row["step_ms"], 3)
    with torch.no_grad():
        forming = [timed_ms(device, lambda: MergedFactors().form(*factors, dtype)) for _ in range(repeats)]
    rows["forming W_t, once a step"] = {"step_ms": round(statistics.median(forming), 4)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default 9 on the CPU, 30 on a GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    dtype, repeats = torch.bfloat16 if on_gpu else torch.float32, options.repeats or (30 if on_gpu else 9)
    if not on_gpu:
        torch.set_num_threads(1)
    rates = {"matmul_tflop_s": matmul_rate("cuda") / 1e12, "copy_gb_s": copy_bandwidth("cuda") / 1e9} if on_gpu else {}
    found = about("projector_converter", options.device, dtype=str(dtype), repeats=repeats, rates=rates, results=[])
    print(f"projector and converter on {found['device']}, {dtype}, median of {repeats} runs")
    if reason := projector_converter_unsupported_reason(dtype, torch.device(options.device)):
        print(f"not measured: merged, kernel: {reason}")
    for name, rate in rates.items():
        print(f"measured {name}: {rate:.0f}")
    for shape in CUDA_SHAPES if on_gpu else CPU_SHAPES:
        for backward in (False, True):
            rows = measure(shape, backward, options.device, dtype, repeats, rates)
            found["results"].append({"shape": shape, "backward": backward, "peers": rows})
            print(
                f"{shape[0]} images, {shape[1]} -> {shape[2]} -> {shape[3]}, "
                + ("forward and backward" if backward else "forward")
            )
            for name, row in rows.items():
                more = "".join(f"  {k} {v}" for k, v in row.items() if k != "step_ms")
                print(f"  {name:26} {row['step_ms']:9.3f} ms{more}")
        if options.out:
            options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
