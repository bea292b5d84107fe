"""Gradient norm, finite check, clipping and AdamW for every trainable tensor in three launches, without waiting for the device.

It replaces

    norm = torch.nn.utils.get_total_norm(grads)                        # a launch a 30 tensors, then two
    torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)  # reads and writes every gradient
    optimizer.found_inf = 1.0 - torch.isfinite(norm + loss).float()
    optimizer.step()                                                   # torch.optim.AdamW(fused=True)

The first kernel writes one sum of squares a chunk of 16,384 elements; the second, one program, adds them in a fixed order (so that the norm is
the same every time), decides whether the update counts, and forms the clip factor, the steps and their bias corrections; the third updates. A
bad update leaves parameters, moments and steps as they are. Gradients are not written: the clip factor enters the update.

Bytes for P parameters in float32: 4·P for the norm, 16·P read and 12·P written by the update: 32·P, 3.5 GB for the 108.3 M trainable parameters
of VL-LLaMA-7B's stage 2, 0.72 ms at 4.8 TB/s; torch's lines move 8·P more where they clip. FLOP do not matter.

State and checkpoints are torch.optim.AdamW's own: the kernels reach each tensor by its address. One flat buffer for parameters, gradients and
moments would spare the table of addresses (2.4 KB a step for 300 tensors, copied without waiting) but would tie checkpoints to its layout.
The update is that of Loshchilov & Hutter (arXiv 1711.05101, algorithm 2). Bench: benches/bench_adamw_step.py.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .triton_support import is_interpreted, log_fallback_once, triton_unsupported_reason


@dataclass(frozen=True)
class StepResult:
    """norm: of all gradients before clipping; skipped: 1 where norm or loss is not finite, else 0. Float32 scalars on the device."""

    norm: Tensor
    skipped: Tensor


def adamw_step(
    optimizer: torch.optim.AdamW,
    clip_norm: float | None = None,
    loss: Tensor | None = None,  # scalar
    impl: Literal["reference", "triton"] | None = None,
) -> StepResult:
    """One update of all parameters that have a gradient, clipped to a global norm of `clip_norm`; skipped on the device where it is not finite.

    Gradients: left as they are by the kernels, scaled by the reference; do not use them afterwards.

    Args:
        optimizer: with fused=True; its groups' settings and its state are used and kept.
        clip_norm: above 0; None does not clip.
        loss: an update whose loss is not finite is skipped too; any floating dtype, on the parameters' device.

    Raises:
        TypeError: `optimizer` is no torch.optim.AdamW.
        ValueError: it was not made with fused=True, no parameter has a gradient, `clip_norm` not above 0, `loss` no scalar on the parameters'
            device, or an unknown `impl`.
        RuntimeError: `impl="triton"` where the kernels cannot run.
    """
    _check(optimizer, clip_norm, loss, impl)
    reason = "asked for" if impl == "reference" else adamw_step_unsupported_reason(optimizer)
    if reason is None:
        return _triton_step(optimizer, clip_norm, loss)
    if impl == "triton":
        raise RuntimeError(f"adamw_step: impl='triton' cannot run here: {reason}")
    if impl is None:
        log_fallback_once("adamw_step", reason)
    return reference_adamw_step(optimizer, clip_norm, loss)


@torch.no_grad()
def reference_adamw_step(
    optimizer: torch.optim.AdamW, clip_norm: float | None = None, loss: Tensor | None = None
) -> StepResult:
    """torch's own lines: the definition of the result, for any dtype and device that the fused AdamW takes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    skipped = 1.0 - torch.isfinite(norm if loss is None else norm + loss.detach()).float()
    optimizer.found_inf, optimizer.grad_scale = skipped, None
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
    return StepResult(norm, skipped)


