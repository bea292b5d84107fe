"""What a device can do: memory, rates of matrix products and of memory, cost of an operation.

Rates are, in this order: `--efficiency` x peak where it is given; measured ones, from a JSON file under `benches/results/`; else `EFFICIENCY`
x the peak of the vendor's datasheet.  FP8 products are those with row-wise scales, on devices that kernels/frozen_linear.py takes.  The CPU is
measured when a plan asks for it, in about a second.

A result file is read where its "bench" is "device".  Keys: "device" (a name of `DEVICES`), "matmul_tflops_bf16" and "matmul_tflops_fp32"
(10^12 FLOP/s of a large product), "matmul_tflops_fp8_rowwise" (optional; else as much above bf16 as in the datasheet), "copy_gb_s" (10^9
bytes/s, read and written), "operation_us" (time to issue one operation from Python, optional), "date" (YYYY-MM-DD, optional).  Of several
files of a device the latest date counts.
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
import torch.nn.functional as F
from torch import Tensor, nn

from .options import GPUS
from .trace import Cost, Operation, count_operations

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
    fp8_tflops: float | None = None  # only where kernels/frozen_linear.py runs


DEVICES = {
    "h200": Datasheet("NVIDIA H200 SXM", 141, 989, 67, 4800, 450, "NVIDIA H200 Tensor Core GPU datasheet", 1979),
    "h100": Datasheet("NVIDIA H100 SXM", 80, 989, 67, 3350, 450, "NVIDIA H100 Tensor Core GPU datasheet", 1979),
    "a100-40g": Datasheet("NVIDIA A100 40GB SXM", 40, 312, 19.5, 1555, 300, "NVIDIA A100 Tensor Core GPU datasheet"),
    "a100-80g": Datasheet("NVIDIA A100 80GB SXM", 80, 312, 19.5, 2039, 300, "NVIDIA A100 Tensor Core GPU datasheet"),
    "4090": Datasheet(
        "NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 1008, 32, "NVIDIA Ada GPU Architecture whitepaper, appendix A"
    ),
}


Points = tuple[tuple[float, float], ...]  # (size, rate at that size)


@dataclass(frozen=True)
class Device:
    """Achieved rates by size: FLOP/s of products and of attention, bytes/s of functions (GELU, softmax, norms) and of everything else.

    Between two sizes the logarithm of the size decides.
    """

    name: str
    title: str
    memory_bytes: float
    matmul_rates: Points
    attention_rates: Points
    copy_rates: Points
    function_rates: Points
    operation_s: float
    link_bytes_s: float
    peak_flops_s: float | None
    origin: str
    overlaps: bool  # operations are issued ahead of the device, so the slower of the two counts
    fp8_rates: Points | None = None  # FLOP/s of FP8 products; None where there are none

    def operation_seconds(self, operation: Operation) -> float:
        """On the device: the longer of its FLOPs and its memory traffic."""
        flops, moved = operation.flops, operation.moved
        products = self.attention_rates if operation.kind == "attention" else self.matmul_rates
        if operation.kind == "fp8":
            assert self.fp8_rates is not None, f"{self.name} has no FP8 products"
            products = self.fp8_rates
        traffic = self.function_rates if operation.kind == "function" else self.copy_rates
        return max(flops / _rate(products, flops) if flops else 0.0, moved / _rate(traffic, moved) if moved else 0.0)

    def seconds(self, cost: Cost) -> float:
        """Of all operations of a part, without issuing them."""
        return sum(n * self.operation_seconds(operation) for operation, n in cost.operations.items())


def _rate(points: Points, size: float) -> float:
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if size < high:
            share = min(1.0, max(0.0, math.log(max(size, 1.0) / low) / math.log(high / low)))
            return slow * (fast / slow) ** share
    return points[-1][1]


def find_device(
    name: str, dtype: torch.dtype, efficiency: float | None = None, results: Path = RESULTS, threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Device:  # fmt: skip
    """The device of a plan.

    Args:
        name: of `GPUS`.
        dtype: of the products, float32 or bfloat16.
        efficiency: share of the peaks to reckon with, in place of anything measured; none for the CPU.
        results: folder with result files.
        threads: of a process on the CPU.
        clock: seconds by which the CPU is measured.

    Raises:
        ValueError: an unknown name, an efficiency outside 0 to 1, or a result file that does not fit its schema.
    """
    if efficiency is not None and not 0.0 < efficiency <= 1.0:
        raise ValueError(f"--efficiency: expected a share of the peak above 0 and up to 1, got {efficiency:g}")
    if name == "cpu":
        if efficiency is not None:
            raise ValueError("--efficiency: expected none for --gpu cpu, which is measured; leave it out")
        return measure_cpu(dtype, threads, clock)
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
    compute, traffic = ((1.0, products),), ((1.0, copies),)
    fp8 = None
    if sheet.fp8_tflops is not None:
        faster = sheet.fp8_tflops / (sheet.bf16_tflops if is_bf16 else sheet.fp32_tflops)
        rate = (
            1e12 * found["matmul_tflops_fp8_rowwise"]
            if found and "matmul_tflops_fp8_rowwise" in found
            else faster * products
        )
        fp8 = ((1.0, rate),)
    return Device(
        name, sheet.title, 1e9 * sheet.memory_gb, compute, compute, traffic, traffic, 1e-6 * operation_us, 1e9 * sheet.link_gb_s, peak,
        origin, True, fp8,
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


def measure_cpu(
    dtype: torch.dtype, threads: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> Device:
    """This machine under its present load, with the threads of one process: rates at a few sizes, and what an operation costs in Python."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        products = _points(
            clock, dtype, (32, 96, 256, 768), lambda a: lambda: a @ a, lambda n: (n, n), lambda n: 2.0 * n**3
        )
        copies = _points(
            clock, dtype, (2**11, 2**15, 2**19, 2**22), lambda x: lambda: x * 1.5, lambda n: (n,), _traffic(dtype)
        )
        functions = _points(
            clock, dtype, (2**11, 2**15, 2**19), lambda x: lambda: F.gelu(x), lambda n: (n,), _traffic(dtype)
        )
        attention = _points(
            clock, dtype, (32, 128), _attention, lambda n: (4, 4, n, 32), lambda n: 2.0 * 7 * 4 * 4 * n * n * 32
        )  # forward two products, backward five
        operation_s = _operation_seconds(clock)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rates = f"products {products[-1][1] / 1e9:.0f} GFLOP/s, copies {copies[-1][1] / 1e9:.1f} GB/s, {operation_s * 1e6:.0f} us an operation"
    origin = f"measured now, {used} thread(s): {rates}"
    return Device(
        "cpu", "this CPU", memory, products, attention, copies, functions, operation_s, 1e9, None, origin, False
    )


