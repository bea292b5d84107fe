"""The language model's packed input rows: word embeddings and the projector's soft prompts, each written once into its place.

Replaces:

    words = F.embedding(ids, table).flatten(0, 1)                                       # (R * T, W), written, then copied
    inputs = words.index_copy(0, slots, prompts.flatten(0, 1)[source].to(words.dtype)).view(R, T, W)

Shape letters: R rows, T tokens of a row, W width of a word embedding, G images of the micro-batch, Q queries an image, V visual slots.
Positions and what each token sees are made with the rows on the host (engine/data/packing.py): 6 numbers a token against W here.

No arithmetic: memory is the floor.  At 8 rows of 2,048 tokens, W = 4,096, bf16: 134 MB read at most (words that recur come from cache) and
134 MB written, 56 us at 4.8 TB/s; the lines above read and write each row twice and each visual row four times, 0.71 GB.  Backward: the
word embeddings are frozen, so only visual rows have a gradient, a third of the rows of COCO's captions: 44 MB read, 44 MB written.  An
image whose captions are split over rows has several slots for one prompt row; the backward gathers and sums them by an inverse index, in
a fixed order and without atomics.  Bench: benches/bench_prompt_assembly.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_support import log_fallback_once, triton_unsupported_reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prompt_assembly(
    ids: Tensor,  # (R, T) int64
    table: Tensor,  # (vocabulary, W)
    prompts: Tensor,  # (G, Q, W)
    slots: Tensor,  # (V,) int64, places in the flattened rows, each at most once
    source: Tensor,  # (V,) int64, rows of the flattened prompts
    impl: Literal["reference", "triton"] | None = None,
) -> Tensor:
    """(R, T, W) in the table's dtype: the prompts' rows at `slots`, the words of `ids` elsewhere.

    Indices out of range raise on the CPU as torch's do; the kernels fill what they would name with NaN.  Raises ValueError for shapes,
    dtypes or devices that do not belong together, and where a named `impl` cannot run.
    """
    _check(ids, table, prompts, slots, source)
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"impl: expected None, 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return reference_prompt_assembly(ids, table, prompts, slots, source)
    reason = prompt_assembly_unsupported_reason(ids, table, prompts)
    if reason is None:
        return _PromptAssembly.apply(ids, table, prompts, slots, source)
    if impl == "triton":
        raise ValueError(f"impl: expected one that can run, got 'triton': {reason}; leave it None")
    log_fallback_once("prompt_assembly", reason)
    return reference_prompt_assembly(ids, table, prompts, slots, source)


def reference_prompt_assembly(ids: Tensor, table: Tensor, prompts: Tensor, slots: Tensor, source: Tensor) -> Tensor:
    """The same in torch."""
    words = F.embedding(ids, table).flatten(0, 1)
    visual = prompts.flatten(0, 1)[source].to(words.dtype)
    return words.index_copy(0, slots, visual).view(*ids.shape, table.shape[1])


def prompt_assembly_unsupported_reason(ids: Tensor, table: Tensor, prompts: Tensor) -> str | None:
    """Why the kernels cannot run on these; None where they can."""
    for name, tensor in (("table", table), ("prompts", prompts)):
        if tensor.dtype not in DTYPES:
            return f"{name} of {tensor.dtype}: the kernels take float32, bfloat16 and float16"
    if table.requires_grad:
        return "the word embeddings train: the kernels give the prompts' gradient only"
    if not ids.numel():
        return "the batch is empty"
    if max(ids.numel(), prompts.shape[0] * prompts.shape[1]) >= 2**31:
        return "2**31 tokens or more"
    return triton_unsupported_reason(ids.device)


def _check(ids: Tensor, table: Tensor, prompts: Tensor, slots: Tensor, source: Tensor) -> None:
    if table.ndim != 2 or not table.shape[1]:
        raise ValueError(f"table: expected (vocabulary, width), got shape {tuple(table.shape)}")
    if prompts.ndim != 3 or prompts.shape[2] != table.shape[1]:
        raise ValueError(
            f"prompts: expected (images, queries, {table.shape[1]}) as wide as the table, got shape {tuple(prompts.shape)}; "
            "the projector belongs to another language model"
        )
    for name, tensor, dimensions in (("ids", ids, 2), ("slots", slots, 1), ("source", source, 1)):
        if tensor.ndim != dimensions or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected int64 with {dimensions} dimensions, got {tensor.dtype} {tuple(tensor.shape)}; take it from a PackedBatch"
            )
    if slots.shape != source.shape:
        raise ValueError(f"source: expected one for each of {len(slots)} slots, got {len(source)}")
    for name, tensor in (("table", table), ("prompts", prompts), ("slots", slots), ("source", source)):
        if tensor.device != ids.device:
            raise ValueError(
                f"{name}: expected a tensor on {ids.device} as the ids, got one on {tensor.device}; move it"
            )


@dataclass(frozen=True)
class LaunchConfig:
    """block_rows x block_width elements of a program."""

    block_rows: int
    block_width: int
    warps: int


def launch_config(width: int, dtype: torch.dtype) -> LaunchConfig:
    """Settings of both kernels.  dtype: of what is written."""
    # 128 threads of 16 bytes, 4 rows each: the three loads that depend on one another (slot, id, row) are paid once for 4 rows in flight.
    return LaunchConfig(4, min(128 * 16 // dtype.itemsize, max(16, 1 << (width - 1).bit_length())), warps=4)


def _grid(rows: int, width: int, config: LaunchConfig) -> tuple[int, int]:
    return -(-rows // config.block_rows), -(-width // config.block_width)


@torch.library.custom_op("vpgtrans::prompt_assembly_forward", mutates_args=())
def _forward(ids: Tensor, table: Tensor, prompts: Tensor, slots: Tensor, source: Tensor) -> Tensor:
    from .prompt_assembly_triton import _assemble_kernel

    width = table.shape[1]
    out = table.new_empty(*ids.shape, width)
    source_of = torch.full((ids.numel(),), -1, dtype=torch.int64, device=ids.device).index_copy_(0, slots, source)
    config = launch_config(width, table.dtype)
    _assemble_kernel[_grid(ids.numel(), width, config)](
        ids, source_of, table, prompts, out, ids.numel(), width, table.stride(0), table.shape[0], prompts.shape[0] * prompts.shape[1],
        BLOCK_ROWS=config.block_rows, BLOCK_WIDTH=config.block_width, num_warps=config.warps,
    )  # fmt: skip
    return out


@_forward.register_fake
def _(ids: Tensor, table: Tensor, prompts: Tensor, slots: Tensor, source: Tensor) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


@torch.library.custom_op("vpgtrans::prompt_assembly_backward", mutates_args=())
def _backward(gradient: Tensor, slots: Tensor, source: Tensor, prompt_rows: int, dtype: torch.dtype) -> Tensor:
    """gradient (R * T, W) -> (prompt_rows, W) in `dtype`."""
    from .prompt_assembly_triton import _gather_kernel

    width = gradient.shape[1]
    out = gradient.new_empty(prompt_rows, width, dtype=dtype)
    ordered, order = source.sort(stable=True)
    first = torch.searchsorted(ordered, torch.arange(prompt_rows + 1, device=source.device))
    config = launch_config(width, dtype)
    _gather_kernel[_grid(prompt_rows, width, config)](
        gradient, slots[order], first, out, prompt_rows, width, gradient.shape[0],
        BLOCK_ROWS=config.block_rows, BLOCK_WIDTH=config.block_width, num_warps=config.warps,
    )  # fmt: skip
    return out


@_backward.register_fake
def _(gradient: Tensor, slots: Tensor, source: Tensor, prompt_rows: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(prompt_rows, gradient.shape[1], dtype=dtype)


class _PromptAssembly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, prompts: Tensor, slots: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(slots, source)
        ctx.prompts = prompts.shape, prompts.dtype
        table = table if table.stride(1) == 1 else table.contiguous()
        return _forward(ids.contiguous(), table, prompts.contiguous(), slots.contiguous(), source.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, None
        slots, source = ctx.saved_tensors
        shape, dtype = ctx.prompts
        rows = gradient.reshape(-1, shape[2]).contiguous()
        return None, None, _backward(rows, slots, source, shape[0] * shape[1], dtype).view(shape), None, None
