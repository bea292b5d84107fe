"""Triton kernels of `qformer_attention`'s latents form: scores, what lies between, and the mix, for one block of an image's query rows.

Rows R of an image are its (query, head) pairs, query slowest.  Both kernels have one shape: X (R, W) times the image tokens E (N, W) gives a
block of R x N that stays on chip; an elementwise middle turns it into T; T times E, block by block of the width, is written as (R, W).
Forward: X = folded queries, T = dropped softmax.  Backward: X = folded gradient of the output, T = gradient of the scores.

The N columns are held in three pieces, HALF + HALF (where SECOND) + at most 16 (where TAIL): 257 is 128 + 128 + 1, because another tile of 128
for one key would waste a fifth.  Two halves and not one piece of 256, so that the middle can work on one while the other waits in registers:
in one piece the backward spilled 1.9 kB a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase
from .qformer_latents import key_split, launch_config


@triton.jit
def _tokens(
    image_ptr, token_scale_ptr, keys, width, start,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """E's rows from FIRST and columns from `start`, zero beyond the edges: [COUNT, BLOCK].  SCALED: made from e4m3 (or its bits)."""
    rows, columns = FIRST + tl.arange(0, COUNT), start + tl.arange(0, BLOCK)
    inside = (rows < keys)[:, None] & (columns < width)[None, :]
    tokens = tl.load(image_ptr + rows[:, None] * width + columns[None, :], inside, 0.0)
    if SCALED:
        if tokens.dtype == tl.uint8:
            # e4m3's exponent and mantissa in float16's places are the value / 256, its subnormals too: architecture 80 has no e4m3.
            bits = tokens.to(tl.uint16)
            half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
            wide = half.to(tl.float32) * 256.0
        else:
            wide = tokens.to(tl.float32)
        # Scaled here and not in the scores: there each thread held 32 scales a piece, and the backward spilled 3 kB.
        tokens = (wide * tl.load(token_scale_ptr + rows, rows < keys, 0.0)[:, None]).to(dtype)
    return tokens