def _points(
    clock: Callable[[], float], dtype: torch.dtype, sizes: tuple[int, ...], make: Callable[[Tensor], Callable[[], Any]],
    shape: Callable[[int], tuple[int, ...]], amount: Callable[[int], float],
) -> Points:  # fmt: skip
    """(amount, amount a second) at each size; amount: FLOPs or bytes of one run."""
    found = []
    for size in sizes:
        run = make(torch.randn(shape(size), dtype=dtype))
        found.append((amount(size), amount(size) / _seconds(run, clock)))
    return tuple(found)


def _traffic(dtype: torch.dtype) -> Callable[[int], float]:
    return lambda values: 2.0 * values * dtype.itemsize


def _attention(x: Tensor) -> Callable[[], Any]:
    """Forward and backward behind a mask, as in packed rows."""
    query = x.clone().requires_grad_()
    mask = torch.ones(x.shape[0], 1, x.shape[2], x.shape[2], dtype=torch.bool).tril()

    def run() -> None:
        F.scaled_dot_product_attention(query, query, query, mask).backward(x)

    return run


def _seconds(run: Callable[[], Any], clock: Callable[[], float], budget_s: float = 0.06) -> float:
    """The mean over the budget: what others take of the machine, they take of a run too."""
    run()
    runs, start = 0, clock()
    while runs == 0 or clock() - start < budget_s:
        run()
        runs += 1
    return (clock() - start) / runs


def _operation_seconds(clock: Callable[[], float]) -> float:
    """Of an operation so small that only issuing it counts, forward and backward through modules."""
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())))
    x = torch.randn(4, 8)

    def step() -> None:
        model(x).sum().backward()

    return _seconds(step, clock, 0.15) / count_operations(step)
