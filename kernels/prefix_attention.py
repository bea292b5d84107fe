"""Causal attention in packed rows, in which the captions of an image share its prefix and do not see one another.

Replaces, for rows of `[prefix][caption 1][caption 2]...` of several images (engine/data/packing.py):

    mask = same_image & (key_in_prefix | same_caption) & causal                         # (R, 1, T, T)
    F.scaled_dot_product_attention(queries, repeat(keys), repeat(values), mask, scale=scale)

Shape letters: R rows, H query heads, J key heads (H a multiple of J), T tokens of a row, D head size.

`segments` (R, T, 4) int32 says for token t what is visible, in tokens of its row: `prefix_start`, `prefix_stop`, `caption_start` and
`seen_stop`.  Query t sees key k where k <= t and (prefix_start <= k < prefix_stop or k >= caption_start); seen_stop is one more than the
last query that sees key t.  It is made once a batch and is the same for every layer and head.  From it each block of queries finds the
one or two ranges of keys that it sees, and each block of keys the range of queries that see it, so work grows with what is visible.

Work and bytes, forward, one row of 2,048 tokens with 21 images of 32 visual tokens and 5 captions of about 13, H = J = 32, D = 128, bf16:
64 k of the 4.2 M pairs are visible, 4 * 128 * 32 * 64 k = 1.1 GFLOP (4.9 in blocks of 64 x 64; 68.7 behind a dense mask), and queries,
keys, values and output are 4 * 16.8 = 67 MB: 14 us at 4.8 TB/s against 5 us of matmul at 990 TFLOP/s, so memory is the floor.  Backward:
2.5 times the FLOPs, 8 such tensors once each (134 MB; the two kernels here move 12, 201 MB).  Heads of 80 and 96 are padded to 128 on
chip only.

Online softmax and recomputed scores after Dao, FlashAttention-2 (arXiv 2307.08691).  Gradients are summed in a fixed order, without
atomics.  Bench: benches/bench_prefix_attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_support import architecture, log_fallback_once, triton_unsupported_reason

LOG2_E = math.log2(math.e)
LARGEST_HEAD = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefix_attention(
    queries: Tensor,  # (R, H, T, D)
    keys: Tensor,  # (R, J, T, D)
    values: Tensor,  # (R, J, T, D)
    segments: Tensor,  # (R, T, 4) int32
    scale: float | None = None,
    impl: Literal["reference", "triton"] | None = None,
) -> Tensor:
    """(R, H, T, D), in memory (R, T, H, D) where the kernels run; scale: of the scores, 1 / sqrt(D) by default.

    A query that sees no key gets zeros.  Raises ValueError for shapes, dtypes or devices that do not belong together, and where a named
    `impl` cannot run.
    """
    _check(queries, keys, values, segments)
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"impl: expected None, 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return reference_prefix_attention(queries, keys, values, segments, scale)
    reason = prefix_attention_unsupported_reason(queries, keys, values)
    if reason is None:
        return _PrefixAttention.apply(queries, keys, values, segments, scale)
    if impl == "triton":
        raise ValueError(f"impl: expected one that can run, got 'triton': {reason}; leave it None")
    log_fallback_once("prefix_attention", reason)
    return reference_prefix_attention(queries, keys, values, segments, scale)


def dense_mask(segments: Tensor) -> Tensor:
    """segments (R, T, 4) int32 -> (R, 1, T, T) bool, [row, 0, query, key], for attention that takes a mask."""
    prefix_start, prefix_stop, caption_start, _ = segments[:, :, None].unbind(-1)  # (R, T, 1)
    token = torch.arange(segments.shape[1], device=segments.device)
    return is_visible(prefix_start, prefix_stop, caption_start, token[:, None], token)[:, None]


def is_visible(prefix_start: Tensor, prefix_stop: Tensor, caption_start: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query, whose segments the first three are, sees a key; all are tokens of one row, of shapes that broadcast."""
    return (((key >= prefix_start) & (key < prefix_stop)) | (key >= caption_start)) & (key <= query)


def reference_prefix_attention(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, scale: float | None = None
) -> Tensor:
    """The same in torch: SDPA with the dense mask, key heads repeated."""
    if not queries.numel():
        return queries + keys.sum() + values.sum()  # empty, but part of the graph
    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=dense_mask(segments), scale=scale)


