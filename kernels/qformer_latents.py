"""The latents side of `qformer_attention`: fold, the kernels between (or their torch equivalents), unfold, and the gradients.

Shapes: B images, Q queries, N image tokens of width W, D hidden width, H heads of d = D / H, R = Q H rows of an image, query slowest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import dropout_keep, dropout_threshold, seed_tensor
from .qformer_formed import dequantise_tokens
from .triton_support import architecture

TAIL_KEYS = 16  # the narrowest side of a product
MAX_KEYS = 256 + TAIL_KEYS  # what a block of rows holds on chip


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of a block, width of a step of the scores and of the mix, warps, pipeline stages."""

    block_rows: int
    block_scores: int
    block_mix: int
    warps: int
    stages: int


def launch_config(dtype: torch.dtype, architecture: int) -> LaunchConfig:
    """Settings by dtype and architecture (80 or 90), for up to 272 keys."""
    if dtype == torch.float32:
        # Products on the ordinary units, so small blocks: a step's tile of E alone is 272 x 16 x 4 = 17 KiB.
        return LaunchConfig(32, 16, 16, 8, 2)
    if architecture >= 90:
        # 384 rows are 3 blocks; scores 128 x 256 fp32 over 256 threads are 128 registers each; a step is
        # (128 + 272) x 64 x 2 = 50 KiB.  The mix takes 32 columns: with 64 the backward's registers spill 440 bytes, so 56.  What spills does so
        # between the loops.  64 rows spill next to nothing, but fetch E from L2 twice as often: 10.9 MB an image against 6.5, 1.7 times the time.
        return LaunchConfig(128, 64, 32, 8, 3)
    # mma.sync keeps operands in registers beside the scores, so 64 rows; a step is (64 + 272) x 16 x 2 = 11 KiB.  With steps of 32 both kernels
    # spilled, 72 and 176 bytes.
    return LaunchConfig(64, 16, 32, 8, 3)


def key_split(keys: int) -> tuple[int, bool, bool]:
    """(HALF, SECOND, TAIL): `keys` fit HALF columns, HALF more where SECOND, 16 more where TAIL; HALF a power of two from 16 to 128."""
    splits = [(half, second, tail) for half in (16, 32, 64, 128) for second in (False, True) for tail in (False, True)]
    fitting = [s for s in splits if keys <= s[0] * (1 + s[1]) + TAIL_KEYS * s[2]]
    return min(fitting, key=lambda s: (s[0] * (1 + s[1]) + TAIL_KEYS * s[2], s[1], s[2]))


