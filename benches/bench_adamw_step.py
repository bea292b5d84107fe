"""One update of the trainable parameters: gradient norm, finite check, clipping and AdamW; ours against torch's fused and apex's.

Correctness against torch's fused AdamW first. Then time (interleaved, medians; with the update of the host's tables), bytes over time and the
share of the floor, 32 bytes a parameter at the rate of a copy measured in the same run. On a GPU also the time the host is held.

    python benches/bench_adamw_step.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import about, device_title
from torch import nn

from vpgtrans.engine.optim import apex_unsupported_reason, set_learning_rate, take_step
from vpgtrans.kernels.adamw_step import adamw_step, adamw_step_unsupported_reason

BYTES = 32  # a parameter: one reading of the gradient for the norm, then 16 read and 12 written
CLIP_NORM = 1.0


def qformer_shapes(
    width: int, layers: int, image_width: int, llm_width: int, queries: int = 32
) -> list[tuple[int, ...]]:
    """Trainable tensors of stage 2: a Q-Former with cross-attention in every other layer, `ln_vision` and the projector."""
    shapes: list[tuple[int, ...]] = [
        (1, queries, width),
        (width,),
        (width,),
        (image_width,),
        (image_width,),
        (llm_width, width),
        (llm_width,),
    ]
    norm, square = [(width,), (width,)], [(width, width), (width,)]
    for layer in range(layers):
        shapes += 4 * square + norm + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + norm
        if layer % 2 == 0:
            shapes += 2 * square + 2 * [(width, image_width), (width,)] + norm
    return shapes


def made(
    shapes: list[tuple[int, ...]], device: torch.device, kind: Callable[..., torch.optim.Optimizer] | None = None
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator(device).manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device) * 1e-3
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    if kind is not None:
        return parameters, kind(groups, lr=1e-4)
    return parameters, torch.optim.AdamW(groups, lr=1e-4, fused=True)


def timed_ms(device: torch.device, run: Callable[[], object]) -> tuple[float, float]:
    """Device time and, on a GPU, the host's time until the call returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        run()
        end.record()
        host = 1e3 * (time.perf_counter() - begin)
        end.synchronize()
        return start.elapsed_time(end), host
    begin = time.process_time()
    run()
    spent = 1e3 * (time.process_time() - begin)
    return spent, spent


def runs_of(shapes: list[tuple[int, ...]], device: torch.device) -> tuple[dict[str, Callable[[], object]], list[str]]:
    parameters, torchs = made(shapes, device)
    runs: dict[str, Callable[[], object]] = {"torch fused": lambda: adamw_step(torchs, CLIP_NORM, impl="reference")}
    foreach_parameters, _ = made(shapes, device)
    foreach = torch.optim.AdamW(foreach_parameters, lr=1e-4, weight_decay=0.05, foreach=True)

    def torch_foreach() -> None:
        torch.nn.utils.clip_grad_norm_(foreach_parameters, CLIP_NORM)
        foreach.step()

    runs["torch foreach, no finite check"] = torch_foreach
    if device.type == "cuda" and adamw_step_unsupported_reason(torchs) is None:
        ours_parameters, ours = made(shapes, device)
        result = adamw_step(ours, CLIP_NORM, impl="triton")
        wanted = adamw_step(torchs, CLIP_NORM, impl="reference")
        assert torch.allclose(result.norm, wanted.norm, rtol=1e-5) and result.skipped == 0
        for mine, theirs in zip(ours_parameters, parameters, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-8), f"{tuple(mine.shape)} differs from torch's"
        runs["ours"] = lambda: adamw_step(ours, CLIP_NORM, impl="triton")
    absent = []
    if reason := apex_unsupported_reason(device):
        absent.append(f"NVIDIA's apex ({reason})")
    else:
        from apex.optimizers import FusedAdam

        bare_parameters, bare = made(shapes, device, FusedAdam)

        def without_check() -> None:
            torch.nn.utils.clip_grad_norm_(bare_parameters, CLIP_NORM)
            bare.step()

        runs["apex FusedAdam, no finite check"] = without_check
        _, apexs = made(shapes, device, lambda groups, lr: apex_adamw(groups))
        runs["apex, as the engine uses it"] = lambda: take_step(apexs, CLIP_NORM, None)
    return runs, absent


def apex_adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """The engine's optimizer around FusedAdam, at the rate of the others."""
    from vpgtrans.engine.apex_adamw import ApexAdamW

    optimizer = ApexAdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    set_learning_rate(optimizer, 1e-4)
    return optimizer


def measure(device: torch.device, shapes: list[tuple[int, ...]], repeats: int) -> dict:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    runs, absent = runs_of(shapes, device)
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    runs["copy"] = lambda: target.copy_(source)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            spent = timed_ms(device, run)
            if repeat >= 3:
                times[name].append(spent)
    ms = {name: statistics.median(t[0] for t in values) for name, values in times.items()}
    host = {name: statistics.median(t[1] for t in values) for name, values in times.items()}
    copy_gb_per_s = 8 * count / ms["copy"] / 1e6
    floor_ms = BYTES * count / copy_gb_per_s / 1e6
    peers = {
        name: {
            "ms": round(ms[name], 4), "host_ms": round(host[name], 4), "gb_per_s": round(BYTES * count / ms[name] / 1e6, 1),
            "share_of_floor": round(floor_ms / ms[name], 3), "times_torch": round(ms[name] / ms["torch fused"], 3),
        }
        for name in runs
        if name != "copy"
    }  # fmt: skip
    about = {
        "parameters": count,
        "tensors": len(shapes),
        "copy_gb_per_s": round(copy_gb_per_s, 1),
        "floor_ms": round(floor_ms, 4),
    }
    return about | {"not_installed": absent, "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one JSON object to a file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
        sets = {"the demo's Q-Former": qformer_shapes(96, 4, 96, 192, 16)}
    else:
        sets = {
            "VL-LLaMA-7B, stage 2": qformer_shapes(768, 12, 1408, 4096),
            "VL-LLaMA-7B, stage 1": [(4096, 768), (4096,)],
            "the demo's Q-Former": qformer_shapes(96, 4, 96, 192, 16),
        }
    described = device_title(device)
    unit = "ms" if device.type == "cuda" else "CPU ms"
    print(f"adamw_step with clipping, {described}, median of {options.repeats} interleaved runs")
    found: dict = {}
    for name, shapes in sets.items():
        result = found[name] = measure(device, shapes, options.repeats)
        sizes = f"{result['parameters']:,} parameters in {result['tensors']} tensors"
        print(f"{name}: {sizes}; floor {result['floor_ms']} ms at a copy's {result['copy_gb_per_s']} GB/s")
        for peer, row in result["peers"].items():
            print(
                f"  {peer:32} {row['ms']:9.3f} {unit} (host {row['host_ms']:.3f}), {row['gb_per_s']:8.1f} GB/s, "
                f"{100 * row['share_of_floor']:5.1f} % of the floor, {row['times_torch']:6.3f} x torch's"
            )
        if options.out:
            head = about("adamw_step", device, repeats=options.repeats)
            options.out.write_text(json.dumps(head | {"results": found}, indent=2) + "\n")
    for name in result["not_installed"]:
        print(f"not installed, so not measured: {name}")


if __name__ == "__main__":
    main()
