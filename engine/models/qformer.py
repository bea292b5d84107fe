"""The Q-Former: BERT blocks whose learned queries read the image by cross-attention in every second layer (BLIP-2, arXiv 2301.12597).

Parameter names are those of transformers' `Blip2QFormerModel`, so weights move both ways without a map.  Shapes below:
B images, Q query tokens, T text tokens, N image tokens, D hidden width, W width of the image tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipe import QFormerConfig
from .cross_attention import Impl, image_readers


class _QKV(nn.Module):
    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)


class _ResidualOutput(nn.Module):
    """Dense, dropout, residual, LayerNorm: how every BERT sub-layer ends."""

    def __init__(self, inner: int, width: int, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.finish(self.dense(hidden), residual)

    def finish(self, dense: Tensor, residual: Tensor) -> Tensor:
        """What follows the dense layer, for those that come with its result."""
        return self.LayerNorm(F.dropout(dense, self.dropout, self.training) + residual)


class _Attention(nn.Module):
    def __init__(self, config: QFormerConfig, context_width: int):
        super().__init__()
        self.attention = _QKV(config.hidden_size, context_width)
        self.output = _ResidualOutput(config.hidden_size, config.hidden_size, config)
        self.heads = config.num_attention_heads
        self.dropout = config.dropout

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, D), context (B, N, W), mask (B or 1, 1, S, N) bool or None -> (B, S, D)."""
        query, key, value = (
            linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, source in (
                (self.attention.query, x),
                (self.attention.key, context),
                (self.attention.value, context),
            )
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).flatten(2), x)


class _Dense(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Layer(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int, has_cross: bool, text_branch: bool):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = _Attention(config, width)
        self.crossattention = _Attention(config, image_width) if has_cross else None
        self.intermediate_query = _Dense(width, inner)
        self.output_query = _ResidualOutput(inner, width, config)
        if text_branch:
            self.intermediate = _Dense(width, inner)
            self.output = _ResidualOutput(inner, width, config)

    def forward(
        self, x: Tensor, queries: int, image: Tensor | None, mask: Tensor | None, read_image: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:  # fmt: skip
        """read_image: stands in for the cross-attention to `image`."""
        x = self.attention(x, x, mask)
        query_part, text_part = x[:, :queries], x[:, queries:]
        if queries:
            if self.crossattention is not None:
                query_part = read_image(query_part) if read_image else self.crossattention(query_part, image)
            query_part = self.output_query(self.intermediate_query(query_part), query_part)
        if text_part.shape[1]:
            text_part = self.output(self.intermediate(text_part), text_part)
        return (
            torch.cat([query_part, text_part], 1)
            if queries and text_part.shape[1]
            else (query_part if queries else text_part)
        )


class _Encoder(nn.Module):
    def __init__(self, config: QFormerConfig, image_width: int, text_branch: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(config, image_width, i % config.cross_attention_frequency == 0, text_branch)
            for i in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """Blocks over `[queries][text]`; either part may be empty.  The text branch exists only for image-text pre-training."""

    def __init__(self, config: QFormerConfig, image_width: int, text_branch: bool = False):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = _Encoder(config, image_width, text_branch)
        self.dropout = config.dropout
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(
        self, queries: Tensor | None, image: Tensor | None, text: Tensor | None = None, mask: Tensor | None = None,
        norm: nn.LayerNorm | None = None, impl: Impl = None,
    ) -> Tensor:  # fmt: skip
        """queries (B, Q, D), image (B, N, W), text embeddings (B, T, D), mask (B, 1, Q+T, Q+T) bool -> (B, Q+T, D).

        norm: `image` is as it was before this norm, and kernels/qformer_attention.py reads it, its latents by `impl`.
        """
        parts = [p for p in (queries, text) if p is not None]
        x = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        x = F.dropout(self.layernorm(x), self.dropout, self.training)
        count = 0 if queries is None else queries.shape[1]
        crossing = [layer.crossattention for layer in self.encoder.layer if layer.crossattention is not None]
        readers = iter(image_readers(crossing, image, norm, count, impl) if norm is not None else ())
        for layer in self.encoder.layer:
            read_image = next(readers, None) if layer.crossattention is not None else None
            x = layer(x, count, image, mask, read_image)
        return x
