"""What the benches of kernels share: one timed run, the floors of the device, peak memory, and what a result file says of its origin."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch


def timed_ms(device: torch.device | str, run: Callable[[], object]) -> float:
    """Milliseconds of one run: of the GPU's clock, or of CPU time, which is steadier than the clock on a shared machine."""
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = time.process_time()
    run()
    return 1e3 * (time.process_time() - began)


def median_ms(device: torch.device | str, run: Callable[[], object], repeats: int = 5) -> float:
    """Median of single runs, after three that are not counted."""
    return statistics.median([timed_ms(device, run) for _ in range(repeats + 3)][3:])


def interleaved_ms(
    device: torch.device | str, runs: Mapping[Any, Callable[[], object]], repeats: int
) -> dict[Any, float]:
    """Median of each run's times, one of each after the other so that a change in the machine's load meets all; two rounds do not count."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            spent = timed_ms(device, run)
            if repeat >= 2:
                times[name].append(spent)
    return {name: statistics.median(found) for name, found in times.items()}


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes read and written a second by a large copy."""
    on_gpu = torch.device(device).type == "cuda"
    source = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.numel() / median_ms(device, lambda: target.copy_(source))


def matmul_rate(device: torch.device | str, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e3 * size**3 / median_ms(device, lambda: a @ b)


def peak_mib(run: Callable[[], object]) -> float:
    """GPU memory that a run takes beyond what is allocated before it, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def device_title(device: torch.device | str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine()


def about(bench: str, device: torch.device | str, **more: Any) -> dict[str, Any]:
    """The head of a result file: bench, date, device, versions."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    origin = {"bench": bench, "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device_title(device)}
    return {**origin, "torch": torch.__version__, "triton": triton, **more}
