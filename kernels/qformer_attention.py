"""The Q-Former's cross-attention, through latents where that is cheaper: queries -> W_q -> attention to the image tokens -> W_o.

It replaces, with E the image tokens after `ln_vision`,

    q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, w, b in ((queries, *W_q), (E, *W_k), (E, *W_v)))
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    return F.linear(mixed.transpose(1, 2).flatten(2), *W_o)

Shapes: B images, Q queries, N image tokens of width W, D hidden width, H heads of d = D / H, R = Q H rows.  Forms of the same result:

* formed: K and V as above; `form_keys_values` makes those of all cross layers by one product, since all read the same E.
* latents: K and V are linear in E, so per head q K^T = (q W_k) E^T and P V = (P E) W_v^T: R folded queries attend to N latents of width W.
  K's bias shifts a row's scores by a constant and cancels; V's passes through, times the row sum of P, which dropout moves away from 1.

Arithmetic, an image and a layer at Q, N, W, D, H = 32, 257, 1408, 768, 12, bf16, without W_q and W_o (the same in both):

    formed   forward: K, V 1.11 GFLOP, attention 0.03; K and V move 2 x 0.79 MB          1.14 GFLOP,  2.3 MB
             backward: dW_k, dW_v 1.11, attention 0.06; dE 1.11 more                     1.18 GFLOP,  3.1 MB
    latents  forward: fold 0.07, scores 0.28, mix 0.28, unfold 0.07                      0.69 GFLOP,  5.3 MB
             backward: fold 0.07, dP 0.28, dS E 0.28, dq, dW_k, dW_v 0.07 each; dE 0.63  0.83 GFLOP,  7.4 MB

What stays on chip: a block of 128 rows (4 heads) x 257 scores in registers (128 x 256 fp32 = half the register file).  What cannot: the folded
queries and P E are R x W = 1.08 MB in bf16 against 227 KiB, and folding inside the kernel multiplies 32-row heads, half of a wgmma's 64, and has
every block fetch W_k and W_v anew (8.6 MB an image from L2 against 6.5).  So fold and unfold are head-batched products by torch (cuBLAS) over all
images, their operands pass through memory, and only scores, softmax, dropout and mix are a kernel.  P (0.2 MB) is saved instead of computed again,
which would cost 0.28 GFLOP; so is P E for dW_v.

When latents win (`choose_form`: roofs, no measurement): in FLOPs where H Q < D, that is fewer queries than d: 1.64x forward, 1.5x with gradients
of the weights at 32 of 64.  So on the CPU, where FLOPs decide.  A GPU has about 200 FLOPs a byte, and the traffic of the folded operands eats
that: at 257 tokens and 32 queries latents take 0.92 of formed's time forward, 1.03 with gradients, 0.96 with dE too, so formed it is; with 16
queries 0.5, and latents.  More tokens favour them (577: 0.76, but beyond 272 there is no kernel), 64 queries never.  The gradient of E costs most
in either form and is not needed where only `ln_vision`'s affine trains: `fold_norm`.

E in FP8 (e4m3, a scale a token) halves its 0.72 MB; the kernels convert each tile on load, formed K and V take the tokens converted first, and
both give what the converted tokens give.  Architecture 80 has no such type: there the bits are taken apart, some 15 instructions a value, so it
saves memory and not time.  `fold_norm` lets tokens be stored after `ln_vision`'s statistics and before its affine.

Idea: the reassociation is that of multi-head latent attention (arXiv 2405.04434), for image tokens.
Bench: benches/bench_qformer_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .qformer_formed import (
    CrossWeights,
    attend_formed,
    attend_with_mask,
    dequantise_tokens,
    fold_norm,
    form_keys_values,
)
from .qformer_latents import MAX_KEYS, attend_latents
from .triton_support import log_fallback_once, triton_unsupported_reason

__all__ = [
    "AttentionShape",
    "CrossWeights",
    "choose_form",
    "dequantise_tokens",
    "fold_norm",
    "form_keys_values",
    "qformer_attention",
    "reference_qformer_attention",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Form = Literal["formed", "latents"]


@dataclass(frozen=True)
class AttentionShape:
    """Images, queries an image, image tokens, their width, hidden width, heads."""

    batch: int
    queries: int
    keys: int
    width: int
    hidden: int
    heads: int


def qformer_attention(
    queries: Tensor,  # (B, Q, D)
    image: Tensor,  # (B, N, W); in the compute dtype, or every layer casts it again; or e4m3
    weights: CrossWeights,
    heads: int,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    token_scale: Tensor | None = None,  # (B, N) float32
    keys_values: tuple[Tensor, Tensor] | None = None,
    form: Form | None = None,
    impl: Literal["reference", "triton"] | None = None,
) -> Tensor:
    """Cross-attention with its input and output projections -> (B, Q, D), before BERT's dropout, residual and LayerNorm.

    Args:
        queries, image, weights: floating, one dtype and device; under torch.autocast all are cast to its dtype.
        heads: divides D.
        dropout_p: of the probabilities, in [0, 1), rounded to 1/65536; 0 in eval mode.
        seed: int or int64 tensor () on the device: the mask is `dropout_keep` of it, whatever the form.  None draws from torch's generator;
            the mask then depends on the form.
        token_scale: the image is torch.float8_e4m3fn, finite, needs no gradient, and each of its tokens is its row times its scale.
        keys_values: this layer's pair from `form_keys_values`; implies the formed form.
        form: None lets `choose_form` pick.
        impl: of the latents form: "triton", its kernels; "reference", plain torch.  None takes the kernels where they run.

    Raises:
        TypeError: dtypes that differ or are not floating.  ValueError: shapes, devices, dropout_p, form or impl that do not fit.
        RuntimeError: impl="triton" where `qformer_attention_unsupported_reason` has one.
    """
    if torch.is_autocast_enabled(queries.device.type):
        dtype = torch.get_autocast_dtype(queries.device.type)
        queries, image = queries.to(dtype), image if token_scale is not None else image.to(dtype)
        weights = CrossWeights(*(w if w is None else w.to(dtype) for w in weights))
    shape = _checked(queries, image, weights, heads, keys_values, token_scale)
    _check_options(dropout_p, seed, keys_values, form, impl)
    if form is None:
        form = _default_form(shape, queries, image, weights, keys_values, impl)
    query = F.linear(queries, weights.query, weights.query_bias)
    if weights.key_bias is not None and weights.key_bias.requires_grad:
        query = _WithoutEffect.apply(query, weights.key_bias)
    if form == "formed":
        if keys_values is None:
            tokens = image if token_scale is None else dequantise_tokens(image, token_scale, queries.dtype)
            keys_values = form_keys_values(tokens, [weights])[0]
        mixed = attend_formed(query, keys_values, heads, dropout_p, seed)
    else:
        use_triton = _use_triton(shape, queries, impl)
        mixed = attend_latents(
            query, image, weights.key, weights.value, weights.value_bias, heads, dropout_p, seed, use_triton, token_scale
        )  # fmt: skip
    return F.linear(mixed, weights.output, weights.output_bias)


def reference_qformer_attention(
    queries: Tensor, image: Tensor, weights: CrossWeights, heads: int, *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    token_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`qformer_attention` with K, V and the probabilities formed, in torch: the definition.  Arguments as there; dropout needs a seed."""
    if token_scale is not None:
        image = dequantise_tokens(image, token_scale, queries.dtype)
    query, key, value = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in (
            (queries, weights.query, weights.query_bias),
            (image, weights.key, weights.key_bias),
            (image, weights.value, weights.value_bias),
        )
    )
    mixed = attend_with_mask(query, key, value, dropout_p, seed)
    return F.linear(mixed.transpose(1, 2).flatten(2), weights.output, weights.output_bias)


