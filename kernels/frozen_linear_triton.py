"""Triton kernels in front of FP8 GEMMs: rows quantised, rows normalised and quantised, and the norm's input-gradient. One program a row."""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase

FP8_MAX = tl.constexpr(448.0)  # e4m3's largest


@triton.jit
def _store_quantised(row, y, columns, inside, values_ptr, scales_ptr, width):
    """y [BLOCK_K] float32 -> its e4m3 values and the row's scale."""
    largest = tl.max(tl.where(inside, tl.abs(y), 0.0), 0)
    # A maximum passes over NaN; the sum of zeros does not: a row with NaN or an infinity has the scale NaN.
    scale = tl.where(largest == 0.0, 1.0, largest / FP8_MAX) + tl.sum(tl.where(inside, y * 0.0, 0.0), 0)
    values = tl.minimum(tl.maximum(y / scale, -FP8_MAX), FP8_MAX)
    tl.store(values_ptr + row * width + columns, values.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def quantise_rows_kernel(x_ptr, values_ptr, scales_ptr, width, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    _store_quantised(row, x, columns, inside, values_ptr, scales_ptr, width)


@triton.jit
def norm_and_quantise_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, values_ptr, scales_ptr, mean_ptr, rstd_ptr, width, eps,
    IS_LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, ROUNDED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < width
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if IS_LAYER:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
        tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd
    if ROUNDED:
        y = y.to(dtype).to(tl.float32)
    y = y * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = y.to(dtype)
    tl.store(y_ptr + row * width + columns, rounded, mask=inside)
    # What is quantised is what was written, so that it is the same whoever quantises.
    _store_quantised(row, rounded.to(tl.float32), columns, inside, values_ptr, scales_ptr, width)


@triton.jit
def norm_input_gradient_kernel(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, width, IS_LAYER: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    if IS_LAYER:
        x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
    normalised = x * rstd
    result = grad - normalised * (tl.sum(grad * normalised, 0) / width)
    if IS_LAYER:
        result -= tl.sum(grad, 0) / width
    tl.store(grad_x_ptr + row * width + columns, (result * rstd).to(grad_x_ptr.dtype.element_ty), mask=inside)


def compile_cases(architecture: int) -> list[CompileCase]:
    """LLaMA-7B's two widths, ViT-g's LayerNorm, and the widest row; e4m3 needs sm_89, so that sm_80 has only the gradient."""
    from .frozen_linear import MAX_WIDTH, rows_config

    def case(name: str, kernel, width: int, pointers: str, **constants) -> CompileCase:
        config = rows_config(width)
        types = dict(part.split(":") for part in pointers.split()) | {"width": "i32", "eps": "fp32"}
        return CompileCase(
            f"{kernel.__name__} {name}",
            kernel,
            {k: v for k, v in types.items() if k in kernel.arg_names},
            constants | {"BLOCK_K": config.block_width},
            ("width",),
            {"num_warps": config.num_warps},
        )

    norm = (
        "x_ptr:*bf16 weight_ptr:*bf16 bias_ptr:*bf16 y_ptr:*bf16 values_ptr:*fp8e4nv scales_ptr:*fp32 mean_ptr:*fp32 rstd_ptr:*fp32 "
        "grad_y_ptr:*bf16 grad_x_ptr:*bf16"
    )
    cases = [
        case("llama", norm_input_gradient_kernel, 4096, norm, IS_LAYER=False),
        case("vit_g", norm_input_gradient_kernel, 1408, norm, IS_LAYER=True),
    ]
    if architecture >= 89:
        cases += [
            case("llama", quantise_rows_kernel, 11008, norm),
            case("widest", quantise_rows_kernel, MAX_WIDTH, norm),
            case("llama", norm_and_quantise_kernel, 4096, norm, IS_LAYER=False, HAS_BIAS=False, ROUNDED=True),
            case("vit_g", norm_and_quantise_kernel, 1408, norm, IS_LAYER=True, HAS_BIAS=True, ROUNDED=False),
        ]
    return cases
