"""Loss and input-gradient behind a frozen head: chunks with the fused kernel, chunks in torch, and torch's own three lines.

Correctness to float64 first, then time (interleaved, medians), TFLOP/s, share of the floor (two GEMMs at the measured rate of one) and, on a
GPU, peak memory above the operands. Peers, where importable: liger-kernel, cut-cross-entropy.

    python benches/bench_linear_cross_entropy.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from timing import about, device_title, interleaved_ms, timed_ms
from torch import Tensor

from vpgtrans.kernels.checks import largest_error
from vpgtrans.kernels.linear_cross_entropy import (
    launch_config,
    linear_cross_entropy,
    linear_cross_entropy_unsupported_reason,
    reference_linear_cross_entropy,
)

# name, rows, vocabulary, width, soft-cap; rows of a micro-batch's captions.
CUDA_SHAPES = (
    ("LLaMA-7B", 2048, 32000, 4096, None),
    ("OPT-6.7B", 2048, 50272, 4096, None),
    ("Qwen3-8B", 2048, 151936, 4096, None),
    ("LLaMA-7B, many rows", 8192, 32000, 4096, None),
    ("OPT-2.7B", 2048, 50272, 2560, None),
    ("OPT-125M", 4096, 50272, 768, None),
    ("Gemma-2-2B", 2048, 256000, 2304, 30.0),
    ("LLaMA-7B, few rows", 256, 32000, 4096, None),
)
CPU_SHAPES = (
    ("demo, source LLM", 1000, 160, 128, None),
    ("demo, target LLM", 1000, 160, 192, None),
    ("demo, a small micro-batch", 250, 160, 192, None),
    ("one thousandth of Gemma's", 256, 8000, 96, 30.0),
)

Operation = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def peers(device: torch.device, hidden: Tensor) -> tuple[dict[str, Operation], list[str]]:
    """What is compared, and what is not installed."""
    found: dict[str, Operation] = {
        "torch": lambda h, w, y, cap: reference_linear_cross_entropy(h, w, y, None, cap),
        "chunked torch": lambda h, w, y, cap: linear_cross_entropy(h, w, y, None, cap, impl="chunked"),
    }
    if device.type == "cuda" and linear_cross_entropy_unsupported_reason(hidden) is None:
        found["ours"] = lambda h, w, y, cap: linear_cross_entropy(h, w, y, None, cap, impl="triton")
    absent = []
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        found["liger-kernel"] = lambda h, w, y, cap: LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap)(
            w, h, y
        )
    else:
        absent.append("liger-kernel")
    if device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = lambda h, w, y, cap: cut(h, w, y, softcap=cap, reduction="sum")
    else:
        absent.append("cut-cross-entropy")
    return found, absent


def once(run: Operation, hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    loss = run(hidden, weight, labels, cap)
    loss.backward()
    gradient, hidden.grad = hidden.grad, None
    return loss.detach(), gradient


def matmul_rate(device: torch.device, hidden: Tensor, weight: Tensor) -> float:
    """FLOP/s of the first GEMM on one chunk's rows: the floor's measure."""
    rows = launch_config(len(hidden), *weight.shape, hidden.element_size()).chunk_rows
    part = hidden.detach()[:rows]
    times = [timed_ms(device, lambda: part @ weight.t()) for _ in range(8)]
    return 2e3 * rows * weight.numel() / statistics.median(times[3:])


def measure(device: torch.device, shape: tuple, repeats: int) -> dict:
    name, rows, vocabulary, width, cap = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator, device=device) / width**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    runs, absent = peers(device, hidden)
    few = slice(0, 64)
    exact = once(
        runs["torch"], hidden.detach()[few].double().requires_grad_(), weight.double(), labels[few], cap
    )  # float64 of every row would not fit
    plain = once(runs["torch"], hidden.detach()[few].requires_grad_(), weight, labels[few], cap)
    allowed = 2 * largest_error(exact[1], plain[1]) + torch.finfo(dtype).eps * float(exact[1].abs().amax())
    results: dict[str, dict] = {}
    for peer, run in list(runs.items()):
        found = once(run, hidden.detach()[few].requires_grad_(), weight, labels[few], cap)
        error = largest_error(exact[1], found[1])
        relative = abs(float(found[0]) / float(exact[0]) - 1)
        if peer in ("ours", "chunked torch"):
            assert error <= allowed and relative < 1e-3, (
                f"{name}, {peer}: {error:.2e} over {allowed:.2e}; {relative:.2e}"
            )
        results[peer] = {"gradient_error": error, "loss_relative_error": relative}
    if device.type == "cuda":
        for peer, run in runs.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(run, hidden, weight, labels, cap)
            results[peer]["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    calls = {peer: lambda run=run: once(run, hidden, weight, labels, cap) for peer, run in runs.items()}
    times = interleaved_ms(device, calls, repeats)
    flop = 4.0 * rows * vocabulary * width
    floor_ms = 1e3 * flop / matmul_rate(device, hidden, weight)
    for peer, ms in times.items():
        results[peer] |= {"ms": round(ms, 4), "tflop_per_s": round(flop / ms / 1e9, 2), "share_of_floor": round(floor_ms / ms, 3)}  # fmt: skip
        results[peer]["times_torch"] = round(ms / times["torch"], 3)
        if "peak_mib" in results[peer]:
            results[peer]["share_of_torch_memory"] = round(results[peer]["peak_mib"] / results["torch"]["peak_mib"], 3)
    sizes = {"rows": rows, "vocabulary": vocabulary, "width": width, "softcap": cap, "floor_ms": round(floor_ms, 4)}
    return sizes | {"not_installed": absent, "peers": results}


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
    print(f"linear_cross_entropy, forward and backward, {described}, median of {options.repeats} interleaved runs")
    found: dict = {}
    for shape in CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES:
        result = found[shape[0]] = measure(device, shape, options.repeats)
        print(
            f"{shape[0]}: {result['rows']} x {result['vocabulary']} x {result['width']}, soft-cap {result['softcap']}"
        )
        for peer, row in result["peers"].items():
            memory = f", {row['peak_mib']:9.1f} MiB" if "peak_mib" in row else ""
            print(
                f"  {peer:18} {row['ms']:9.3f} {unit}, {row['times_torch']:6.3f} x torch's, {row['tflop_per_s']:7.2f} TFLOP/s, "
                f"{100 * row['share_of_floor']:5.1f} % of the floor{memory}"
            )
        if options.out:
            head = about("linear_cross_entropy", device, repeats=options.repeats)
            options.out.write_text(json.dumps(head | {"results": found}, indent=2) + "\n")
    for name in result["not_installed"]:
        print(f"not installed, so not measured: {name}")


if __name__ == "__main__":
    main()
