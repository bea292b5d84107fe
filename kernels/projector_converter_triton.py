"""Triton kernel of `linear_into`: a product with bias whose rows are gathered from x and scattered into the language model's input."""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase
from .projector_converter import LaunchConfig


@triton.jit
def scatter_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, into_ptr, slots_ptr, rows_ptr, count, columns, inner, x_rows, into_rows,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """into[slots[i]] = x[rows[i]] W^T + b for i < count; x (x_rows, inner), weight (columns, inner), into (into_rows, columns)."""
    # GROUP blocks of rows share a block of the weight before the next one is read, so that both stay in L2.
    row_blocks, column_blocks = tl.cdiv(count, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    block = tl.program_id(0)
    group = block // (GROUP * column_blocks)
    group_rows = min(row_blocks - group * GROUP, GROUP)
    within = block % (GROUP * column_blocks)
    at = (group * GROUP + within % group_rows) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (within // group_rows) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = at.to(tl.int64)
    if GATHER:
        row = tl.load(rows_ptr + at, at < count, 0)
    row_inside = (at < count) & (row >= 0) & (row < x_rows)
    column_inside = column < columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    x_at = x_ptr + row * inner
    weight_at = weight_ptr + column.to(tl.int64) * inner
    for start in range(0, inner, BLOCK_INNER):
        steps = start + tl.arange(0, BLOCK_INNER)
        inside = steps < inner
        x = tl.load(x_at[:, None] + steps[None, :], row_inside[:, None] & inside[None, :], 0.0)
        weight = tl.load(weight_at[:, None] + steps[None, :], column_inside[:, None] & inside[None, :], 0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias_ptr + column, column_inside, 0.0).to(tl.float32)[None, :]
    slot = tl.load(slots_ptr + at, at < count, -1)
    slot_inside = row_inside & (slot >= 0) & (slot < into_rows)
    into_at = into_ptr + slot[:, None] * columns + column[None, :]
    tl.store(into_at, total.to(into_ptr.dtype.element_ty), slot_inside[:, None] & column_inside[None, :])


def compile_cases(architecture: int) -> list[CompileCase]:
    """Each tile in bf16 for 768 -> 4096."""
    tiles = (
        (LaunchConfig(128, 256, 64, 8, 3), LaunchConfig(128, 128, 64, 8, 4), LaunchConfig(64, 128, 64, 4, 4))
        if architecture >= 90
        else (LaunchConfig(128, 128, 32, 8, 4), LaunchConfig(64, 128, 32, 4, 4))
    )
    types = dict.fromkeys(("count", "columns", "inner", "x_rows", "into_rows"), "i32")
    types |= {f"{n}_ptr": "*bf16" for n in ("x", "weight", "bias", "into")} | {"slots_ptr": "*i64", "rows_ptr": "*i64"}
    return [
        CompileCase(
            f"{t.block_rows} x {t.block_columns}", scatter_linear_kernel, types,
            {"BLOCK_ROWS": t.block_rows, "BLOCK_COLUMNS": t.block_columns, "BLOCK_INNER": t.block_inner, "GROUP": 8, "BIAS": True, "GATHER": True,
             "PRECISION": "ieee"},
            ("columns", "inner"), {"num_warps": t.warps, "num_stages": t.stages},
        )
        for t in tiles
    ]  # fmt: skip
