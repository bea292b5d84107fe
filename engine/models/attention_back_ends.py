"""Other people's attention for packed rows: torch's FlexAttention, flash-attn and xformers (`attention: flex | flash | xformers`).

FlexAttention takes rows as they are, with a block mask made once a micro-batch.  flash-attn and xformers know sequences only, so rows are
unpacked: one sequence a caption, whose keys are `[prefix][caption]`.  The prefix's keys and values are repeated for each caption; its queries
are needed once and go with the first caption, so the queries of a row stay in their order and nothing is copied of them:

    row        [prefix][caption 1][caption 2]
    queries    [prefix  caption 1][caption 2]            causal, aligned at the end: query i of n sees the first m - n + i + 1 of m keys
    keys       [prefix  caption 1][prefix  caption 2]

Shape letters: R rows, H query heads, J key heads, T tokens of a row, D head size, S sequences, N keys with the prefixes repeated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...kernels.prefix_attention import is_visible

BackEnd = Literal["flex", "flash", "xformers"]
INSTALL = {
    "flash": "pip install --no-build-isolation 'vpgtrans[flash-attn]'",
    "xformers": "pip install 'vpgtrans[xformers]'",
}
PACKAGES = {"flash": ("flash-attn", "flash_attn"), "xformers": ("xformers", "xformers.ops")}
_FLEX_SHAPES = 64  # compiled variants of flex_attention that are kept: as many as micro-batches have numbers of rows


@dataclass(frozen=True)
class RepeatedPrefix:
    """Rows unpacked into S sequences.  Sequence s has the queries `query_starts[s]` to `query_starts[s + 1]` of the flattened rows (R * T) and
    the keys `key_tokens[key_starts[s]:key_starts[s + 1]]`.

    key_tokens (N,) int64, flat tokens; query_starts and key_starts (S + 1,) int32; the longest sequences' lengths; bias: xformers' mask.
    """

    key_tokens: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_queries: int
    longest_keys: int
    bias: Any = None

    def to(self, device: torch.device) -> RepeatedPrefix:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("key_tokens", "query_starts", "key_starts")
        }
        return replace(self, **moved)


Layout = BlockMask | RepeatedPrefix


def repeat_prefix(segments: Tensor) -> RepeatedPrefix:
    """segments (R, T, 4) int32 on the CPU (kernels/prefix_attention.py) -> the same rows as one sequence a caption."""
    rows, tokens, _ = segments.shape
    prefix_start, prefix_stop, caption_start, _ = segments.numpy().astype(np.int64).reshape(-1, 4).T
    token = np.tile(np.arange(tokens), rows)
    # A sequence starts with a prefix, or with a caption that is not the first behind its prefix.
    first = np.flatnonzero((token == prefix_start) | ((token == caption_start) & (caption_start != prefix_stop)))
    ends = np.append(first[1:], rows * tokens)
    queries = ends - first
    repeated = np.where(token[first] == prefix_start[first], 0, (prefix_stop - prefix_start)[first])
    keys = queries + repeated
    key_starts = np.concatenate([[0], np.cumsum(keys)])
    # Place of each key in its sequence: the first `repeated` are the prefix's, the others follow from the sequence's own start.
    place = np.arange(key_starts[-1]) - np.repeat(key_starts[:-1], keys)
    row_start = np.repeat(first - token[first], keys)
    own = np.repeat(first - repeated, keys) + place
    of_prefix = row_start + np.repeat(prefix_start[first], keys) + place
    return RepeatedPrefix(
        torch.from_numpy(np.where(place < np.repeat(repeated, keys), of_prefix, own)),
        torch.from_numpy(np.append(first, rows * tokens).astype(np.int32)),
        torch.from_numpy(key_starts.astype(np.int32)),
        int(queries.max(initial=0)),
        int(keys.max(initial=0)),
    )


VarlenAttention = Callable[[Tensor, Tensor, Tensor, RepeatedPrefix, float | None], Tensor]


def attend_repeated(
    queries: Tensor, keys: Tensor, values: Tensor, layout: RepeatedPrefix, scale: float | None, attention: VarlenAttention
) -> Tensor:  # fmt: skip
    """queries (R, H, T, D), keys and values (R, J, T, D) -> (R, T, H, D), by `attention` over the unpacked sequences.

    attention: of queries (R * T, H, D), keys and values (N, J, D).  The gradients of a prefix's keys and values are summed over its captions
    by autograd, in the operands' dtype, on a GPU with atomics (unless torch.use_deterministic_algorithms is on).
    """
    rows, heads, tokens, head_size = queries.shape
    flat = queries.transpose(1, 2).reshape(rows * tokens, heads, head_size)
    keys, values = (t.transpose(1, 2).flatten(0, 1).index_select(0, layout.key_tokens) for t in (keys, values))
    return attention(flat, keys, values, layout, scale).view(rows, tokens, heads, head_size)


def flash_varlen(queries: Tensor, keys: Tensor, values: Tensor, layout: RepeatedPrefix, scale: float | None) -> Tensor:
    """flash-attn's variable-length attention, whose causal mask is aligned at the end (since 2.1)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        queries, keys, values, layout.query_starts, layout.key_starts, layout.longest_queries, layout.longest_keys, softmax_scale=scale,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def xformers_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, layout: RepeatedPrefix, scale: float | None
) -> Tensor:
    """xformers' memory-efficient attention behind `layout.bias`; key heads are repeated, since few of its operators take fewer."""
    from xformers.ops import memory_efficient_attention

    group = queries.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    return memory_efficient_attention(queries[None], keys[None], values[None], attn_bias=layout.bias, scale=scale)[0]


