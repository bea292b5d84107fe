"""RMSNorm or LayerNorm with frozen weights that quantises its result row-wise to FP8 as it writes it; input-gradient only.

It replaces, in front of FP8 linears (frozen_linear.py),

    y = F.layer_norm(x, (K,), weight, bias, eps)      # or weight * (x.float() * rsqrt(mean(x²) + eps)).to(x.dtype)
    rows = quantise_rows(y)                           # once for each linear that takes y

Memory-bound: 2 bytes read and 3 written an element in bf16, against 4 and 3 for each linear. y is written too, since other code may read it;
for the backward x and a row's mean and inverse deviation are kept, where torch's eager RMSNorm keeps three tensors of x's size.
The gradient (rows, x̂ the normalised row, g = grad_y · weight): grad_x = rstd · (g − x̂ · mean(g · x̂)), for LayerNorm less mean(g) too.
Bench: benches/bench_frozen_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen_linear import FP8, ROW_DTYPES, Rows, quantise_rows, rows_config, rows_unsupported_reason
from .triton_support import log_fallback_once


@dataclass(frozen=True)
class Norm:
    """kind: "layer"; "rms" as torch's RMSNorm; "rms_rounded" as transformers', which rounds to the weight's dtype before it multiplies."""

    kind: Literal["layer", "rms", "rms_rounded"]
    eps: float


def norm_and_quantise(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [K], frozen
    bias: Tensor | None,  # [K], frozen; for kind "layer"
    norm: Norm,
    impl: Literal["reference", "triton"] | None = None,
) -> tuple[Tensor, Rows]:
    """The norm's result in `x`'s dtype, and that result quantised, (M, K); differentiable in `x` alone, through the first result.

    Raises:
        ValueError: shapes or devices that do not fit, a weight or bias that requires a gradient, an unknown `impl`.
        TypeError: `x` of another dtype than bf16, float16 or float32.
        RuntimeError: `impl="triton"` where the kernels cannot run.
    """
    _check(x, weight, bias, norm, impl)
    reason = "asked for" if impl == "reference" else rows_unsupported_reason(x.device, x.shape[-1])
    if reason is not None:
        if impl == "triton":
            raise RuntimeError(f"norm_and_quantise: impl='triton' cannot run here: {reason}")
        if impl is None and x.device.type != "cpu":
            log_fallback_once("norm_and_quantise", reason)
        y = reference_norm(x, weight, bias, norm)
        return y, quantise_rows(y.detach().flatten(0, -2) if y.ndim != 2 else y.detach(), "reference")
    y, values, scales = _NormAndQuantise.apply(x.reshape(-1, x.shape[-1]), weight, bias, norm)
    return y.view(x.shape), Rows(values, scales)


def reference_norm(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> Tensor:
    """The norm in torch, with the roundings of the modules that it stands for; (..., K) in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    if norm.kind == "layer":
        more = None if bias is None else bias.to(wide.dtype)
        return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), more, norm.eps).to(x.dtype)
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if norm.kind == "rms":
        return (normalised * weight.to(wide.dtype)).to(x.dtype)
    return weight.to(x.dtype) * normalised.to(x.dtype)


@torch.library.custom_op("vpgtrans::norm_and_quantise", mutates_args=())
def _norm_and_quantise(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .frozen_linear_triton import norm_and_quantise_kernel

    y, values, scales, mean, rstd = _norm_results(x, weight, bias, kind, eps)
    config = rows_config(x.shape[1])
    if len(x):
        norm_and_quantise_kernel[(len(x),)](
            x, weight, weight if bias is None else bias, y, values, scales, mean, rstd, x.shape[1], eps,
            IS_LAYER=kind == "layer", HAS_BIAS=bias is not None, ROUNDED=kind == "rms_rounded",
            BLOCK_K=config.block_width, num_warps=config.num_warps,
        )  # fmt: skip
    return y, values, scales, mean, rstd


@_norm_and_quantise.register_fake
def _norm_results(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    column = lambda: x.new_empty(len(x), 1, dtype=torch.float32)  # noqa: E731
    return torch.empty_like(x), torch.empty_like(x, dtype=FP8), column(), column(), column()


@torch.library.custom_op("vpgtrans::norm_input_gradient", mutates_args=())
def _norm_input_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, is_layer: bool
) -> Tensor:
    from .frozen_linear_triton import norm_input_gradient_kernel

    grad_x, config = torch.empty_like(x), rows_config(x.shape[1])
    if len(x):
        norm_input_gradient_kernel[(len(x),)](
            grad_y, x, weight, mean, rstd, grad_x, x.shape[1], IS_LAYER=is_layer, BLOCK_K=config.block_width, num_warps=config.num_warps
        )  # fmt: skip
    return grad_x


@_norm_input_gradient.register_fake
def _(grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, is_layer: bool) -> Tensor:
    return torch.empty_like(x)


class _NormAndQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm):
        x = x.contiguous()
        y, values, scales, mean, rstd = _norm_and_quantise(x, weight, bias, norm.kind, norm.eps)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x, weight, mean, rstd)
            ctx.is_layer = norm.kind == "layer"
        ctx.mark_non_differentiable(values, scales)
        return y, values, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor, _values: Tensor, _scales: Tensor):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        return _norm_input_gradient(grad_y.contiguous(), x, weight, mean, rstd, ctx.is_layer), None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, impl: str | None) -> None:
    name = "norm_and_quantise"
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"{name}: impl: expected None, 'reference' or 'triton', got {impl!r}")
    if norm.kind not in ("layer", "rms", "rms_rounded"):
        raise ValueError(f"{name}: norm.kind: expected 'layer', 'rms' or 'rms_rounded', got {norm.kind!r}")
    if x.dtype not in ROW_DTYPES:
        raise TypeError(f"{name}: x: expected bfloat16, float16 or float32, got {x.dtype}")
    if not x.ndim:
        raise ValueError(f"{name}: x: expected [..., width], got a scalar")
    if bias is not None and norm.kind != "layer":
        raise ValueError(f"{name}: bias: expected None with kind {norm.kind!r}, got a tensor")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{name}: {label}: expected [{x.shape[-1]}], got {tuple(tensor.shape)}")
        if tensor.requires_grad:
            raise ValueError(
                f"{name}: {label}: expected a frozen one, got one that requires a gradient, which is not formed here; "
                "call requires_grad_(False), or use the norm's own module"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label}: expected on {x.device} as x is, got {tensor.device}; move it")
