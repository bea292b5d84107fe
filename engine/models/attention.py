"""Prefix attention in any decoder-only model, through transformers' attention interface.

transformers hands a 4-d mask to the attention of every layer as it is (its masking_utils), so the segments of packed rows travel in the
mask's place, as (rows, 1, tokens, 4) int32, and what a back end of attention_back_ends.py knows of them beside it, as a keyword argument.
With any other mask, or none, a model attends as it does by sdpa: generation is untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...kernels.prefix_attention import dense_mask, prefix_attention, prefix_attention_unsupported_reason
from ...kernels.triton_support import log_fallback_once
from .attention_back_ends import BackEnd, Layout, attend

PREFIX = "vpgtrans_prefix"
BACK_END = "vpgtrans_back_end"


@dataclass(frozen=True)
class PackedMask:
    """What a back end's attention takes for a mask: segments (rows, 1, tokens, 4) int32, the back end, and its own layout of them."""

    segments: Tensor
    back_end: BackEnd
    layout: Layout


def register_prefix_attention() -> None:
    """Make PREFIX an attention implementation that transformers' models can be set to."""
    AttentionInterface.register(PREFIX, prefix_attention_forward)
    AttentionMaskInterface.register(PREFIX, sdpa_mask)


def register_back_ends() -> None:
    """Make BACK_END an attention implementation that transformers' models can be set to."""
    AttentionInterface.register(BACK_END, back_end_forward)
    AttentionMaskInterface.register(BACK_END, sdpa_mask)


def prefix_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, sliding_window: int | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (rows, heads, tokens, head size), key and value (rows, key heads, tokens, head size) -> (rows, tokens, heads, head size).

    attention_mask: segments, or what sdpa takes.  What the kernels cannot do is left to sdpa, behind the dense mask of the segments.
    """
    more |= {"dropout": dropout, "scaling": scaling, "softcap": softcap, "sliding_window": sliding_window}
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    segments = attention_mask[:, 0]
    query, key, value = _autocast(query, key, value)
    reason = prefix_attention_unsupported_reason(
        query, key, value, softcap=softcap, sliding_window=sliding_window, dropout=dropout
    )
    if reason is not None:
        log_fallback_once("prefix_attention", reason)
        return sdpa_attention_forward(module, query, key, value, dense_mask(segments), **more)
    return prefix_attention(query, key, value, segments, scaling, impl="triton").transpose(1, 2), None


def back_end_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, packed: PackedMask | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As `prefix_attention_forward`, by the back end of `packed`, which the model hands on to its layers.

    Raises ValueError where it does not.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        more |= {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if packed is None:
        raise ValueError(
            f"packed: expected the layout of packed rows, got nothing; {type(module).__name__} does not hand on keyword arguments"
        )
    if softcap is not None or dropout:
        reason = "soft-capped scores" if softcap is not None else f"dropout {dropout:g}"
        log_fallback_once(f"attention by {packed.back_end}", f"{reason} is left to sdpa behind a dense mask")
        more |= {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, dense_mask(attention_mask[:, 0]), **more)
    return attend(packed.back_end, *_autocast(query, key, value), packed.layout, scaling), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast casts for sdpa, but not for operations that it does not know; rotated queries may come in float32."""
    device = tensors[0].device.type
    return (
        tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors) if torch.is_autocast_enabled(device) else tensors
    )
