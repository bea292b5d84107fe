"""A linear map whose weight is frozen: forward and input-gradient only, in FP8 with row-wise scales or in the weight's own dtype.

It replaces

    y = F.linear(x, weight, bias)                     # x (..., K), weight (N, K)
    grad_x = grad_y @ weight                          # and no grad_weight: x is not kept

FP8 (e4m3, largest 448): every row of both operands has a float32 scale, its largest magnitude over 448, so that a GEMM's result is
multiplied by the product of its row's and its column's scale. The reduction runs over K forward and over N backward, and scales may not vary
along it: the weight is kept twice, as (N, K) with a scale an output and transposed as (K, N) with a scale an input. Two bytes a weight, as
bf16, and 4·(N + K) of scales: FP8 saves time, not memory. torch._scaled_mm multiplies (it accumulates in float32 but for
`fast_accumulation`, where Hopper's tensor cores keep about 14 bits between promotions); Triton kernels quantise.

Where bytes count for more than time (weights in pieces over ranks, gathered for each pass), one copy does: as the scales of outputs lie along
the reduction of the backward pass, they go into its other operand, grad_x = quantised(grad_y * scales) @ values, and the values are transposed
for each GEMM, 2 bytes a weight through memory: 7 us for 4096 x 4096 at 4.8 TB/s.

Arithmetic, LLaMA-7B's 4096 x 4096 at M = 8,192 rows: 275 GFLOP forward, 0.35 ms in bf16 at 790 TFLOP/s and half of it in FP8; quantising
x reads 2 and writes 1 byte an element, 0.10 GB, 21 us at 4.8 TB/s. A norm in front that quantises as it writes (`norm_and_quantise`) costs 5
bytes an element for q, k and v together, where a norm (4) and three quantisations (3 each) cost 13.

What row-wise e4m3 gives: 3 bits of mantissa, at most 1/16 relative error an element, 2.6 % in the root mean square for normal values; about
3.7 % of a GEMM's result where both operands are rounded. Bit for bit the same whether the norm quantised or this function did.

In the weight's own dtype torch already keeps nothing for a frozen weight: F.linear is the implementation. The idea of row-wise scales:
FP8 formats (arXiv 2209.05433), row-wise scaling as in torchao's float8. As a pass over a model: quantise_frozen.py.
Bench: benches/bench_frozen_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_support import log_fallback_once, triton_unsupported_reason

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
ALIGNMENT = 16  # of both sides of a weight, for torch._scaled_mm
MAX_WIDTH = 32768  # a row is held in registers: 64 elements a thread of 16 warps
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Rows:
    """values (M, K) e4m3 and scales (M, 1) float32: `values.float() * scales` is about what was quantised."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class QuantisedWeight:
    """A frozen weight (N, K), once for each direction: `by_output` (N, K) with N scales, `by_input` (K, N) with K scales, or None: one copy."""

    by_output: Rows
    by_input: Rows | None


def frozen_linear(
    x: Tensor,  # [..., K]
    weight: Tensor | QuantisedWeight,  # [N, K], frozen
    bias: Tensor | None = None,  # [N], frozen
    rows: Rows | None = None,  # x quantised already, [M, K]
    fast_accumulation: bool = False,
    impl: Literal["reference", "scaled_mm"] | None = None,
) -> Tensor:
    """`F.linear` with a frozen weight; (..., N), differentiable in `x` alone, once for a quantised weight.

    With a plain `weight` it is F.linear. With a quantised one the result has `x`'s dtype (autocast's within autocast), rounded to bf16 before.

    Args:
        rows: what `norm_and_quantise` gave for `x`; then `x` is not read, only its gradient flows.
        fast_accumulation: FP8 products in the tensor cores' own, shorter accumulator.
        impl: for a quantised weight: "reference" multiplies what the FP8 values stand for in float32; None takes "scaled_mm" where it runs.

    Raises:
        ValueError: shapes or devices that do not fit, a weight or bias that requires a gradient, an unknown `impl`.
        TypeError: `x` of another dtype than bf16, float16 or float32 with a quantised weight.
        RuntimeError: `impl="scaled_mm"` where it cannot run.
    """
    _check(x, weight, bias, rows, impl)
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    reason = None if impl == "reference" else fp8_unsupported_reason(x.device)
    if reason is not None:
        if impl == "scaled_mm":
            raise RuntimeError(f"frozen_linear: impl='scaled_mm' cannot run here: {reason}")
        log_fallback_once("frozen_linear", reason)
    use_reference = impl == "reference" or reason is not None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    y = _FrozenLinear.apply(
        x.flatten(0, -2) if x.ndim != 2 else x, weight, bias, rows, fast_accumulation, use_reference
    )
    return y.to(dtype).view(*x.shape[:-1], y.shape[-1])