@triton.jit
def _scores(
    x_ptr, image_ptr, token_scale_ptr, rows, row_inside, keys, width,
    HALF: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X E^T for one block of rows in float32: [rows, HALF], [rows, HALF], [rows, 16]; zeros where a piece is not there."""
    first = tl.zeros([rows.shape[0], HALF], tl.float32)
    second = tl.zeros([rows.shape[0], HALF], tl.float32)
    tail = tl.zeros([rows.shape[0], 16], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x_inside = row_inside[:, None] & (columns < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * width + columns[None, :], x_inside, 0.0)  # [rows, BLOCK]
        e = _tokens(image_ptr, token_scale_ptr, keys, width, start, 0, HALF, BLOCK, SCALED, x.dtype)
        first = tl.dot(x, tl.trans(e), first, input_precision=PRECISION)
        if SECOND:
            e = _tokens(image_ptr, token_scale_ptr, keys, width, start, HALF, HALF, BLOCK, SCALED, x.dtype)
            second = tl.dot(x, tl.trans(e), second, input_precision=PRECISION)
        if TAIL:
            e = _tokens(
                image_ptr, token_scale_ptr, keys, width, start, HALF + SECOND * HALF, 16, BLOCK, SCALED, x.dtype
            )
            tail = tl.dot(x, tl.trans(e), tail, input_precision=PRECISION)
    return first, second, tail


@triton.jit
def _mix(
    first, second, tail, image_ptr, token_scale_ptr, out_ptr, rows, row_inside, keys, width,
    HALF: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write T E for one block of rows; the pieces of T in the dtype of the product."""
    for start in range(0, width, BLOCK):
        e = _tokens(image_ptr, token_scale_ptr, keys, width, start, 0, HALF, BLOCK, SCALED, first.dtype)
        mixed = tl.dot(first, e, input_precision=PRECISION)  # [rows, BLOCK]
        if SECOND:
            e = _tokens(image_ptr, token_scale_ptr, keys, width, start, HALF, HALF, BLOCK, SCALED, first.dtype)
            mixed = tl.dot(second, e, mixed, input_precision=PRECISION)
        if TAIL:
            e = _tokens(
                image_ptr, token_scale_ptr, keys, width, start, HALF + SECOND * HALF, 16, BLOCK, SCALED, first.dtype
            )
            mixed = tl.dot(tail, e, mixed, input_precision=PRECISION)
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        tl.store(out_ptr + rows[:, None] * width + columns[None, :], mixed.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _scaled(scores, scale, keys, FIRST: tl.constexpr):
    columns = FIRST + tl.arange(0, scores.shape[1])
    return tl.where((columns < keys)[None, :], scores * scale, float("-inf"))


@triton.jit
def _keep(seed, positions, threshold, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Which probabilities dropout keeps, [rows, COUNT] from key FIRST on: one Philox call gives the 16-bit numbers of 8 keys."""
    groups = FIRST // 8 + tl.arange(0, COUNT // 8)
    zeros = (positions[:, None] * 0 + groups[None, :] * 0).to(tl.uint32)
    counters, rows = groups[None, :].to(tl.uint32) + zeros, positions[:, None] + zeros
    a, b, c, d = tl.philox(seed, counters, rows, zeros, zeros)
    low = tl.join(
        tl.join((a & 0xFFFF) >= threshold, (b & 0xFFFF) >= threshold),
        tl.join((c & 0xFFFF) >= threshold, (d & 0xFFFF) >= threshold),
    )
    high = tl.join(
        tl.join((a >> 16) >= threshold, (b >> 16) >= threshold), tl.join((c >> 16) >= threshold, (d >> 16) >= threshold)
    )
    return tl.reshape(tl.join(low, high), [positions.shape[0], COUNT])


@triton.jit
def _store_signs(seed, positions, threshold, ptr, rows, row_inside, stride, FIRST: tl.constexpr, COUNT: tl.constexpr):
    signs = tl.where(_keep(seed, positions, threshold, FIRST, COUNT), 1.0, -1.0)
    _store_piece(ptr, signs, rows, row_inside, stride, FIRST)


@triton.jit
def _forward_piece(
    scores, highest, total, keep_scale, saved_ptr, rows, row_inside, stride,
    FIRST: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scaled scores -> (probabilities as they are mixed, their row sums); saves them undropped, negative where dropped."""
    probabilities = tl.exp2(scores - highest[:, None]) / total[:, None]
    sums = total
    signed = probabilities
    if DROPOUT:
        signs = _load_piece(saved_ptr, rows, row_inside, stride, FIRST, scores.shape[1])
        signed = probabilities * signs
        probabilities = tl.where(signs > 0, probabilities * keep_scale, 0.0)
        sums = tl.sum(probabilities, 1)
    if SAVE:
        _store_piece(saved_ptr, signed, rows, row_inside, stride, FIRST)
    return probabilities.to(dtype), sums


@triton.jit
def _load_piece(ptr, rows, row_inside, stride, FIRST: tl.constexpr, COUNT: tl.constexpr):
    columns = FIRST + tl.arange(0, COUNT)
    inside = row_inside[:, None] & (columns < stride)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _store_piece(ptr, values, rows, row_inside, stride, FIRST: tl.constexpr):
    columns = FIRST + tl.arange(0, values.shape[1])
    inside = row_inside[:, None] & (columns < stride)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], values.to(ptr.dtype.element_ty), inside)


@triton.jit
def latent_forward_kernel(
    folded_ptr, image_ptr, token_scale_ptr, mixed_ptr, probabilities_ptr, sums_ptr, seed_ptr,
    rows_per_image, keys, width, probability_stride, scale_log2, threshold, keep_scale,
    BLOCK_ROWS: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr, BLOCK_SCORES: tl.constexpr,
    BLOCK_MIX: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mixed = dropout(softmax(folded E^T)) E, and the probabilities for the backward.

    folded, mixed (B, R, W), image (B, N, W), probabilities (B, R, stride), sums (B, R) float32: row sums of what is mixed.
    SCALED: image is e4m3 (or its bits), and a token of E is its row times its token_scale (B, N) float32.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < rows_per_image
    image = tl.program_id(1).to(tl.int64)
    first_row = image * rows_per_image
    image_ptr += image * keys * width
    token_scale_ptr += image * keys
    dtype: tl.constexpr = folded_ptr.dtype.element_ty
    LAST: tl.constexpr = HALF + SECOND * HALF
    saved_ptr = probabilities_ptr + first_row * probability_stride
    if DROPOUT:
        # The mask waits in the probabilities' place as signs: drawn between the products it spilled 1.6 kB a thread.
        seed, positions = tl.load(seed_ptr), (first_row + rows).to(tl.uint32)
        _store_signs(seed, positions, threshold, saved_ptr, rows, row_inside, probability_stride, 0, HALF)
        if SECOND:
            _store_signs(seed, positions, threshold, saved_ptr, rows, row_inside, probability_stride, HALF, HALF)
        if TAIL:
            _store_signs(seed, positions, threshold, saved_ptr, rows, row_inside, probability_stride, LAST, 16)
        tl.debug_barrier()  # the block's other threads read them
    first, second, tail = _scores(
        folded_ptr + first_row * width, image_ptr, token_scale_ptr, rows, row_inside, keys, width,
        HALF, SECOND, TAIL, BLOCK_SCORES, SCALED, PRECISION,
    )  # fmt: skip
    first = _scaled(first, scale_log2, keys, 0)
    highest = tl.max(first, 1)
    if SECOND:
        second = _scaled(second, scale_log2, keys, HALF)
        highest = tl.maximum(highest, tl.max(second, 1))
    if TAIL:
        tail = _scaled(tail, scale_log2, keys, LAST)
        highest = tl.maximum(highest, tl.max(tail, 1))
    total = tl.sum(tl.exp2(first - highest[:, None]), 1)
    if SECOND:
        total += tl.sum(tl.exp2(second - highest[:, None]), 1)
    if TAIL:
        total += tl.sum(tl.exp2(tail - highest[:, None]), 1)
    first, sums = _forward_piece(
        first, highest, total, keep_scale, saved_ptr, rows, row_inside, probability_stride,
        0, DROPOUT, SAVE, dtype,
    )  # fmt: skip
    second, tail_sums = _forward_piece(
        second, highest, total, keep_scale, saved_ptr, rows, row_inside, probability_stride,
        HALF, DROPOUT and SECOND, SAVE and SECOND, dtype,
    )  # fmt: skip
    if SECOND:
        sums += tail_sums
    tail, tail_sums = _forward_piece(
        tail, highest, total, keep_scale, saved_ptr, rows, row_inside, probability_stride,
        LAST, DROPOUT and TAIL, SAVE and TAIL, dtype,
    )  # fmt: skip
    if TAIL:
        sums += tail_sums
    if DROPOUT:
        tl.store(sums_ptr + first_row + rows, sums, row_inside)
    _mix(
        first, second, tail, image_ptr, token_scale_ptr, mixed_ptr + first_row * width, rows, row_inside, keys, width,
        HALF, SECOND, TAIL, BLOCK_MIX, SCALED, PRECISION,
    )  # fmt: skip


@triton.jit
def _weighted_sums(grad, saved_ptr, rows, row_inside, stride, keep_scale, FIRST: tl.constexpr, DROPOUT: tl.constexpr):
    saved = _load_piece(saved_ptr, rows, row_inside, stride, FIRST, grad.shape[1])
    if DROPOUT:
        saved = tl.maximum(saved, 0.0) * keep_scale
    return tl.sum(saved * grad, 1)


@triton.jit
def _backward_piece(
    grad, weighted, saved_ptr, out_ptr, rows, row_inside, stride, scale, keep_scale,
    FIRST: tl.constexpr, DROPOUT: tl.constexpr, SCORES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Gradient of the dropped probabilities -> gradient of the scores, stored too where SCORES."""
    saved = _load_piece(saved_ptr, rows, row_inside, stride, FIRST, grad.shape[1])
    if DROPOUT:
        grad = tl.where(saved > 0, grad * keep_scale, 0.0)
        saved = tl.abs(saved)
    grad = (saved * (grad - weighted[:, None]) * scale).to(dtype)
    if SCORES:
        _store_piece(out_ptr, grad, rows, row_inside, stride, FIRST)
    return grad


@triton.jit
def latent_backward_kernel(
    grad_ptr, image_ptr, token_scale_ptr, probabilities_ptr, shift_ptr, grad_folded_ptr, grad_scores_ptr,
    rows_per_image, keys, width, probability_stride, scale, keep_scale,
    BLOCK_ROWS: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, TAIL: tl.constexpr, BLOCK_SCORES: tl.constexpr,
    BLOCK_MIX: tl.constexpr, DROPOUT: tl.constexpr, SHIFT: tl.constexpr, FOLDED: tl.constexpr, SCORES: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_folded = dS E with dS = scale * P (keep * dP - rowsum(P keep dP) / rowsum(P)), dP = grad E^T + shift.

    grad, grad_folded (B, R, W), image (B, N, W), probabilities and grad_scores (B, R, stride), shift (B, R) float32: the part of dP that
    V's bias gives, which cancels without dropout.  SCALED: as in the forward.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < rows_per_image
    image = tl.program_id(1).to(tl.int64)
    first_row = image * rows_per_image
    image_ptr += image * keys * width
    token_scale_ptr += image * keys
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    LAST: tl.constexpr = HALF + SECOND * HALF
    saved_ptr = probabilities_ptr + first_row * probability_stride
    # Rounded probabilities do not sum to 1; divided by their sum, a row of dS sums to zero as it must.
    total = tl.sum(tl.abs(_load_piece(saved_ptr, rows, row_inside, probability_stride, 0, HALF)), 1)
    if SECOND:
        total += tl.sum(tl.abs(_load_piece(saved_ptr, rows, row_inside, probability_stride, HALF, HALF)), 1)
    if TAIL:
        total += tl.sum(tl.abs(_load_piece(saved_ptr, rows, row_inside, probability_stride, LAST, 16)), 1)
    total = tl.where(row_inside, total, 1.0)
    tl.debug_barrier()  # or the compiler keeps what was loaded, in registers that are not there
    first, second, tail = _scores(
        grad_ptr + first_row * width, image_ptr, token_scale_ptr, rows, row_inside, keys, width,
        HALF, SECOND, TAIL, BLOCK_SCORES, SCALED, PRECISION,
    )  # fmt: skip
    if SHIFT:
        shift = tl.load(shift_ptr + first_row + rows, row_inside, 0.0)[:, None]
        first, second, tail = first + shift, second + shift, tail + shift
    out_ptr = grad_scores_ptr + first_row * probability_stride
    weighted = _weighted_sums(first, saved_ptr, rows, row_inside, probability_stride, keep_scale, 0, DROPOUT)
    if SECOND:
        weighted += _weighted_sums(second, saved_ptr, rows, row_inside, probability_stride, keep_scale, HALF, DROPOUT)
    if TAIL:
        weighted += _weighted_sums(tail, saved_ptr, rows, row_inside, probability_stride, keep_scale, LAST, DROPOUT)
    weighted /= total
    tl.debug_barrier()
    first = _backward_piece(
        first, weighted, saved_ptr, out_ptr, rows, row_inside, probability_stride, scale, keep_scale, 0, DROPOUT, SCORES, dtype
    )  # fmt: skip
    second = _backward_piece(
        second, weighted, saved_ptr, out_ptr, rows, row_inside, probability_stride, scale, keep_scale,
        HALF, DROPOUT, SCORES and SECOND, dtype,
    )  # fmt: skip
    tail = _backward_piece(
        tail, weighted, saved_ptr, out_ptr, rows, row_inside, probability_stride, scale, keep_scale,
        LAST, DROPOUT, SCORES and TAIL, dtype,
    )  # fmt: skip
    if FOLDED:
        _mix(
            first, second, tail, image_ptr, token_scale_ptr, grad_folded_ptr + first_row * width, rows, row_inside, keys, width,
            HALF, SECOND, TAIL, BLOCK_MIX, SCALED, PRECISION,
        )  # fmt: skip


def compile_cases(architecture: int) -> list[CompileCase]:
    """Both kernels at the real sizes (384 rows, 257 tokens of width 1408) in bf16, and with tokens in e4m3 (architecture 80: their bits);
    for sm_90 with dropout and dE, for sm_80 without, and e4m3 forward only (time)."""
    import torch

    half, second, tail = key_split(257)
    settings = launch_config(torch.bfloat16, architecture)
    names = "rows_per_image", "keys", "width", "probability_stride", "threshold"
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("scale_log2", "scale", "keep_scale"), "fp32")
    for stem in ("folded", "image", "mixed", "probabilities", "grad", "grad_folded", "grad_scores"):
        types[f"{stem}_ptr"] = "*bf16"
    types |= {"sums_ptr": "*fp32", "shift_ptr": "*fp32", "token_scale_ptr": "*fp32", "seed_ptr": "*i64"}
    sizes = {
        "BLOCK_ROWS": settings.block_rows, "HALF": half, "SECOND": second, "TAIL": tail, "BLOCK_SCORES": settings.block_scores,
        "BLOCK_MIX": settings.block_mix, "PRECISION": "ieee",
    }  # fmt: skip
    options = {"num_warps": settings.warps, "num_stages": settings.stages}
    hopper = architecture >= 90
    multiples = ("rows_per_image", "width", "probability_stride")
    found = []
    for suffix, scaled in (("", False), (", e4m3", True)):
        tokens = {"image_ptr": "*fp8e4nv" if hopper else "*u8"} if scaled else {}
        for name, kernel, more in (
            ("forward", latent_forward_kernel, {"SAVE": True}),
            ("backward", latent_backward_kernel, {"SHIFT": hopper, "FOLDED": True, "SCORES": hopper and not scaled}),
        ):
            if scaled and not hopper and name == "backward":
                continue
            flags = {"DROPOUT": hopper, "SCALED": scaled}
            found.append(CompileCase(name + suffix, kernel, types | tokens, sizes | flags | more, multiples, options))
    return found
