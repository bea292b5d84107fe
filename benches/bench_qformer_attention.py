"""The Q-Former's cross-attention: latents (kernels; plain torch) against formed K and V with torch's fused attention, forward and backward.

Each peer is compared with float64 before anything is timed. Runs are interleaved, so that a change in the machine's load meets all of them;
medians are reported. On a GPU the floor of a form is its modelled cost (`form_cost`) at the matmul rate and the copy bandwidth measured first,
plus the products with W_q and W_o; on the CPU, where no rate is assumed, only times, GFLOP/s and ratios are shown.

    python benches/bench_qformer_attention.py [--device cpu|cuda] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from timing import about, copy_bandwidth, matmul_rate, timed_ms

from vpgtrans.kernels.checks import largest_error
from vpgtrans.kernels.qformer_attention import (
    AttentionShape,
    CrossWeights,
    form_cost,
    form_keys_values,
    qformer_attention,
    qformer_attention_unsupported_reason,
    reference_qformer_attention,
)

# The most telling first: the recipes' micro-batch in stage 2, a large one, fewer queries.
CUDA_SHAPES = [AttentionShape(b, q, 257, 1408, 768, 12) for b, q in ((36, 32), (256, 32), (256, 16))]
CPU_SHAPES = [AttentionShape(b, q, 257, 1408, 768, 12) for b, q in ((2, 32), (2, 64))]
# forward only; gradients of queries and weights; of the image tokens too
MODES = {"forward": (False, False), "weights": (True, False), "weights and tokens": (True, True)}


def inputs(
    shape: AttentionShape, device: str, dtype: torch.dtype, mode: str
) -> tuple[torch.Tensor, torch.Tensor, CrossWeights]:
    gradients, image_gradient = MODES[mode]
    torch.manual_seed(0)

    def leaf(*sizes: int, needs: bool = gradients) -> torch.Tensor:
        return (torch.randn(*sizes, device=device) * sizes[-1] ** -0.5).to(dtype).requires_grad_(needs)

    d, w = shape.hidden, shape.width
    weights = CrossWeights(leaf(d, d), leaf(d), leaf(d, w), leaf(d), leaf(d, w), leaf(d), leaf(d, d), leaf(d))
    queries = torch.randn(shape.batch, shape.queries, d, device=device).to(dtype).requires_grad_(gradients)
    image = torch.randn(shape.batch, shape.keys, w, device=device).to(dtype).requires_grad_(image_gradient)
    return queries, image, weights


def peers(
    shape: AttentionShape, device: str, dtype: torch.dtype
) -> tuple[dict[str, tuple[str, Callable]], dict[str, str]]:
    """name -> (form, run); and what cannot run, with the reason."""

    def formed_for_all_layers(queries, image, weights, dropout_p):
        pair = form_keys_values(image, [weights])[0]
        return qformer_attention(queries, image, weights, shape.heads, keys_values=pair, dropout_p=dropout_p)

    def latents(impl):
        return lambda queries, image, weights, dropout_p: qformer_attention(
            queries, image, weights, shape.heads, form="latents", impl=impl, dropout_p=dropout_p
        )

    found = {"formed, SDPA": ("formed", formed_for_all_layers), "latents, torch": ("latents", latents("reference"))}
    reason = qformer_attention_unsupported_reason(shape, dtype, torch.device(device))
    if reason is None:
        found["latents, kernels"] = ("latents", latents("triton"))
    return found, {} if reason is None else {"latents, kernels": reason}


def check(shape: AttentionShape, device: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors to float64 of each peer and of plain torch on one image, output and the largest over the gradients, relative to the size."""
    one = AttentionShape(1, *[getattr(shape, n) for n in ("queries", "keys", "width", "hidden", "heads")])
    queries, image, weights = inputs(one, device, dtype, "weights and tokens")

    def results(run, tensors):
        out = run(tensors[0], tensors[1], CrossWeights(*tensors[2:]))
        # K's bias has no effect: its gradient is left out.
        return [out, *torch.autograd.grad(out.float().square().sum(), [*tensors[:5], *tensors[6:]])]

    wide = [t.detach().double().requires_grad_() for t in (queries, image, *weights)]
    exact = results(lambda q, e, w: reference_qformer_attention(q, e, w, one.heads), wide)
    runs = {"plain torch": lambda q, e, w: reference_qformer_attention(q, e, w, one.heads)}
    runs |= {n: lambda q, e, w, run=run: run(q, e, w, 0.0) for n, (_, run) in peers(one, device, dtype)[0].items()}
    errors = {}
    for name, run in runs.items():
        relative = [
            largest_error(x, y) / float(x.detach().abs().amax())
            for x, y in zip(exact, results(run, [queries, image, *weights]), strict=True)
        ]
        errors[name] = {"output": relative[0], "gradients": max(relative[1:])}
    for name, error in errors.items():
        for part, value in error.items():
            floor = torch.finfo(dtype).eps
            assert value <= 3 * errors["plain torch"][part] + floor, f"{name}: {part} off by {value:.2e}"
    return errors