def padded_keys(keys: int) -> int:
    """Row stride of saved probabilities, a multiple of 16: at 264 for 257 keys the kernels' loads were one element wide."""
    return -(-keys // 16) * 16


def attend_latents(
    query: Tensor, image: Tensor, key: Tensor, value: Tensor, value_bias: Tensor | None, heads: int, dropout_p: float,
    seed: int | Tensor | None, use_triton: bool, token_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query (B, Q, D) after W_q, image (B, N, W), key and value (D, W), value_bias (D,) -> (B, Q, D) before W_o.

    token_scale (B, N) float32: image is e4m3, and each token is its row times its scale.
    """
    seed = seed_tensor(seed, image.device) if dropout_p else None
    saves = torch.is_grad_enabled()
    return _Latents.apply(query, image, key, value, value_bias, seed, token_scale, heads, dropout_p, use_triton, saves)


class _Latents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, image, key, value, value_bias, seed, token_scale, heads, dropout_p, use_triton, saves):
        query, image, key, value = (t.contiguous() for t in (query, image, key, value))
        needs_query, needs_image, needs_key, needs_value, needs_bias = ctx.needs_input_grad[:5]
        scores_matter = needs_query or needs_image or needs_key
        ctx.heads, ctx.dropout_p, ctx.use_triton = heads, dropout_p, use_triton
        mix = mix_forward if use_triton else torch_mix_forward
        scale = (query.shape[-1] // heads) ** -0.5
        mixed, probabilities, sums = mix(
            fold(query, key, heads), image, token_scale, seed, scale, dropout_p, saves and scores_matter
        )
        out = unfold(mixed, value, heads)
        if value_bias is not None:
            out += value_bias if not dropout_p else _per_head(sums, value_bias, heads)
        ctx.save_for_backward(
            query if needs_key or needs_image else None,
            image if scores_matter else None,
            key if needs_query or needs_image else None,
            value if scores_matter else None,
            value_bias if scores_matter and dropout_p else None,
            probabilities if scores_matter else None,
            mixed if needs_value else None,
            sums if needs_bias and dropout_p else None,
            token_scale if scores_matter else None,
        )
        return out

    @staticmethod
    def backward(ctx, grad):
        query, image, key, value, value_bias, probabilities, mixed, sums, token_scale = ctx.saved_tensors
        needs_query, needs_image, needs_key, needs_value, needs_bias = ctx.needs_input_grad[:5]
        heads, grad = ctx.heads, grad.contiguous()
        grad_query = grad_image = grad_key = grad_value = grad_bias = None
        if needs_value:
            grad_value = _weight_gradient(grad, mixed, heads)
        if needs_bias:
            weighted = grad if sums is None else grad.unflatten(-1, (heads, -1)) * sums[..., None]
            grad_bias = weighted.flatten(0, 1).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).flatten()
            grad_bias = grad_bias.to(grad.dtype)
        if probabilities is not None:
            grad_mixed = fold(grad, value, heads)
            shift = None
            if value_bias is not None:
                shift = (grad * value_bias).unflatten(-1, (heads, -1)).sum(-1, dtype=sums_dtype(grad.dtype))
            mix = mix_backward if ctx.use_triton else torch_mix_backward
            scale = (grad.shape[-1] // heads) ** -0.5
            grad_folded, grad_scores = mix(
                grad_mixed, image, token_scale, probabilities, shift, scale, ctx.dropout_p, needs_query or needs_key, needs_image
            )  # fmt: skip
            if needs_query:
                grad_query = unfold(grad_folded, key, heads)
            if needs_key:
                grad_key = _weight_gradient(query, grad_folded, heads)
            if needs_image:
                kept = probabilities
                if ctx.dropout_p:
                    kept = kept.clamp_min(0) * dropout_threshold(ctx.dropout_p)[1]
                keys = image.shape[1]
                grad_image = kept.mT[:, :keys] @ grad_mixed.flatten(1, 2)
                grad_image.baddbmm_(grad_scores.mT[:, :keys], fold(query, key, heads).flatten(1, 2))
        return grad_query, grad_image, grad_key, grad_value, grad_bias, None, None, None, None, None, None


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _per_head(sums: Tensor, bias: Tensor, heads: int) -> Tensor:
    return (sums[..., None] * bias.view(heads, -1)).flatten(2).to(bias.dtype)


def _weight_gradient(narrow: Tensor, wide: Tensor, heads: int) -> Tensor:
    """narrow (B, Q, D), wide (B, Q, H, W) -> (D, W): the gradient of a weight that folds or unfolds, a product a head."""
    by_head = narrow.flatten(0, 1).unflatten(-1, (heads, -1)).permute(1, 2, 0)
    return torch.bmm(by_head, wide.flatten(0, 1).transpose(0, 1)).flatten(0, 1)


def unfold(wide: Tensor, weight: Tensor, heads: int) -> Tensor:
    """wide (B, Q, H, W), weight (D, W) -> (B, Q, D): each head times its rows of the weight."""
    out = torch.bmm(wide.flatten(0, 1).transpose(0, 1), weight.unflatten(0, (heads, -1)).mT)
    return out.transpose(0, 1).reshape(*wide.shape[:2], weight.shape[0])


@torch.library.custom_op("vpgtrans::qformer_fold", mutates_args=())
def fold(narrow: Tensor, weight: Tensor, heads: int) -> Tensor:
    """narrow (B, Q, D), weight (D, W) -> (B, Q, H, W): a product a head, written where the rows of an image lie together."""
    batch, queries, hidden = narrow.shape
    out = narrow.new_empty(batch, queries, heads, weight.shape[1])
    by_head = narrow.reshape(-1, heads, hidden // heads).transpose(0, 1)
    torch.bmm(by_head, weight.view(heads, -1, weight.shape[1]), out=out.flatten(0, 1).transpose(0, 1))
    return out


@fold.register_fake
def _(narrow, weight, heads):
    return narrow.new_empty(*narrow.shape[:2], heads, weight.shape[1])


def torch_mix_forward(folded, image, token_scale, seed, scale, dropout_p, save):
    """`mix_forward` in torch: the same products by cuBLAS or the CPU's BLAS, scores and probabilities through memory."""
    if token_scale is not None:
        image = dequantise_tokens(image, token_scale, folded.dtype)
    batch, queries, heads, _ = folded.shape
    keys = image.shape[1]
    rows = folded.flatten(1, 2)
    scores = torch.bmm(rows, image.mT) * scale
    dropped = probabilities = scores.softmax(-1, dtype=sums_dtype(scores.dtype)).to(scores.dtype)
    sums = rows.new_empty(0, dtype=sums_dtype(rows.dtype))
    if dropout_p:
        keep = dropout_keep(seed, dropout_p, batch, heads, queries, keys, image.device).transpose(1, 2).flatten(1, 2)
        dropped = probabilities * keep * dropout_threshold(dropout_p)[1]
        probabilities = torch.where(keep, probabilities, -probabilities)
        sums = dropped.sum(-1, dtype=sums.dtype).view(batch, queries, heads)
    return torch.bmm(dropped, image).view_as(folded), probabilities if save else None, sums


def torch_mix_backward(
    grad_mixed, image, token_scale, probabilities, shift, scale, dropout_p, want_folded, want_scores
):
    """`mix_backward` in torch."""
    if token_scale is not None:
        image = dequantise_tokens(image, token_scale, grad_mixed.dtype)
    wide = sums_dtype(image.dtype)
    grad_dropped = torch.bmm(grad_mixed.flatten(1, 2), image.mT)
    if dropout_p:
        if shift is not None:
            grad_dropped = grad_dropped + shift.flatten(1)[..., None].to(grad_dropped.dtype)
        grad_dropped = grad_dropped * (probabilities > 0) * dropout_threshold(dropout_p)[1]
        probabilities = probabilities.abs()
    # Rounded probabilities do not sum to 1; divided by their sum, a row of dS sums to zero as it must.
    mean = (grad_dropped * probabilities).sum(-1, keepdim=True, dtype=wide) / probabilities.sum(
        -1, keepdim=True, dtype=wide
    )
    grad_scores = (probabilities * (grad_dropped - mean) * scale).to(image.dtype)
    grad_folded = torch.bmm(grad_scores, image).view_as(grad_mixed) if want_folded else None
    return grad_folded, grad_scores if want_scores else None


@torch.library.custom_op("vpgtrans::qformer_mix_forward", mutates_args=())
def mix_forward(
    folded: Tensor, image: Tensor, token_scale: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """folded (B, Q, H, W), image (B, N, W), token_scale (B, N) or None -> P E (B, Q, H, W), P (B, R, padded N) or empty, row sums (B, Q, H)
    float32 or empty.

    scale: of the scores.  P is undropped and negative where dropped; its padding is not written.  Row sums only with dropout.
    """
    from .qformer_attention_triton import latent_forward_kernel

    mixed, probabilities, sums = _mix_forward_results(folded, image, dropout_p, save)
    batch, queries, heads, width = folded.shape
    rows, keys = queries * heads, image.shape[1]
    tokens, settings = _as_launched(image, folded.dtype)
    half, second, tail = key_split(keys)
    threshold, keep_scale = dropout_threshold(dropout_p)
    if folded.numel():
        latent_forward_kernel[(-(-rows // settings.block_rows), batch)](
            folded, tokens, mixed if token_scale is None else token_scale, mixed, probabilities if save or dropout_p else mixed,
            sums if dropout_p else mixed, seed if dropout_p else mixed,
            rows, keys, width, padded_keys(keys), scale * math.log2(math.e), threshold, keep_scale,
            BLOCK_ROWS=settings.block_rows, HALF=half, SECOND=second, TAIL=tail, BLOCK_SCORES=settings.block_scores, BLOCK_MIX=settings.block_mix,
            DROPOUT=dropout_p > 0, SAVE=save, SCALED=token_scale is not None, PRECISION="ieee", num_warps=settings.warps, num_stages=settings.stages,
        )  # fmt: skip
    return mixed, probabilities, sums


def _as_launched(image: Tensor, dtype: torch.dtype) -> tuple[Tensor, LaunchConfig]:
    """The tokens as the kernels take them, and settings for products in `dtype`: no e4m3 before Hopper, its bits as bytes instead."""
    generation = architecture(image.device)
    bits = generation < 90 and image.dtype == torch.float8_e4m3fn
    return image.view(torch.uint8) if bits else image, launch_config(dtype, generation)


def _mix_forward_results(folded, image, dropout_p, save):
    batch, queries, heads, _ = folded.shape
    probabilities = (
        (batch, queries * heads, padded_keys(image.shape[1])) if save or dropout_p else (0,)
    )  # dropout's kernel keeps its mask there
    sums = (batch, queries, heads) if dropout_p else (0,)
    return torch.empty_like(folded), folded.new_empty(probabilities), folded.new_empty(sums, dtype=torch.float32)


@mix_forward.register_fake
def _(folded, image, token_scale, seed, scale, dropout_p, save):
    return _mix_forward_results(folded, image, dropout_p, save)


@torch.library.custom_op("vpgtrans::qformer_mix_backward", mutates_args=())
def mix_backward(
    grad_mixed: Tensor, image: Tensor, token_scale: Tensor | None, probabilities: Tensor, shift: Tensor | None, scale: float,
    dropout_p: float, want_folded: bool, want_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_mixed (B, Q, H, W), `mix_forward`'s P, shift (B, Q, H) float32 or None -> gradients of folded and of the scores (B, R, padded N).

    shift: what V's bias adds to the probabilities' gradient, a constant a row.  Each result is empty where not wanted.
    """
    from .qformer_attention_triton import latent_backward_kernel

    grad_folded, grad_scores = _mix_backward_results(grad_mixed, probabilities, want_folded, want_scores)
    batch, queries, heads, width = grad_mixed.shape
    rows, keys = queries * heads, image.shape[1]
    tokens, settings = _as_launched(image, grad_mixed.dtype)
    half, second, tail = key_split(keys)
    if grad_mixed.numel():
        latent_backward_kernel[(-(-rows // settings.block_rows), batch)](
            grad_mixed, tokens, grad_mixed if token_scale is None else token_scale, probabilities,
            shift if shift is not None else grad_mixed, grad_folded if want_folded else grad_mixed,
            grad_scores if want_scores else grad_mixed, rows, keys, width, probabilities.shape[-1], scale, dropout_threshold(dropout_p)[1],
            BLOCK_ROWS=settings.block_rows, HALF=half, SECOND=second, TAIL=tail, BLOCK_SCORES=settings.block_scores, BLOCK_MIX=settings.block_mix,
            DROPOUT=dropout_p > 0, SHIFT=shift is not None, FOLDED=want_folded, SCORES=want_scores, SCALED=token_scale is not None, PRECISION="ieee",
            num_warps=settings.warps, num_stages=settings.stages,
        )  # fmt: skip
    return grad_folded, grad_scores


def _mix_backward_results(grad_mixed, probabilities, want_folded, want_scores):
    return (
        torch.empty_like(grad_mixed) if want_folded else grad_mixed.new_empty(0),
        torch.empty_like(probabilities) if want_scores else grad_mixed.new_empty(0),
    )


@mix_backward.register_fake
def _(grad_mixed, image, token_scale, probabilities, shift, scale, dropout_p, want_folded, want_scores):
    return _mix_backward_results(grad_mixed, probabilities, want_folded, want_scores)
