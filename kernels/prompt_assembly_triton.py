"""The Triton kernels of `prompt_assembly` (prompt_assembly.py), which launches them.  Blocks: R rows of the buffer, W of the width."""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase


@triton.jit
def _assemble_kernel(
    ids_ptr, source_ptr, table_ptr, prompts_ptr, out_ptr, tokens, width, table_row, vocabulary, prompt_rows,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Every token's row, from the prompts where source_ptr has a row of them, -1 elsewhere; NaN where an index is out of range."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)  # [W]
    inside, wide = row < tokens, column < width
    source = tl.load(source_ptr + row, mask=inside, other=-1)  # int64
    word = tl.load(ids_ptr + row, mask=inside, other=0)
    visual = source != -1
    from_prompts = visual & (source >= 0) & (source < prompt_rows)
    from_table = (source == -1) & (word >= 0) & (word < vocabulary)
    prompt = tl.load(
        prompts_ptr + (source * width)[:, None] + column[None, :], mask=(inside & from_prompts)[:, None] & wide[None, :], other=0.0
    )  # fmt: skip
    words = tl.load(
        table_ptr + (word * table_row)[:, None] + column[None, :], mask=(inside & from_table)[:, None] & wide[None, :], other=0.0
    )  # fmt: skip
    value = tl.where(from_prompts[:, None], prompt.to(tl.float32), words.to(tl.float32))  # [R, W]
    value = tl.where((from_prompts | from_table)[:, None], value, float("nan"))
    out_at = out_ptr + (row.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=inside[:, None] & wide[None, :])


@triton.jit
def _gather_kernel(
    gradient_ptr, slots_ptr, first_ptr, out_ptr, prompt_rows, width, tokens,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Row p of the prompts: the sum of the gradient's rows slots[first[p]] ... slots[first[p + 1] - 1], in that order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)  # [W]
    inside, wide = row < prompt_rows, column < width
    first = tl.load(first_ptr + row, mask=inside, other=0)
    count = tl.load(first_ptr + row + 1, mask=inside, other=0) - first
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for turn in range(0, tl.max(count, 0)):  # 1 for all but images split over rows
        used = inside & (turn < count)
        slot = tl.load(slots_ptr + first + turn, mask=used, other=0)  # int64
        used = used & (slot >= 0) & (slot < tokens)
        at = gradient_ptr + (slot * width)[:, None] + column[None, :]
        total += tl.load(at, mask=used[:, None] & wide[None, :], other=0.0).to(tl.float32)
    out_at = out_ptr + (row.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & wide[None, :])


def compile_cases(architecture: int) -> list[CompileCase]:
    """Both kernels for a table and prompts in bf16, 4,096 wide; the settings are the same on both architectures."""
    import torch

    from .prompt_assembly import launch_config

    config = launch_config(4096, torch.bfloat16)
    sizes = {"BLOCK_ROWS": config.block_rows, "BLOCK_WIDTH": config.block_width}
    indices = {"ids_ptr": "*i64", "source_ptr": "*i64", "slots_ptr": "*i64", "first_ptr": "*i64"}
    return [
        CompileCase(
            name, kernel, {a: indices.get(a, "*bf16" if a.endswith("_ptr") else "i32") for a in kernel.arg_names}, sizes,
            ("width", "table_row"), {"num_warps": config.warps},
        )
        for name, kernel in (("assemble", _assemble_kernel), ("gather", _gather_kernel))
    ]  # fmt: skip