def qformer_attention_unsupported_reason(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the latents form's kernels cannot run; None where they can."""
    if dtype not in DTYPES:
        return f"the kernels take bfloat16, float16 and float32, got {dtype}"
    if shape.keys > MAX_KEYS:
        return f"{shape.keys} image tokens: the kernels hold at most {MAX_KEYS} on chip"
    if shape.batch * shape.queries * shape.heads >= 1 << 32:
        return "the mask's positions are 32 bits wide, and there are 2^32 rows or more"
    if shape.batch > 65535:
        return f"{shape.batch} images: the kernels' grid holds at most 65535"
    return triton_unsupported_reason(device)


FLOPS_PER_BYTE = 200  # of a GPU: matmul rate over copy bandwidth, 790 TFLOP/s over about 4 TB/s on an H200
TRITON_SHARE = 0.75  # of cuBLAS' rate, assumed for a Triton kernel of this kind; not measured


def choose_form(
    shape: AttentionShape, *, gradients: bool, image_gradient: bool, device: str = "cuda", margin: float = 0.9
) -> Form:
    """The form with the lower modelled cost; latents only where below `margin` of formed's, because the model leaves launches out.

    gradients: of queries and weights; image_gradient: of E.  device: "cpu" (bytes count nothing there) or a GPU's kind.
    """
    if device != "cpu" and shape.keys > MAX_KEYS:
        return "formed"  # no kernel to win with
    balance, share = (0, 1) if device == "cpu" else (FLOPS_PER_BYTE, TRITON_SHARE)
    formed, latents = (form_cost(shape, f, gradients, image_gradient, balance, share) for f in ("formed", "latents"))
    return "latents" if latents < margin * formed else "formed"


def form_cost(
    shape: AttentionShape,
    form: Form,
    gradients: bool,
    image_gradient: bool,
    flops_per_byte: float,
    triton_share: float = 1.0,
) -> float:
    """Modelled cost of a form in FLOPs: the sum over its steps of the larger of FLOPs and 16-bit bytes times `flops_per_byte`.

    Without W_q and W_o, which both forms share.  triton_share: the Triton kernels' rate as a share of the other products'.
    """
    b, rows = shape.batch, shape.queries * shape.heads

    def step(flops: float, elements: float, share: float = 1.0) -> float:
        return max(flops / share, 2 * elements * flops_per_byte)

    tokens, folded = b * shape.keys * shape.width, b * rows * shape.width
    pairs, formed = b * rows * shape.keys, b * shape.keys * 2 * shape.hidden
    if form == "formed":
        product, attention = 2 * tokens * 2 * shape.hidden, 2 * pairs * 2 * shape.hidden // shape.heads
        cost = step(product, tokens + formed) + step(attention, formed)
        if gradients or image_gradient:
            cost += step(2.5 * attention, 2 * formed)
        return cost + (gradients + image_gradient) * step(product, tokens + formed)
    fold = step(2 * b * shape.queries * shape.hidden * shape.width, folded)
    kernel = step(4 * pairs * shape.width, 2 * folded + tokens + pairs, triton_share)
    cost = 2 * fold + kernel
    if gradients or image_gradient:
        cost += fold + kernel
    if gradients:
        cost += 3 * fold
    if image_gradient:
        cost += fold + step(4 * pairs * shape.width, 2 * folded + tokens + 2 * pairs)
    return cost


def _default_form(
    shape: AttentionShape, queries: Tensor, image: Tensor, weights: CrossWeights, keys_values: object, impl: str | None
) -> Form:
    if keys_values is not None:
        return "formed"
    if impl is not None:
        return "latents"
    records = torch.is_grad_enabled()
    return choose_form(
        shape,
        gradients=records and any(t is not None and t.requires_grad for t in (queries, *weights)),
        image_gradient=records and image.requires_grad,
        device=image.device.type,
    )


def _use_triton(shape: AttentionShape, queries: Tensor, impl: str | None) -> bool:
    if impl == "reference":
        return False
    reason = qformer_attention_unsupported_reason(shape, queries.dtype, queries.device)
    if impl == "triton" and reason is not None:
        raise RuntimeError(f"qformer_attention: impl='triton' cannot run here: {reason}")
    if reason is not None:
        log_fallback_once("qformer_attention (latents)", reason)
    return reason is None


class _WithoutEffect(torch.autograd.Function):
    """K's bias: its gradient is zero, not None, so that optimisers and gradient exchange treat it as any other parameter's."""

    @staticmethod
    def forward(ctx, query, bias):
        ctx.like = bias.shape, bias.dtype, bias.device
        return query.view_as(query)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def _check_options(dropout_p: float, seed: object, keys_values: object, form: object, impl: object) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"qformer_attention: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.ndim):
        raise ValueError(
            f"qformer_attention: seed is {seed.dtype} {tuple(seed.shape)}, expected an int or an int64 tensor of no dimension"
        )
    if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"qformer_attention: seed is {seed}, expected 64 bits: -2^63 to 2^63 - 1")
    if form not in (None, "formed", "latents"):
        raise ValueError(f"qformer_attention: form is {form!r}, expected None, 'formed' or 'latents'")
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"qformer_attention: impl is {impl!r}, expected None, 'reference' or 'triton'")
    if form == "latents" and keys_values is not None:
        raise ValueError(
            "qformer_attention: keys_values are given, which the form 'latents' has no use for; leave out one"
        )
    if impl == "triton" and (form == "formed" or keys_values is not None):
        raise ValueError(
            "qformer_attention: impl='triton' has kernels for the latents form only; leave out impl, keys_values or form='formed'"
        )