def fp8_unsupported_reason(device: torch.device) -> str | None:
    """Why FP8 GEMMs with row-wise scales cannot run on `device`; None where they can (on the CPU too, slowly)."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"FP8 GEMMs run on NVIDIA GPUs and the CPU, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}: FP8 GEMMs with row-wise scales need 9.0 or newer"
    return None


def quantise_weight(weight: Tensor, copies: Literal[1, 2] = 2) -> QuantisedWeight:
    """weight (N, K), any float dtype -> its FP8 copies; ValueError unless both sides are multiples of 16."""
    if weight.ndim != 2 or weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        raise ValueError(
            f"frozen_linear: weight: expected [N, K], both multiples of {ALIGNMENT}, got {tuple(weight.shape)}; keep it unquantised"
        )
    fixed = weight.detach()
    return QuantisedWeight(reference_quantise_rows(fixed), reference_quantise_rows(fixed.t()) if copies == 2 else None)


def quantise_rows(x: Tensor, impl: Literal["reference", "triton"] | None = None) -> Rows:
    """x (M, K) bf16, float16 or float32 -> e4m3 rows and their scales. A row that is not finite gives NaN, a row of zeros the scale 1.

    Raises ValueError for another shape or `impl`, TypeError for another dtype, RuntimeError where a named `impl` cannot run.
    """
    if x.ndim != 2:
        raise ValueError(f"quantise_rows: x: expected [rows, width], got {tuple(x.shape)}; flatten the other axes")
    if x.dtype not in ROW_DTYPES:
        raise TypeError(f"quantise_rows: x: expected bfloat16, float16 or float32, got {x.dtype}")
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"quantise_rows: impl: expected None, 'reference' or 'triton', got {impl!r}")
    reason = "asked for" if impl == "reference" else rows_unsupported_reason(x.device, x.shape[1])
    if reason is not None:
        if impl == "triton":
            raise RuntimeError(f"quantise_rows: impl='triton' cannot run here: {reason}")
        if impl is None and x.device.type != "cpu":
            log_fallback_once("quantise_rows", reason)
        return reference_quantise_rows(x)
    config = rows_config(x.shape[1])
    return Rows(*_quantise_rows(x.contiguous(), config.block_width, config.num_warps))


def reference_quantise_rows(x: Tensor) -> Rows:
    """The definition: scale = largest magnitude / 448, values = x / scale rounded to e4m3."""
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(len(x), 1)
    scales = torch.where(largest == 0, 1.0, largest / FP8_MAX)
    return Rows((wide / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous(), scales)


def rows_unsupported_reason(device: torch.device, width: int) -> str | None:
    """Why the Triton kernels cannot quantise rows of `width` on `device`; None where they can."""
    if reason := triton_unsupported_reason(device):
        return reason
    if not 1 <= width <= MAX_WIDTH:
        return f"a row of {width} elements; the kernels hold 1 to {MAX_WIDTH} in registers"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "compute capability below 8.9 has no e4m3 conversion"
    return None


@dataclass(frozen=True)
class RowsConfig:
    """block_width: the power of two that holds a row.  num_warps: of the program that treats one."""

    block_width: int
    num_warps: int


def rows_config(width: int) -> RowsConfig:
    """Settings of the row kernels: 8 to 64 elements a thread, so that every load is one of 16 bytes and a row stays in registers."""
    block = max(256, 1 << (width - 1).bit_length())
    return RowsConfig(block, min(16, max(1, block // 512)))


@torch.library.custom_op("vpgtrans::quantise_rows", mutates_args=())
def _quantise_rows(x: Tensor, block: int, warps: int) -> tuple[Tensor, Tensor]:
    from .frozen_linear_triton import quantise_rows_kernel

    values, scales = torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
    if len(x):
        quantise_rows_kernel[(len(x),)](x, values, scales, x.shape[1], BLOCK_K=block, num_warps=warps)
    return values, scales


@_quantise_rows.register_fake
def _(x: Tensor, block: int, warps: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)


class _FrozenLinear(torch.autograd.Function):
    """FP8 forward and input-gradient; of the forward nothing is kept but the weight that is there anyway."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: QuantisedWeight, bias: Tensor | None, rows: Rows | None, fast: bool, use_reference: bool
    ):
        ctx.weight, ctx.dtype, ctx.fast, ctx.use_reference = weight, x.dtype, fast, use_reference
        return _multiply(rows or quantise_rows(x), weight.by_output, bias, fast, use_reference)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        weight = ctx.weight.by_input
        if weight is None:
            one_copy = ctx.weight.by_output
            grad_y = grad_y * one_copy.scales.t().to(grad_y.dtype)  # bf16, as y is
            values = one_copy.values.t().contiguous()
            weight = Rows(values, one_copy.scales.new_ones(len(values), 1))
        grad_x = _multiply(quantise_rows(grad_y), weight, None, ctx.fast, ctx.use_reference)
        return grad_x.to(ctx.dtype), None, None, None, None, None


