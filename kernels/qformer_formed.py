"""The formed side of `qformer_attention`: K and V of all cross layers by one product, attention over them, `ln_vision`'s affine folded away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import dropout_keep, dropout_threshold


class CrossWeights(NamedTuple):
    """A cross-attention's weights as `nn.Linear` has them, (out, in): query and output (D, D), key and value (D, W), biases (D,) or None."""

    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None


def form_keys_values(image: Tensor, layers: Sequence[CrossWeights]) -> list[tuple[Tensor, Tensor]]:
    """(K, V) of every cross layer, (B, N, D) views into one product of E with all the layers' W_k and W_v.

    image (B, N, W).  K is formed without its bias, which cancels.  Differentiable in image, key, value and value_bias of each layer; the
    backward has a product a matrix and copies no gradients together.  Under torch.autocast in its dtype.

    Raises ValueError where there is no layer or a weight's shape, dtype or device does not fit the image tokens.
    """
    if not layers:
        raise ValueError("form_keys_values: layers is empty, expected the CrossWeights of at least one cross layer")
    flat = [t for w in layers for t in (w.key, w.value, w.value_bias)]
    if torch.is_autocast_enabled(image.device.type):
        dtype = torch.get_autocast_dtype(image.device.type)
        image, flat = image.to(dtype), [t if t is None else t.to(dtype) for t in flat]
    if image.ndim != 3:
        raise ValueError(f"form_keys_values: image has shape {tuple(image.shape)}, expected (B, N, W)")
    hidden = layers[0].key.shape[0]
    for i, tensor in enumerate(flat):
        wanted = (hidden,) if i % 3 == 2 else (hidden, image.shape[-1])
        if tensor is not None and (
            tuple(tensor.shape) != wanted or tensor.dtype != image.dtype or tensor.device != image.device
        ):
            raise ValueError(
                f"form_keys_values: layers[{i // 3}].{('key', 'value', 'value_bias')[i % 3]} is {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}, expected {image.dtype} {wanted} on {image.device}, as the image tokens; convert one of them"
            )
    made = _KeysValues.apply(image, *flat)
    return [(made[i], made[i + 1]) for i in range(0, len(made), 2)]


def fold_norm(weights: CrossWeights, scale: Tensor, shift: Tensor) -> CrossWeights:
    """Weights for tokens as they are before `ln_vision`'s affine, so that training the affine needs no gradient of E.

    W (x scale + shift) + b = (W scale) x + (W shift + b): exact, differentiable in weights, scale (W,) and shift (W,).
    """
    value_bias = F.linear(shift, weights.value, weights.value_bias)
    return weights._replace(key=weights.key * scale, value=weights.value * scale, value_bias=value_bias)


def dequantise_tokens(image: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """image (B, N, W) in e4m3 times token_scale (B, N) float32, in `dtype`."""
    return (image.to(torch.promote_types(dtype, torch.float32)) * token_scale[..., None]).to(dtype)


def attend_formed(
    query: Tensor, keys_values: tuple[Tensor, Tensor], heads: int, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    """query (B, Q, D), K and V (B, N, D) -> (B, Q, D): torch's fused attention, or plain products where a seed asks for its mask."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, *keys_values))
    if dropout_p and seed is not None:
        mixed = attend_with_mask(query, key, value, dropout_p, seed)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    return mixed.transpose(1, 2).flatten(2)


def attend_with_mask(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    """query (B, H, Q, d), key and value (B, H, N, d) -> (B, H, Q, d), probabilities formed; softmax in float32 or wider."""
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    if dropout_p:
        keep = dropout_keep(seed, dropout_p, *scores.shape, scores.device)
        probabilities = probabilities * keep * dropout_threshold(dropout_p)[1]
    return probabilities @ value


class _KeysValues(torch.autograd.Function):
    """Arguments after image: key, value and value_bias (or None) of each layer in turn."""

    @staticmethod
    def forward(ctx, image, *flat):
        keys, values, biases = flat[0::3], flat[1::3], flat[2::3]
        made = F.linear(image, torch.cat([w for pair in zip(keys, values, strict=True) for w in pair]))
        parts = made.split(keys[0].shape[0], -1)
        for value, bias in zip(parts[1::2], biases, strict=True):
            if bias is not None:
                value.add_(bias)
        ctx.save_for_backward(image if any(ctx.needs_input_grad[1:]) else None, *keys, *values)
        return parts

    @staticmethod
    def backward(ctx, *grads):
        image, *weights = ctx.saved_tensors
        layers = len(weights) // 2
        needs_image, *needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (3 * layers)
        grad_image = None
        for layer in range(layers):
            for part in range(2):
                rows, at = grads[2 * layer + part].flatten(0, 1), 3 * layer + part
                if needs[at]:
                    found[at] = rows.T @ image.flatten(0, 1)
                if needs_image:
                    product = (rows, weights[part * layers + layer])
                    grad_image = torch.mm(*product) if grad_image is None else grad_image.addmm_(*product)
            if needs[3 * layer + 2]:
                found[3 * layer + 2] = rows.sum(0)
        return (None if grad_image is None else grad_image.unflatten(0, grads[0].shape[:2]), *found)
