"""What a device can do: memory, rates of matrix products and of memory, cost of an operation.

Rates are, in this order: `--efficiency` x peak where it is given; measured ones, from a JSON file under `benches/results/`; else `EFFICIENCY`
x the peak of the vendor's datasheet.  The CPU is measured when a plan asks for it, in about a second.

A result file is read where its "bench" is "device".  Keys: "device" (a name of `DEVICES`), "matmul_tflops_bf16" and "matmul_tflops_fp32"
(10^12 FLOP/s of a large product), "copy_gb_s" (10^9 bytes/s, read and written), "operation_us" (time to issue one operation from Python,
optional), "date" (YYYY-MM-DD, optional).  Of several files of a device the latest date counts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .options import GPUS

RESULTS = Path(__file__).resolve().parents[2] / "benches" / "results"
EFFICIENCY = 0.7  # of the peaks, in a large product and in a large copy
OPERATION_US = 10.0  # to issue one operation from Python, forward and backward averaged
RESERVED_BYTES = 2**30  # CUDA context, libraries' workspaces, fragmentation


@dataclass(frozen=True)
class Datasheet:
    """Dense peaks without sparsity; memory_gb in 10^9 bytes, which errs on the safe side; link_gb_s: from one GPU to the others."""

    title: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    source: str


DEVICES = {
    "h200": Datasheet("NVIDIA H200 SXM", 141, 989, 67, 4800, 450, "NVIDIA H200 Tensor Core GPU datasheet"),
    "h100": Datasheet("NVIDIA H100 SXM", 80, 989, 67, 3350, 450, "NVIDIA H100 Tensor Core GPU datasheet"),
    "a100-40g": Datasheet("NVIDIA A100 40GB SXM", 40, 312, 19.5, 1555, 300, "NVIDIA A100 Tensor Core GPU datasheet"),
    "a100-80g": Datasheet("NVIDIA A100 80GB SXM", 80, 312, 19.5, 2039, 300, "NVIDIA A100 Tensor Core GPU datasheet"),
    "4090": Datasheet(
        "NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 1008, 32, "NVIDIA Ada GPU Architecture whitepaper, appendix A"
    ),
}


@dataclass(frozen=True)
class Device:
    """Achieved rates as (size, rate) points, FLOPs -> FLOP/s and bytes -> bytes/s, between which the logarithm of the size decides."""

    name: str
    title: str
    memory_bytes: float
    matmul_rates: tuple[tuple[float, float], ...]
    copy_rates: tuple[tuple[float, float], ...]
    operation_s: float
    link_bytes_s: float
    peak_flops_s: float | None
    origin: str
    overlaps: bool  # operations are issued ahead of the device, so the slower of the two counts

    def operation_seconds(self, flops: float, moved: float) -> float:
        """Of one operation on the device: the longer of its products and its memory traffic."""
        products = flops / _rate(self.matmul_rates, flops) if flops else 0.0
        return max(products, moved / _rate(self.copy_rates, moved) if moved else 0.0)


def _rate(points: tuple[tuple[float, float], ...], size: float) -> float:
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if size < high:
            share = min(1.0, max(0.0, math.log(max(size, 1.0) / low) / math.log(high / low)))
            return slow * (fast / slow) ** share
    return points[-1][1]


def find_device(
    name: str, dtype: torch.dtype, efficiency: float | None = None, results: Path = RESULTS, threads: int | None = None
) -> Device:
    """The device of a plan.

    Args:
        name: of `GPUS`.
        dtype: of the products, float32 or bfloat16.
        efficiency: share of the peaks to reckon with, in place of anything measured; none for the CPU.
        results: folder with result files.
        threads: of a process on the CPU.

    Raises:
        ValueError: an unknown name, an efficiency outside 0 to 1, or a result file that does not fit its schema.
    """
    if efficiency is not None and not 0.0 < efficiency <= 1.0:
        raise ValueError(f"--efficiency: expected a share of the peak above 0 and up to 1, got {efficiency:g}")
    if name == "cpu":
        if efficiency is not None:
            raise ValueError("--efficiency: expected none for --gpu cpu, which is measured; leave it out")
        return measure_cpu(dtype, threads)
    if name not in DEVICES:
        raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    sheet = DEVICES[name]
    is_bf16 = dtype == torch.bfloat16
    peak = 1e12 * (sheet.bf16_tflops if is_bf16 else sheet.fp32_tflops)
    found = measured(name, results) if efficiency is None else None
    operation_us = OPERATION_US
    if found is not None:
        key = "matmul_tflops_bf16" if is_bf16 else "matmul_tflops_fp32"
        products, copies = 1e12 * found[key], 1e9 * found["copy_gb_s"]
        operation_us = found.get("operation_us", operation_us)
        origin = f"measured: {found['file']}"
    else:
        share = efficiency or EFFICIENCY
        products, copies = share * peak, share * 1e9 * sheet.memory_gb_s
        origin = f"assumed: {share:.0%} of the peaks in the {sheet.source}"
    return Device(
        name, sheet.title, 1e9 * sheet.memory_gb, ((1.0, products),), ((1.0, copies),), 1e-6 * operation_us, 1e9 * sheet.link_gb_s, peak,
        origin, True,
    )  # fmt: skip


def measured(name: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """The latest result file of a device as a dictionary, its name under "file"; None where there is none.

    Raises ValueError where one names the device and a rate is missing or not above 0.
    """
    latest: dict[str, Any] | None = None
    for path in sorted(results.glob("*.json")) if results.is_dir() else []:
        try:
            values = json.loads(path.read_text())
        except ValueError:
            continue  # of another bench, and its own affair
        if not isinstance(values, dict) or (values.get("bench"), values.get("device")) != ("device", name):
            continue
        for key in ("matmul_tflops_bf16", "matmul_tflops_fp32", "copy_gb_s"):
            if not isinstance(values.get(key), (int, float)) or not values[key] > 0:
                raise ValueError(f"{path}: {key}: expected a number above 0, got {values.get(key)!r}; measure again")
        if latest is None or str(values.get("date", "")) >= str(latest.get("date", "")):
            latest = {**values, "file": path.name}
    return latest


def measure_cpu(dtype: torch.dtype, threads: int | None = None) -> Device:
    """This machine, with the threads of one process: products and copies of a few sizes, and what one operation costs in Python."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        products = []
        for side in (32, 96, 256, 768):
            a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
            products.append((2.0 * side**3, 2.0 * side**3 / _seconds(lambda a=a, b=b: a @ b)))
        copies = []
        for size in (2**14, 2**18, 2**22, 2**26):
            x = torch.randn(size // 8)
            copies.append((float(size), size / _seconds(lambda x=x: x * 1.5)))
        operation_s = _operation_seconds()
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rates = f"products {products[-1][1] / 1e9:.0f} GFLOP/s, copies {copies[-1][1] / 1e9:.1f} GB/s, {operation_s * 1e6:.0f} us an operation"
    origin = f"measured now, {used} thread(s): {rates}"
    return Device("cpu", "this CPU", memory, tuple(products), tuple(copies), operation_s, 1e9, None, origin, False)


def _seconds(run: Callable[[], Any], budget_s: float = 0.08) -> float:
    """Best of several runs within the budget: others use the machine too."""
    run()
    best, end = math.inf, time.perf_counter() + budget_s
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _operation_seconds() -> float:
    """Of an operation so small that only issuing it counts, forward and backward through modules."""
    from .trace import count_operations

    model = nn.Sequential(*(m for _ in range(4) for m in (nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())))
    x = torch.randn(4, 8)

    def step() -> None:
        model(x).sum().backward()

    return _seconds(step, 0.15) / count_operations(step)
