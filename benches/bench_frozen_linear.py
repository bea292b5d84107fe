"""Frozen linears in FP8 against bf16 (cuBLAS; float32 on the CPU): forward and input-gradient, quantisation of both directions' input included.

Correctness to the product of what the FP8 values stand for first; then time (interleaved, medians), TFLOP/s and, for the row kernels, GB/s and
the share of the measured copy bandwidth. "norm + q, k, v": a norm and the three linears behind it, where the norm quantises for all three.

    python benches/bench_frozen_linear.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import about, device_title, interleaved_ms
from torch import Tensor

from vpgtrans.kernels.frozen_linear import (
    Rows,
    fp8_unsupported_reason,
    frozen_linear,
    quantise_rows,
    quantise_weight,
    rows_unsupported_reason,
)
from vpgtrans.kernels.frozen_norm import Norm, norm_and_quantise, reference_norm

# name, rows, inputs, outputs
CUDA_SHAPES = (
    ("LLaMA-7B q", 8192, 4096, 4096),
    ("LLaMA-7B gate", 8192, 4096, 11008),
    ("LLaMA-7B down", 8192, 11008, 4096),
    ("ViT-g qkv, 64 images", 16448, 1408, 4224),
    ("ViT-g fc1, 64 images", 16448, 1408, 6144),
    ("ViT-g fc2, 64 images", 16448, 6144, 1408),
    ("OPT-2.7B fc1", 8192, 2560, 10240),
    ("LLaMA-7B q, few rows", 1024, 4096, 4096),
)
CPU_SHAPES = (("a small block", 256, 256, 512), ("a small block back", 256, 512, 256))
RMS = Norm("rms_rounded", 1e-6)


def check(x: Tensor, weight: Tensor) -> float:
    """Largest relative error of FP8 products to float64 products of the same FP8 values, on a few rows, both directions."""
    quantised, few = quantise_weight(weight), x[:32].clone().requires_grad_()
    wide = lambda r: r.values.double() * r.scales.double()  # noqa: E731
    y = frozen_linear(few, quantised)
    grad_y = torch.randn_like(y).bfloat16().to(y.dtype)  # it reaches the product in bf16
    y.backward(grad_y)
    worst = 0.0
    for found, rows, copy in (
        (y, few.detach(), quantised.by_output),
        (few.grad, grad_y, quantised.by_input),
    ):
        exact = wide(quantise_rows(rows)) @ wide(copy).t()
        worst = max(worst, float((found.detach().double() - exact).norm() / exact.norm()))
    assert worst < 2**-8, f"relative error {worst:.2e}, expected bf16's rounding"
    return worst


def linears(device: torch.device, shape: tuple, repeats: int) -> dict:
    _, rows, inputs, outputs = shape
    generator = torch.Generator(device).manual_seed(0)
    plain, dtype = (
        ("bf16", torch.bfloat16) if device.type == "cuda" else ("float32", torch.float32)
    )  # bf16 crawls on most CPUs
    draw = lambda *s: torch.randn(*s, generator=generator, device=device).to(dtype)  # noqa: E731
    x, weight, grad_y = draw(rows, inputs).requires_grad_(), draw(outputs, inputs) / inputs**0.5, draw(rows, outputs)
    norm_weight, quantised = draw(inputs), quantise_weight(weight)

    def both(linear: Callable[[Tensor], Tensor]) -> None:
        linear(x).backward(grad_y)
        x.grad = None

    def behind_norm_plain() -> None:
        y = reference_norm(x, norm_weight, None, RMS)
        for _ in range(3):
            F.linear(y, weight).backward(grad_y, retain_graph=True)
        x.grad = None

    def behind_norm_fp8() -> None:
        y, found = norm_and_quantise(x, norm_weight, None, RMS)
        for _ in range(3):
            frozen_linear(y, quantised, rows=found).backward(grad_y, retain_graph=True)
        x.grad = None

    error = check(x.detach(), weight)
    ms = interleaved_ms(
        device,
        {
            plain: lambda: both(lambda t: F.linear(t, weight)),
            "FP8": lambda: both(lambda t: frozen_linear(t, quantised)),
            "FP8, fast accumulation": lambda: both(lambda t: frozen_linear(t, quantised, fast_accumulation=True)),
            f"norm + q, k, v in {plain}": behind_norm_plain,
            "norm + q, k, v in FP8": behind_norm_fp8,
        },
        repeats,
    )
    flop = 4.0 * rows * inputs * outputs
    peers = {}
    for name, value in ms.items():
        work, base = (3 * flop, ms[f"norm + q, k, v in {plain}"]) if name.startswith("norm") else (flop, ms[plain])
        speed = round(base / value, 3)
        peers[name] = {"ms": round(value, 4), "tflop_per_s": round(work / value / 1e9, 2), "times_as_fast": speed}
    return {"rows": rows, "inputs": inputs, "outputs": outputs, "relative_error": error, "peers": peers} | row_kernels(
        device, x.detach(), norm_weight, repeats
    )


def row_kernels(device: torch.device, x: Tensor, weight: Tensor, repeats: int) -> dict:
    """Quantisation alone and with a norm: bytes over time, against a copy of x in the same run."""
    copy = torch.empty_like(x)

    def torchs() -> Rows:
        return quantise_rows(x, "reference")

    runs: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(x), "quantise, torch": torchs}
    moved = {"copy": 4, "quantise, torch": 3, "quantise": 3, "norm and quantise": 5}
    if rows_unsupported_reason(device, x.shape[1]) is None and device.type == "cuda":
        runs["quantise"] = lambda: quantise_rows(x, "triton")
        runs["norm and quantise"] = lambda: norm_and_quantise(x, weight, None, RMS, "triton")
    ms = interleaved_ms(device, runs, repeats)
    rate = {name: moved[name] * x.numel() / value / 1e6 for name, value in ms.items()}
    kernels = {
        name: {"ms": round(ms[name], 4), "gb_per_s": round(value, 1), "share_of_copy": round(value / rate["copy"], 3)}
        for name, value in rate.items()
    }
    return {"row_kernels": kernels}


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
    if reason := fp8_unsupported_reason(device):
        print(f"frozen_linear: not measured: {reason}")
        return
    unit = "ms" if device.type == "cuda" else "CPU ms"
    print(f"frozen_linear, forward and input-gradient, {described}, median of {options.repeats} interleaved runs")
    found: dict = {}
    for shape in CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES:
        result = found[shape[0]] = linears(device, shape, options.repeats)
        print(f"{shape[0]}: {shape[1]} x {shape[2]} -> {shape[3]}, relative error {result['relative_error']:.1e}")
        for name, row in result["peers"].items():
            print(
                f"  {name:24} {row['ms']:9.3f} {unit}, {row['tflop_per_s']:8.2f} TFLOP/s, {row['times_as_fast']:6.3f} x as fast as plain"
            )
        for name, row in result["row_kernels"].items():
            print(
                f"  {name:24} {row['ms']:9.3f} {unit}, {row['gb_per_s']:8.1f} GB/s, {row['share_of_copy']:6.3f} of a copy's rate"
            )
        if options.out:
            head = about("frozen_linear", device, repeats=options.repeats)
            options.out.write_text(json.dumps(head | {"results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
