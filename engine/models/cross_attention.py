"""The Q-Former's cross-attention by kernels/qformer_attention.py, in place of torch's own lines: all layers read the same image tokens.

What is done once for all layers: the tokens are normalised and cast to the compute dtype, and where K and V are formed, one product forms
those of every layer.  While `ln_vision` trains, its affine is folded into W_k and W_v (`fold_norm`), so that no layer needs the gradient
of the tokens, a third of the products with W_k and W_v.  Parameters keep their names and places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.qformer_attention import (
    AttentionShape,
    CrossWeights,
    choose_form,
    fold_norm,
    form_keys_values,
    qformer_attention,
)

Impl = Literal["reference"] | None


def image_readers(
    layers: Sequence[nn.Module], image: Tensor, norm: nn.LayerNorm, queries: int, impl: Impl = None
) -> list[Callable[[Tensor], Tensor]]:
    """For each cross-attention of the Q-Former (qformer.py's `_Attention`) what it does: (B, Q, D) -> (B, Q, D), residual and norm included.

    image (B, N, W), as it was before `norm`.  impl: of the latents form, as kernels/qformer_attention.py takes it.  Dropout
    draws from torch's generator.
    """
    weights = [_weights(layer) for layer in layers]
    trains_affine = torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad)
    if trains_affine and not image.requires_grad:
        tokens = F.layer_norm(image, norm.normalized_shape, eps=norm.eps)
        weights = [fold_norm(w, norm.weight, norm.bias) for w in weights]
    else:
        tokens = norm(image)
    if torch.is_autocast_enabled(image.device.type):
        tokens = tokens.to(torch.get_autocast_dtype(image.device.type))  # once, not in every layer
    hidden, width = weights[0].key.shape
    shape = AttentionShape(len(tokens), queries, tokens.shape[1], width, hidden, layers[0].heads)
    records = torch.is_grad_enabled()
    form = choose_form(
        shape,
        gradients=records and any(t.requires_grad for w in weights for t in w),
        image_gradient=records and tokens.requires_grad,
        device=tokens.device.type,
    )
    if form == "formed":
        pairs = form_keys_values(tokens, weights)
        return [
            partial(_read, layer, tokens, w, pair, impl) for layer, w, pair in zip(layers, weights, pairs, strict=True)
        ]
    return [partial(_read, layer, tokens, w, None, impl) for layer, w in zip(layers, weights, strict=True)]


def _weights(layer: nn.Module) -> CrossWeights:
    parts = layer.attention.query, layer.attention.key, layer.attention.value, layer.output.dense
    return CrossWeights(*(t for part in parts for t in (part.weight, part.bias)))


def _read(
    layer: nn.Module, tokens: Tensor, weights: CrossWeights, pair: tuple[Tensor, Tensor] | None, impl: Impl, x: Tensor
) -> Tensor:
    dense = qformer_attention(
        x, tokens, weights, layer.heads, dropout_p=layer.dropout if layer.training else 0.0, keys_values=pair,
        form="formed" if pair else "latents", impl=None if pair else impl,
    )  # fmt: skip
    return layer.output.finish(dense, x)