def _multiply(left: Rows, right: Rows, bias: Tensor | None, fast: bool, use_reference: bool) -> Tensor:
    """left (M, K) times right (N, K) transposed, plus bias -> (M, N) bf16."""
    if use_reference:
        product = (left.values.float() * left.scales) @ (right.values.float() * right.scales).t()
        return (product if bias is None else product + bias.float()).bfloat16()
    return torch._scaled_mm(
        left.values, right.values.t(), scale_a=left.scales, scale_b=right.scales.t(),
        bias=None if bias is None else bias.bfloat16(), out_dtype=torch.bfloat16, use_fast_accum=fast,
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None, rows: Rows | None, impl: str | None
) -> None:
    name = "frozen_linear"
    if impl not in (None, "reference", "scaled_mm"):
        raise ValueError(f"{name}: impl: expected None, 'reference' or 'scaled_mm', got {impl!r}")
    stored = weight if isinstance(weight, Tensor) else weight.by_output.values
    outputs, inputs = stored.shape
    if not x.ndim or x.shape[-1] != inputs:
        raise ValueError(
            f"{name}: x: expected [..., {inputs}] for a weight {tuple(stored.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"{name}: bias: expected [{outputs}], got {tuple(bias.shape)}")
    for label, tensor in (("weight", stored), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: {label}: expected a frozen one, got one that requires a gradient, which is not formed here; "
                "call requires_grad_(False), or use F.linear"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: {label}: expected on {x.device} as x is, got {tensor.device}; move it")
    if isinstance(weight, QuantisedWeight):
        if x.dtype not in ROW_DTYPES:
            raise TypeError(f"{name}: x: expected bfloat16, float16 or float32, got {x.dtype}")
        if rows is not None and tuple(rows.values.shape) != (x.numel() // max(inputs, 1), inputs):
            raise ValueError(f"{name}: rows: expected those of x, {tuple(x.shape)}, got {tuple(rows.values.shape)}")