def xformers_bias(layout: RepeatedPrefix, device: torch.device) -> Any:
    """The block-diagonal mask, causal and aligned at the end, of a layout that is still on the CPU."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    lengths = (starts.diff().tolist() for starts in (layout.query_starts, layout.key_starts))
    return BlockDiagonalCausalFromBottomRightMask.from_seqlens(*lengths, device=device)


def flex_blocks(segments: Tensor) -> BlockMask:
    """segments (R, T, 4) int32 -> FlexAttention's mask of the same rows, on their device."""
    rows, tokens, _ = segments.shape
    prefix_start, prefix_stop, caption_start = (segments[..., i].contiguous() for i in range(3))

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_visible(prefix_start[row, query], prefix_stop[row, query], caption_start[row, query], query, key)

    return create_block_mask(visible, rows, None, tokens, tokens, device=segments.device)


def flex(queries: Tensor, keys: Tensor, values: Tensor, blocks: BlockMask, scale: float | None) -> Tensor:
    """queries (R, H, T, D), keys and values (R, J, T, D) -> (R, T, H, D).  Compiled on a GPU; on the CPU, where it has no backward, it is
    only there to be checked."""
    attend = _compiled_flex() if queries.device.type == "cuda" else flex_attention
    grouped = queries.shape[1] != keys.shape[1]
    return attend(queries, keys, values, block_mask=blocks, scale=scale, enable_gqa=grouped).transpose(1, 2)


_flex: Callable[..., Tensor] | None = None


def _compiled_flex() -> Callable[..., Tensor]:
    global _flex
    if _flex is None:
        # Past dynamo's limit (8) a further shape would run uncompiled, with all scores in memory.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FLEX_SHAPES)
        _flex = torch.compile(flex_attention, dynamic=False)
    return _flex


def layout_for(back_end: BackEnd, segments: Tensor, device: torch.device) -> Layout:
    """What `back_end` needs to know of packed rows on `device`, once a micro-batch.

    segments (R, T, 4) int32: for flash and xformers on the CPU, so that nothing waits for the device (elsewhere they are fetched).
    """
    if back_end == "flex":
        return flex_blocks(segments.to(device, non_blocking=True))
    layout = repeat_prefix(segments.cpu())
    if back_end == "xformers":
        layout = replace(layout, bias=xformers_bias(layout, device))
    return layout.to(device)


def attend(
    back_end: BackEnd, queries: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float | None
) -> Tensor:
    """queries (R, H, T, D), keys and values (R, J, T, D) -> (R, T, H, D); `layout` is that of `layout_for`."""
    if back_end == "flex":
        return flex(queries, keys, values, layout, scale)
    varlen = flash_varlen if back_end == "flash" else xformers_varlen
    return attend_repeated(queries, keys, values, layout, scale, varlen)


def back_end_unsupported_reason(
    back_end: BackEnd, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """Why a back end cannot train on `device` (in `dtype`, where given); None where it can.  Imports the package."""
    if back_end in PACKAGES and (reason := _import_reason(back_end)):
        return reason
    if device.type != "cuda":
        return f"{'FlexAttention has no backward' if back_end == 'flex' else 'it does not run'} on the {device.type.upper()}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: it needs 8.0 or newer"
    if back_end != "flex" and dtype not in (None, torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16 only, not in {str(dtype).removeprefix('torch.')}"
    return None


def _import_reason(back_end: str) -> str | None:
    distribution, module = PACKAGES[back_end]
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            return f"{distribution} is not installed ({INSTALL[back_end]})"
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{distribution} cannot be imported ({first}); build it for this torch: {INSTALL[back_end]}"
    return None
