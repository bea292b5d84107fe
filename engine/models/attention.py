"""Prefix attention in any decoder-only model, through transformers' attention interface.

transformers hands a 4-d mask to the attention of every layer as it is (its masking_utils), so the segments of packed rows travel in the
mask's place, as (rows, 1, tokens, 4) int32.  With any other mask, or none, a model attends as it does by sdpa: generation is untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...kernels.prefix_attention import dense_mask, prefix_attention, prefix_attention_unsupported_reason
from ...kernels.triton_support import log_fallback_once

PREFIX = "vpgtrans_prefix"


def register_prefix_attention() -> None:
    """Make PREFIX an attention implementation that transformers' models can be set to."""
    AttentionInterface.register(PREFIX, prefix_attention_forward)
    AttentionMaskInterface.register(PREFIX, sdpa_mask)


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
    if torch.is_autocast_enabled(
        query.device.type
    ):  # which casts for sdpa, but not for us; rotated queries may come in float32
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    reason = prefix_attention_unsupported_reason(
        query, key, value, softcap=softcap, sliding_window=sliding_window, dropout=dropout
    )
    if reason is not None:
        log_fallback_once("prefix_attention", reason)
        return sdpa_attention_forward(module, query, key, value, dense_mask(segments), **more)
    return prefix_attention(query, key, value, segments, scaling, impl="triton").transpose(1, 2), None