def _checked(
    queries: Tensor, image: Tensor, weights: CrossWeights, heads: int, keys_values: tuple[Tensor, Tensor] | None,
    token_scale: Tensor | None,
) -> AttentionShape:  # fmt: skip
    if queries.ndim != 3 or image.ndim != 3 or queries.shape[0] != image.shape[0] or not image.shape[1]:
        raise ValueError(
            f"qformer_attention: expected queries (B, Q, D) and image (B, N, W) with at least one token, got {tuple(queries.shape)} and "
            f"{tuple(image.shape)}"
        )
    (batch, count, hidden), (_, keys, width) = queries.shape, image.shape
    if heads < 1 or hidden % heads:
        raise ValueError(f"qformer_attention: heads is {heads}, expected a divisor of the hidden width {hidden}")
    square, wide, bias = (hidden, hidden), (hidden, width), (hidden,)
    expected = {"image": None} | dict(
        zip(CrossWeights._fields, (square, bias, wide, bias, wide, bias, square, bias), strict=True)
    )
    tensors = {"image": image} | weights._asdict()
    if keys_values is not None:
        tensors |= {"keys_values[0]": keys_values[0], "keys_values[1]": keys_values[1]}
        expected |= dict.fromkeys(("keys_values[0]", "keys_values[1]"), (batch, keys, hidden))
    if token_scale is not None:
        _check_token_scale(image, token_scale)
    elif image.dtype == torch.float8_e4m3fn:
        raise TypeError(
            "qformer_attention: image is torch.float8_e4m3fn, which means nothing without its token_scale; give both"
        )
    if not queries.is_floating_point():
        raise TypeError(f"qformer_attention: queries are {queries.dtype}, expected a floating dtype")
    for name, tensor in tensors.items():
        if tensor is None and name.endswith("_bias"):
            continue
        wanted = expected[name]
        if wanted is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"qformer_attention: {name} has shape {tuple(tensor.shape)}, expected {wanted}")
        if tensor.dtype != queries.dtype and (tensor is not image or token_scale is None):
            raise TypeError(
                f"qformer_attention: {name} is {tensor.dtype}, expected {queries.dtype} as the queries; convert one of them or use autocast"
            )
        if tensor.device != queries.device:
            raise ValueError(
                f"qformer_attention: {name} is on {tensor.device}, expected {queries.device} as the queries; move one of them"
            )
    return AttentionShape(batch, count, keys, width, hidden, heads)


def _check_token_scale(image: Tensor, scale: Tensor) -> None:
    if image.dtype != torch.float8_e4m3fn or image.requires_grad:
        raise TypeError(
            f"qformer_attention: image is {image.dtype}{' and needs a gradient' if image.requires_grad else ''}, expected "
            "torch.float8_e4m3fn without one beside token_scale; leave out token_scale"
        )
    if scale.dtype != torch.float32 or scale.shape != image.shape[:2] or scale.device != image.device:
        raise ValueError(
            f"qformer_attention: token_scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}, expected torch.float32 "
            f"{tuple(image.shape[:2])} on {image.device}, one for each image token"
        )
