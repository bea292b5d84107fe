"""The Triton kernels of `prefix_attention` (prefix_attention.py), which launches them.

The query heads that share a key head are folded into the rows of a block: row m of the fold is token m // GROUP, head m % GROUP of its
group.  A block of 64 rows then spans 64 / GROUP tokens, so grouped queries visit fewer keys, read each key once a group, and the sum
over the group in the key gradients needs no second pass.

Scores, their maxima and `lse` stay unscaled: the difference to the maximum is exact where it matters, and is scaled once, to base 2.

Block shapes: R block of folded rows, K block of keys, D head size padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase


@triton.jit
def _query_spans(segments_ptr, token, inside, tokens):
    """What each row sees: keys in [prefix_start, prefix_stop) and in [caption_start, token]; nothing for rows outside."""
    at = segments_ptr + token * 4
    prefix_start = tl.load(at, mask=inside, other=tokens)
    prefix_stop = tl.minimum(tl.load(at + 1, mask=inside, other=0), token + 1)
    caption_start = tl.load(at + 2, mask=inside, other=tokens)
    return prefix_start, prefix_stop, caption_start


@triton.jit
def _key_blocks(prefix_start, prefix_stop, caption_start, token, tokens, BLOCK_KEYS: tl.constexpr):
    """The keys that any row of the block sees, as two ranges [far, far_stop) and [near, end), or one where that takes no more blocks."""
    end = tl.minimum(tl.max(token, 0) + 1, tokens)
    near = tl.minimum(tl.maximum(tl.min(caption_start, 0), 0), end)
    far = tl.minimum(tl.maximum(tl.min(prefix_start, 0), 0), near)
    far_stop = tl.minimum(tl.maximum(tl.max(prefix_stop, 0), far), end)
    # Ranges that overlap are never fewer blocks apart, so no key is met twice.
    apart = tl.cdiv(far_stop - far, BLOCK_KEYS) + tl.cdiv(end - near, BLOCK_KEYS)
    whole = tl.cdiv(end - far, BLOCK_KEYS)
    far_stop = tl.where(whole <= apart, end, far_stop)
    near = tl.where(whole <= apart, end, near)
    far_blocks = tl.cdiv(far_stop - far, BLOCK_KEYS)
    return far, far_stop, near, end, far_blocks, far_blocks + tl.cdiv(end - near, BLOCK_KEYS)


@triton.jit
def _visible(key, prefix_start, prefix_stop, caption_start, token):
    return ((key >= prefix_start) & (key < prefix_stop)) | ((key >= caption_start) & (key <= token))


@triton.jit
def _load(pointers, rows, columns, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block with zeros where `rows` is false and past the head size."""
    if HEAD_SIZE == BLOCK_D:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    return tl.load(pointers, mask=rows[:, None] & (columns < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _store(pointers, block, rows, columns, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    block = block.to(pointers.dtype.element_ty)
    if HEAD_SIZE == BLOCK_D:
        tl.store(pointers, block, mask=rows[:, None])
    else:
        tl.store(pointers, block, mask=rows[:, None] & (columns < HEAD_SIZE)[None, :])


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, out_ptr, lse_ptr, scale_log2, tokens, kv_heads,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    fold = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    inside = fold < tokens * GROUP
    token, head = fold // GROUP, kv_head * GROUP + fold % GROUP
    columns = tl.arange(0, BLOCK_D)
    prefix_start, prefix_stop, caption_start = _query_spans(segments_ptr + row * tokens * 4, token, inside, tokens)
    far, far_stop, near, end, far_blocks, blocks = _key_blocks(
        prefix_start, prefix_stop, caption_start, token, tokens, BLOCK_KEYS
    )
    q_at = q_ptr + row * q_row + (head * q_head + token * q_token)[:, None] + columns[None, :]
    q = _load(q_at, inside, columns, HEAD_SIZE, BLOCK_D)  # [R, D]
    k_ptr += row * k_row + kv_head * k_head
    v_ptr += row * v_row + kv_head * v_head

    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for block in range(0, blocks):
        in_far = block < far_blocks
        key = tl.where(in_far, far + block * BLOCK_KEYS, near + (block - far_blocks) * BLOCK_KEYS)
        key += tl.arange(0, BLOCK_KEYS)  # [K]
        wanted = key < tl.where(in_far, far_stop, end)
        k = _load(k_ptr + (key * k_token)[:, None] + columns[None, :], wanted, columns, HEAD_SIZE, BLOCK_D)  # [K, D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [R, K]
        seen = _visible(
            key[None, :], prefix_start[:, None], prefix_stop[:, None], caption_start[:, None], token[:, None]
        )
        scores = tl.where(seen & wanted[None, :], scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf minus -inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2((scores - base[:, None]) * scale_log2)  # [R, K]
        shrink = tl.exp2((largest - base) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr + (key * v_token)[:, None] + columns[None, :], wanted, columns, HEAD_SIZE, BLOCK_D)  # [K, D]
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = highest
    anything = total > 0.0
    total = tl.where(anything, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(anything, largest + tl.log2(total) / scale_log2, 0.0)
    # The output is (rows, tokens, heads, head size) in one piece.
    out_at = out_ptr + row * tokens * (kv_heads * GROUP * HEAD_SIZE)
    out_at += (token * (kv_heads * GROUP * HEAD_SIZE) + head * HEAD_SIZE)[:, None] + columns[None, :]
    _store(out_at, out, inside, columns, HEAD_SIZE, BLOCK_D)
    tl.store(lse_ptr + (row * kv_heads + kv_head) * tokens * GROUP + fold, lse, mask=inside)


@triton.jit
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, out_ptr, dout_ptr, lse_ptr, dq_ptr, delta_ptr, scale, scale_log2, tokens, kv_heads,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, dout_row, dout_head, dout_token,
    NEED_QUERY: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Writes delta, the row sums of dout * out that the key gradient needs too, and with NEED_QUERY the gradient of the queries."""
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    fold = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = fold < tokens * GROUP
    token, head = fold // GROUP, kv_head * GROUP + fold % GROUP
    columns = tl.arange(0, BLOCK_D)
    dense = (token * (kv_heads * GROUP * HEAD_SIZE) + head * HEAD_SIZE)[:, None] + columns[None, :]
    dense_row = row * tokens * (kv_heads * GROUP * HEAD_SIZE)
    dout_at = dout_ptr + row * dout_row + (head * dout_head + token * dout_token)[:, None] + columns[None, :]
    dout = _load(dout_at, inside, columns, HEAD_SIZE, BLOCK_D)  # [R, D]
    out = _load(out_ptr + dense_row + dense, inside, columns, HEAD_SIZE, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)  # [R]
    fold_row = (row * kv_heads + kv_head) * tokens * GROUP
    tl.store(delta_ptr + fold_row + fold, delta, mask=inside)
    if NEED_QUERY:
        prefix_start, prefix_stop, caption_start = _query_spans(segments_ptr + row * tokens * 4, token, inside, tokens)
        far, far_stop, near, end, far_blocks, blocks = _key_blocks(
            prefix_start, prefix_stop, caption_start, token, tokens, BLOCK_KEYS
        )
        q_at = q_ptr + row * q_row + (head * q_head + token * q_token)[:, None] + columns[None, :]
        q = _load(q_at, inside, columns, HEAD_SIZE, BLOCK_D)
        lse = tl.load(lse_ptr + fold_row + fold, mask=inside, other=0.0)
        k_ptr += row * k_row + kv_head * k_head
        v_ptr += row * v_row + kv_head * v_head
        dq = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        for block in range(0, blocks):
            in_far = block < far_blocks
            key = tl.where(in_far, far + block * BLOCK_KEYS, near + (block - far_blocks) * BLOCK_KEYS)
            key += tl.arange(0, BLOCK_KEYS)
            wanted = key < tl.where(in_far, far_stop, end)
            k = _load(k_ptr + (key * k_token)[:, None] + columns[None, :], wanted, columns, HEAD_SIZE, BLOCK_D)
            v = _load(v_ptr + (key * v_token)[:, None] + columns[None, :], wanted, columns, HEAD_SIZE, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [R, K]
            seen = _visible(
                key[None, :], prefix_start[:, None], prefix_stop[:, None], caption_start[:, None], token[:, None]
            )
            p = tl.where(seen & wanted[None, :], tl.exp2((scores - lse[:, None]) * scale_log2), 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        _store(dq_ptr + dense_row + dense, dq * scale, inside, columns, HEAD_SIZE, BLOCK_D)


@triton.jit
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, segments_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, scale_log2, tokens, kv_heads,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, dout_row, dout_head, dout_token,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys against the rows that see it: from its own first token to the last query that sees any of it."""
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_KEYS
    key = first + tl.arange(0, BLOCK_KEYS)  # [K]
    key_inside = key < tokens
    columns = tl.arange(0, BLOCK_D)
    segments_ptr += row * tokens * 4
    end = tl.minimum(tl.max(tl.load(segments_ptr + key * 4 + 3, mask=key_inside, other=0), 0), tokens)
    k_at = k_ptr + row * k_row + kv_head * k_head + (key * k_token)[:, None] + columns[None, :]
    k = _load(k_at, key_inside, columns, HEAD_SIZE, BLOCK_D)  # [K, D]
    if NEED_KEY:
        v_at = v_ptr + row * v_row + kv_head * v_head + (key * v_token)[:, None] + columns[None, :]
        v = _load(v_at, key_inside, columns, HEAD_SIZE, BLOCK_D)
        dk = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    if NEED_VALUE:
        dv = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    q_ptr += row * q_row
    dout_ptr += row * dout_row
    delta_ptr += (row * kv_heads + kv_head) * tokens * GROUP
    lse_ptr += (row * kv_heads + kv_head) * tokens * GROUP
    for start in range(first * GROUP, end * GROUP, BLOCK_ROWS):
        fold = start + tl.arange(0, BLOCK_ROWS)  # [R]
        inside = fold < end * GROUP
        token, head = fold // GROUP, kv_head * GROUP + fold % GROUP
        prefix_start, prefix_stop, caption_start = _query_spans(segments_ptr, token, inside, tokens)
        q_at = q_ptr + (head * q_head + token * q_token)[:, None] + columns[None, :]
        q = _load(q_at, inside, columns, HEAD_SIZE, BLOCK_D)  # [R, D]
        dout_at = dout_ptr + (head * dout_head + token * dout_token)[:, None] + columns[None, :]
        dout = _load(dout_at, inside, columns, HEAD_SIZE, BLOCK_D)
        lse = tl.load(lse_ptr + fold, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [K, R]
        seen = _visible(
            key[:, None], prefix_start[None, :], prefix_stop[None, :], caption_start[None, :], token[None, :]
        )
        p = tl.where(seen & inside[None, :], tl.exp2((scores - lse[None, :]) * scale_log2), 0.0)
        if NEED_VALUE:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        if NEED_KEY:
            delta = tl.load(delta_ptr + fold, mask=inside, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")  # [K, R]
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # Both gradients are (rows, tokens, kv heads, head size) in one piece.
    at = row * tokens * (kv_heads * HEAD_SIZE) + (key * (kv_heads * HEAD_SIZE) + kv_head * HEAD_SIZE)[:, None]
    if NEED_KEY:
        _store(dk_ptr + at + columns[None, :], dk * scale, key_inside, columns, HEAD_SIZE, BLOCK_D)
    if NEED_VALUE:
        _store(dv_ptr + at + columns[None, :], dv, key_inside, columns, HEAD_SIZE, BLOCK_D)


# Stage, head size, query heads a key head: OPT-6.7B's three kernels, and the one with the least room at the largest head.
COMPILED = (("forward", 128, 1), ("query_gradient", 128, 1), ("key_gradient", 128, 1), ("key_gradient", 256, 2))


def compile_cases(architecture: int) -> list[CompileCase]:
    """COMPILED in bf16."""
    import torch

    from .prefix_attention import launch_config, padded_head_size

    kernels = {
        "forward": (_forward_kernel, {}),
        "query_gradient": (_query_gradient_kernel, {"NEED_QUERY": True}),
        "key_gradient": (_key_gradient_kernel, {"NEED_KEY": True, "NEED_VALUE": True}),
    }
    others = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "segments_ptr": "*i32", "scale": "fp32", "scale_log2": "fp32"}
    cases = []
    for stage, head_size, group in COMPILED:
        kernel, needs = kernels[stage]
        config = launch_config(stage, head_size, torch.bfloat16, architecture)
        sizes = {
            "GROUP": group, "HEAD_SIZE": head_size, "BLOCK_D": padded_head_size(head_size), "BLOCK_ROWS": config.block_rows,
            "BLOCK_KEYS": config.block_keys,
        }  # fmt: skip
        types = {a: others.get(a, "*bf16" if a.endswith("_ptr") else "i32") for a in kernel.arg_names}
        strides = tuple(a for a in kernel.arg_names if a.endswith(("_row", "_head", "_token")))
        options = {"num_warps": config.warps, "num_stages": config.stages}
        cases.append(CompileCase(f"{stage} {head_size}x{group}", kernel, types, {**sizes, **needs}, strides, options))
    return cases