def adamw_step_unsupported_reason(optimizer: torch.optim.AdamW) -> str | None:
    """Why the Triton kernels cannot do this optimizer's step; None where they can."""
    first = next(p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    if reason := triton_unsupported_reason(first.device):
        return reason
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["maximize"] or not isinstance(group["lr"], float | int):
            return "amsgrad, maximize or a learning rate in a tensor"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas in tensors"
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state.get(parameter) or {}
            moments = (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)
            for tensor in (parameter, parameter.grad, *moments):
                if reason := _tensor_reason(tensor, first):
                    return reason
    return None


def _tensor_reason(tensor: Tensor, first: Tensor) -> str | None:
    """Why the kernels cannot reach a tensor by its address; called some thousand times an update, hence the order."""
    if (
        tensor.dtype is not torch.float32
        or tensor.layout is not torch.strided
        or tensor.get_device() != first.get_device()
    ):
        return f"a tensor that is not dense float32 on {first.device}"
    if not tensor.is_contiguous():
        return f"a tensor of shape {tuple(tensor.shape)} whose memory is not contiguous"
    if tensor.data_ptr() % 16:
        return f"a tensor of shape {tuple(tensor.shape)} that does not start at a multiple of 16 bytes"
    return None


@dataclass(frozen=True)
class LaunchConfig:
    """chunk: elements a program treats. block: elements at a time, of `num_warps` warps."""

    chunk: int
    block: int
    num_warps: int


def launch_config(elements: int) -> LaunchConfig:
    """Settings for this many elements in all.

    8 elements a thread are two 16-byte loads of each of four arrays, all in flight; 16,384 a program give 108 M parameters 6,600 programs,
    50 a multiprocessor, so that the last wave is 2 %, and look up the table once in 8 blocks. The interpreter takes the time of a block whatever
    its size: larger ones there.
    """
    return LaunchConfig(16384, 16384 if is_interpreted() else 2048, 8)


@dataclass
class _Plan:
    """What stays the same from update to update: where tensors and their chunks are. `key` tells when it does not."""

    key: tuple
    pointers: Tensor  # [4, tensors] int64: parameter, first moment, second moment, step
    sizes: Tensor  # [tensors] int64
    groups: Tensor  # [tensors] int32
    chunk_tensors: Tensor  # [chunks] int32
    chunk_starts: Tensor  # [chunks] int64
    partials: Tensor  # [chunks] float32
    corrections: Tensor  # [2, tensors] float32: step size, root of the second bias correction
    config: LaunchConfig


_plans: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Plan] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _triton_step(optimizer: torch.optim.AdamW, clip_norm: float | None, loss: Tensor | None) -> StepResult:
    from .adamw_step_triton import finish_kernel, partial_norms_kernel, update_kernel

    entries = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"] if p.grad is not None]
    states = [_state(optimizer, p) for _, p in entries]
    plan = _plan(optimizer, entries, states)
    device, count, chunks = entries[0][1].device, len(entries), len(plan.chunk_tensors)
    # One copy an update: the gradients' addresses (new ones after zero_grad) and the groups' settings, whose learning rate changes.
    settings = np.array([_settings(group) for group in optimizer.param_groups], dtype=np.float64)
    host = torch.empty(count + settings.size, dtype=torch.int64, pin_memory=device.type == "cuda")
    host.numpy()[:count] = [p.grad.data_ptr() for _, p in entries]
    host.numpy()[count:] = settings.reshape(-1).view(np.int64)
    table = host.to(device, non_blocking=True)
    grads, settings_table = table[:count], table[count:].view(torch.float64)
    results = torch.empty(3, dtype=torch.float32, device=device)  # norm, skipped, clip factor
    where = (plan.chunk_tensors, plan.chunk_starts, plan.sizes)
    constants = {"CHUNK": plan.config.chunk, "BLOCK": plan.config.block, "num_warps": plan.config.num_warps}
    partial_norms_kernel[(chunks,)](grads, *where, plan.partials, **constants)
    finish_kernel[(1,)](
        plan.partials, results if loss is None else loss.detach().float(), plan.pointers[3], plan.groups, settings_table,
        plan.corrections, results, chunks, count, clip_norm or 0.0, HAS_LOSS=loss is not None, CLIPS=clip_norm is not None,
        BLOCK=1024, num_warps=8,
    )  # fmt: skip
    update_kernel[(chunks,)](
        grads, plan.pointers, *where, plan.groups, settings_table, plan.corrections, results, count, **constants
    )
    written = [t for (_, p), state in zip(entries, states, strict=True) for t in (p, *state.values())]
    torch.autograd.graph.increment_version(written)  # they were written behind autograd's back
    return StepResult(results[0], results[1])


def _state(optimizer: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """torch's state of a parameter, made as torch makes it at the first update."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def _plan(optimizer: torch.optim.AdamW, entries: list[tuple[int, Tensor]], states: list[dict[str, Tensor]]) -> _Plan:
    """The optimizer's plan, made anew when a tensor has moved or others have gradients."""
    addresses = [
        [t.data_ptr() for t in (p, s["exp_avg"], s["exp_avg_sq"], s["step"])]
        for (_, p), s in zip(entries, states, strict=True)
    ]
    key = (entries[0][1].device, tuple((i, p.numel(), *a) for (i, p), a in zip(entries, addresses, strict=True)))
    plan = _plans.get(optimizer)
    if plan is not None and plan.key == key:
        return plan
    device, sizes = entries[0][1].device, [p.numel() for _, p in entries]
    config = launch_config(sum(sizes))
    chunks = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, config.chunk)]
    plan = _Plan(
        key,
        torch.tensor(addresses, device=device).t().contiguous(),
        torch.tensor(sizes, device=device),
        torch.tensor([i for i, _ in entries], dtype=torch.int32, device=device),
        torch.tensor([i for i, _ in chunks], dtype=torch.int32, device=device),
        torch.tensor([start for _, start in chunks], dtype=torch.int64, device=device),
        torch.empty(len(chunks), dtype=torch.float32, device=device),
        torch.empty(2, len(sizes), dtype=torch.float32, device=device),
        config,
    )
    _plans[optimizer] = plan
    return plan


def _settings(group: dict) -> list[float]:
    """What the kernels read of a group, in float64, in which 1 - 0.999 keeps its digits."""
    rate, (first, second) = float(group["lr"]), group["betas"]
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in (first, second)]
    decay = 1.0 - rate * group["weight_decay"]
    return [rate, first, 1.0 - first, second, 1.0 - second, group["eps"], decay, *logarithms]


def _check(optimizer: torch.optim.AdamW, clip_norm: float | None, loss: Tensor | None, impl: str | None) -> None:
    name = "adamw_step"
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"{name}: impl: expected None, 'reference' or 'triton', got {impl!r}")
    if not isinstance(optimizer, torch.optim.AdamW):
        raise TypeError(f"{name}: optimizer: expected a torch.optim.AdamW, got {type(optimizer).__name__}")
    if not optimizer.defaults.get("fused"):
        raise ValueError(
            f"{name}: optimizer: expected one made with fused=True, which alone skips updates on the device"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"{name}: clip_norm: expected a number above 0, or None for no clipping, got {clip_norm}")
    first = next((p for group in optimizer.param_groups for p in group["params"] if p.grad is not None), None)
    if first is None:
        raise ValueError(f"{name}: optimizer: expected a parameter with a gradient, found none; call backward first")
    if loss is not None and (loss.numel() != 1 or loss.device != first.device or not loss.is_floating_point()):
        raise ValueError(
            f"{name}: loss: expected a floating scalar on {first.device}, got {tuple(loss.shape)} {loss.dtype} on {loss.device}"
        )