def prefix_attention_unsupported_reason(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Why the kernels cannot run on these; None where they can.  The options are what a language model may ask of its attention."""
    if softcap is not None:
        return f"softcap {softcap:g}: the kernels have no soft-capped scores"
    if sliding_window is not None and sliding_window < queries.shape[2]:
        return f"sliding_window {sliding_window} is shorter than the row of {queries.shape[2]} tokens"
    if dropout:
        return f"dropout {dropout:g}: the kernels have none; a frozen model in eval mode has none either"
    if queries.dtype not in DTYPES:
        return f"dtype {queries.dtype}: the kernels take float32, bfloat16 and float16"
    head_size = queries.shape[-1]
    if head_size % 8 or head_size > LARGEST_HEAD:
        return f"head size {head_size}: the kernels take multiples of 8 up to {LARGEST_HEAD}"
    if not queries.numel():
        return "the batch is empty"
    if max(queries.shape[0], keys.shape[1]) > 65535:
        return f"{queries.shape[0]} rows and {keys.shape[1]} key heads: a launch takes 65,535 of each"
    # Offsets inside a row are 32-bit; those between rows are 64-bit.
    largest = max(
        sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in (queries, keys, values)
    )
    if max(largest, queries[0].numel()) >= 2**31:
        return "a row spans 2**31 elements or more"
    return triton_unsupported_reason(queries.device)


def _check(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> None:
    if queries.ndim != 4 or not queries.shape[-1]:
        raise ValueError(f"queries: expected (rows, heads, tokens, head size), got shape {tuple(queries.shape)}")
    rows, heads, tokens, head_size = queries.shape
    kv_heads = keys.shape[1] if keys.ndim == 4 else 0
    if tuple(keys.shape) != (rows, kv_heads, tokens, head_size) or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"keys: expected ({rows}, a divisor of {heads}, {tokens}, {head_size}) as the queries have it, got shape {tuple(keys.shape)}; "
            "prefix attention has no cache, its keys are those of the queries' tokens"
        )
    if values.shape != keys.shape:
        raise ValueError(f"values: expected the keys' shape {tuple(keys.shape)}, got {tuple(values.shape)}")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != queries.dtype or tensor.device != queries.device:
            raise ValueError(
                f"{name}: expected {queries.dtype} on {queries.device} as the queries, got {tensor.dtype} on {tensor.device}; convert one"
            )
    if segments.shape != (rows, tokens, 4) or segments.dtype != torch.int32 or segments.device != queries.device:
        raise ValueError(
            f"segments: expected int32 ({rows}, {tokens}, 4) on {queries.device}, got {segments.dtype} {tuple(segments.shape)} on "
            f"{segments.device}; take PackedBatch.segments"
        )


@dataclass(frozen=True)
class LaunchConfig:
    """block_rows: folded query rows (token and head of the group) of a block.  block_keys: keys of a block."""

    block_rows: int
    block_keys: int
    warps: int
    stages: int


Stage = Literal["forward", "query_gradient", "key_gradient"]


def padded_head_size(head_size: int) -> int:
    """Columns of a block: the next power of two, 16 at least as tensor cores want."""
    return max(16, 1 << (head_size - 1).bit_length())


def launch_config(stage: Stage, head_size: int, dtype: torch.dtype, architecture: int) -> LaunchConfig:
    """Settings of one kernel.  architecture: 80 or 90."""
    width = padded_head_size(head_size)
    if dtype.itemsize == 4:
        # No tensor cores: what counts is that 32 rows of 256 and two stages of keys and values stay under 163 KiB.
        return LaunchConfig(32, 16 if width > 128 else 32, warps=4, stages=1 if width > 128 else 2)
    if stage == "key_gradient":
        # 32 rows leave two blocks of 128 threads and 247 registers on a multiprocessor; 64 rows spill, or need 8 warps and leave one.
        if width <= 128:
            return LaunchConfig(32, 64, warps=4, stages=2)
        return (
            LaunchConfig(16, 64, warps=8, stages=2) if architecture >= 90 else LaunchConfig(32, 64, warps=8, stages=1)
        )
    if width <= 128:
        # 64 x 64 visits 4.7 times the visible pairs of COCO rows, 128 x 128 7.9 times, 64 x 32 4.0 times but in 3.9 steps instead of 2.3.
        # At D = 128 two blocks fit a multiprocessor (80 or 96 KiB each); sm_80's query gradient spills with 64 keys.
        return LaunchConfig(64, 32 if architecture < 90 and stage == "query_gradient" else 64, warps=4, stages=2)
    # D = 256: 64 keys would take 160 KiB forward and 192 backward. Where 128 threads would spill or be alone, 256.
    return LaunchConfig(64, 32, warps=4 if architecture >= 90 and stage == "forward" else 8, stages=2)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(stage: Stage, queries: Tensor, keys: Tensor) -> dict[str, Any]:
    """Compile-time arguments and options of one launch."""
    head_size = queries.shape[-1]
    config = launch_config(stage, head_size, queries.dtype, architecture(queries.device))
    return {
        "GROUP": queries.shape[1] // keys.shape[1], "HEAD_SIZE": head_size, "BLOCK_D": padded_head_size(head_size),
        "BLOCK_ROWS": config.block_rows, "BLOCK_KEYS": config.block_keys, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


@torch.library.custom_op("vpgtrans::prefix_attention_forward", mutates_args=())
def _forward(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> output (R, T, H, D), and log-sum-exp over scale (R, J, T * H / J) in float32."""
    from .prefix_attention_triton import _forward_kernel

    rows, heads, tokens, head_size = queries.shape
    kv_heads = keys.shape[1]
    out = queries.new_empty(rows, tokens, heads, head_size)
    lse = queries.new_empty(rows, kv_heads, tokens * heads // kv_heads, dtype=torch.float32)
    sizes = _sizes("forward", queries, keys)
    grid = (-(-tokens * sizes["GROUP"] // sizes["BLOCK_ROWS"]), kv_heads, rows)
    _forward_kernel[grid](
        queries, keys, values, segments, out, lse, scale * LOG2_E, tokens, kv_heads,
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3], **sizes,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, heads, tokens, head_size = queries.shape
    out = queries.new_empty(rows, tokens, heads, head_size)
    return out, queries.new_empty(rows, keys.shape[1], tokens * heads // keys.shape[1], dtype=torch.float32)


@torch.library.custom_op("vpgtrans::prefix_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, out: Tensor, lse: Tensor, scale: float,
    need_queries: bool, need_keys: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients as (R, T, heads, D), of no elements where they are not needed."""
    from .prefix_attention_triton import _key_gradient_kernel, _query_gradient_kernel

    rows, _, tokens, _ = queries.shape
    kv_heads = keys.shape[1]
    dq, dk, dv = _empty_gradients(queries, keys, need_queries, need_keys, need_values)
    delta = torch.empty_like(lse) if need_queries or need_keys else lse
    strides = [s for t in (queries, keys, values, gradient) for s in t.stride()[:3]]
    numbers = (scale, scale * LOG2_E, tokens, kv_heads)
    if need_queries or need_keys:
        sizes = _sizes("query_gradient", queries, keys)
        grid = (-(-tokens * sizes["GROUP"] // sizes["BLOCK_ROWS"]), kv_heads, rows)
        _query_gradient_kernel[grid](
            queries, keys, values, segments, out, gradient, lse, dq, delta, *numbers, *strides, NEED_QUERY=need_queries, **sizes
        )  # fmt: skip
    if need_keys or need_values:
        sizes = _sizes("key_gradient", queries, keys)
        grid = (-(-tokens // sizes["BLOCK_KEYS"]), kv_heads, rows)
        _key_gradient_kernel[grid](
            queries, keys, values, segments, gradient, lse, delta, dk, dv, *numbers, *strides, NEED_KEY=need_keys, NEED_VALUE=need_values,
            **sizes,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, out: Tensor, lse: Tensor, scale: float,
    need_queries: bool, need_keys: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(queries, keys, need_queries, need_keys, need_values)


def _empty_gradients(
    queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, tokens, head_size = queries.shape
    wanted = ((need_queries, heads), (need_keys, keys.shape[1]), (need_values, keys.shape[1]))
    return tuple(queries.new_empty((rows, tokens, n, head_size) if need else 0) for need, n in wanted)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, scale: float) -> Tensor:
        queries, keys, values = map(_with_unit_stride, (queries, keys, values))
        segments = segments.contiguous()
        out, lse = _forward(queries, keys, values, segments, scale)
        ctx.save_for_backward(queries, keys, values, segments, out, lse)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, segments, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = _backward(_with_unit_stride(gradient), queries, keys, values, segments, out, lse, ctx.scale, *needs)
        return *(g.transpose(1, 2) if need else None for g, need in zip(gradients, needs, strict=True)), None, None