def measure(
    shape: AttentionShape, mode: str, dropout_p: float, device: str, dtype: torch.dtype, repeats: int, rates: dict
) -> dict[str, dict]:
    queries, image, weights = inputs(shape, device, dtype, mode)
    gradients, image_gradient = MODES[mode]
    leaves = [t for t in (queries, image, *weights) if t.requires_grad]

    def once(run):
        with torch.set_grad_enabled(bool(leaves)):
            out = run(queries, image, weights, dropout_p)
        if leaves:
            torch.autograd.grad(out, leaves, out, materialize_grads=True)

    found = peers(shape, device, dtype)[0]
    times: dict[str, list[float]] = {name: [] for name in found}
    peak_mib = {}
    for name, (_, run) in found.items():
        once(run)  # compiles and warms up
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(run)
            peak_mib[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    for _ in range(repeats):
        for name, (_, run) in found.items():
            times[name].append(timed_ms(device, lambda run=run: once(run)))
    projections = 4 * shape.batch * shape.queries * shape.hidden**2 * (3 if gradients else 1)
    rows = {}
    for name, (form, _) in found.items():
        step_ms = statistics.median(times[name])
        flops = form_cost(shape, form, gradients, image_gradient, 0) + projections
        rows[name] = {
            "step_ms": round(step_ms, 4),
            "gflop": round(flops / 1e9, 2),
            "gflop_s": round(flops / step_ms / 1e6, 1),
        }
        if rates:
            flops_per_byte = rates["matmul_tflop_s"] * 1e3 / rates["copy_gb_s"]
            floor = form_cost(shape, form, gradients, image_gradient, flops_per_byte) + projections
            floor_ms = floor / rates["matmul_tflop_s"] / 1e9
            rows[name] |= {
                "floor_ms": round(floor_ms, 4),
                "share_of_floor": round(floor_ms / step_ms, 3),
                "peak_mib": peak_mib[name],
            }
    for row in rows.values():
        row["times_formed"] = round(rows["formed, SDPA"]["step_ms"] / row["step_ms"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="default 7 on the CPU, 30 on a GPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    dtype, repeats = torch.bfloat16 if on_gpu else torch.float32, options.repeats or (30 if on_gpu else 7)
    if not on_gpu:
        torch.set_num_threads(1)
    rates = {"matmul_tflop_s": matmul_rate("cuda") / 1e12, "copy_gb_s": copy_bandwidth("cuda") / 1e9} if on_gpu else {}
    found = about("qformer_attention", options.device, dtype=str(dtype), repeats=repeats, rates=rates, results=[])
    print(f"cross-attention on {found['device']}, {dtype}, median of {repeats} runs")
    for name, rate in rates.items():
        print(f"measured {name}: {rate:.0f}")
    for shape in CUDA_SHAPES if on_gpu else CPU_SHAPES:
        errors = check(shape, options.device, dtype)
        print(f"{shape.batch} images, {shape.queries} queries, {shape.keys} tokens; relative errors to float64: " + "; ".join(
            f"{n} {e['output']:.1e} {e['gradients']:.1e}" for n, e in errors.items()
        ))  # fmt: skip
        for missing, reason in peers(shape, options.device, dtype)[1].items():
            print(f"not measured: {missing}: {reason}")
        for mode in MODES:
            for dropout_p in (0.0, 0.1) if on_gpu and mode == "weights" else (0.0,):
                rows = measure(shape, mode, dropout_p, options.device, dtype, repeats, rates)
                found["results"].append(
                    {"shape": shape.__dict__, "mode": mode, "dropout_p": dropout_p, "errors": errors, "peers": rows}
                )
                print(f"  gradients: {mode}" + (f", dropout {dropout_p}" if dropout_p else ""))
                for name, row in rows.items():
                    more = f"  {row['share_of_floor']:6.1%} of its floor  {row['peak_mib']:8.1f} MiB" if rates else ""
                    print(
                        f"    {name:18} {row['step_ms']:9.3f} ms {row['gflop_s']:9.1f} GFLOP/s  {row['times_formed']:6.3f} x formed{more}"
                    )
        if options.out:
            options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
