"""Triton kernels of `adamw_step`: sums of squares a chunk, one program that decides about the update, and the update.

Tensors are reached through tables of addresses; each starts at a multiple of 16 bytes, and so does each chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase

# Columns of a group's settings (`_settings` in adamw_step.py), float64.
RATE, BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2 = (tl.constexpr(i) for i in range(5))
EPS, DECAY, LOG_BETA1, LOG_BETA2, COLUMNS = (tl.constexpr(i) for i in range(5, 10))


@triton.jit
def _floats(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    """Without a mask where all is inside: only then are loads 16 bytes wide."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def partial_norms_kernel(
    grads_ptr, chunk_tensors_ptr, chunk_starts_ptr, sizes_ptr, partials_ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """partials [chunks] = sum of the squares of a chunk's gradients."""
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors_ptr + chunk)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + chunk), 16)
    left = tl.minimum(tl.load(sizes_ptr + tensor) - start, CHUNK).to(tl.int32)
    grads = _floats(tl.load(grads_ptr + tensor)) + start
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    whole = left // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        grad = _load(grads + at + tl.arange(0, BLOCK), True, True)
        total += grad * grad
    places = whole + tl.arange(0, BLOCK)
    grad = _load(grads + places, places < left, False)
    total += grad * grad
    tl.store(partials_ptr + chunk, tl.sum(total, 0))


@triton.jit
def finish_kernel(
    partials_ptr, loss_ptr, steps_ptr, groups_ptr, settings_ptr, corrections_ptr, results_ptr, chunks, tensors, clip_norm,
    HAS_LOSS: tl.constexpr, CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. results = norm, skipped, clip factor; steps go on unless skipped; corrections [2, tensors] for the steps after."""
    total = tl.zeros([BLOCK], tl.float64)  # [BLOCK]
    for at in range(0, chunks, BLOCK):
        places = at + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + places, mask=places < chunks, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    judged = norm
    if HAS_LOSS:
        judged += tl.load(loss_ptr)
    counts = tl.where(tl.abs(judged) < float("inf"), 1.0, 0.0)  # NaN is not below either
    factor = 1.0
    if CLIPS:
        factor = tl.minimum(clip_norm / (norm + 1e-6), 1.0)
    tl.store(results_ptr, norm)
    tl.store(results_ptr + 1, 1.0 - counts)
    tl.store(results_ptr + 2, factor)
    for at in range(0, tensors, BLOCK):
        places = at + tl.arange(0, BLOCK)
        inside = places < tensors
        steps = tl.load(steps_ptr + places, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(steps, mask=inside, other=0.0) + counts
        tl.store(steps, step, mask=inside)
        group = settings_ptr + tl.load(groups_ptr + places, mask=inside, other=0) * COLUMNS
        wide = tl.maximum(step, 1.0).to(tl.float64)
        first = 1.0 - tl.exp(wide * tl.load(group + LOG_BETA1))
        second = 1.0 - tl.exp(wide * tl.load(group + LOG_BETA2))
        tl.store(corrections_ptr + places, (tl.load(group + RATE) / first).to(tl.float32), mask=inside)
        tl.store(corrections_ptr + tensors + places, tl.sqrt(second).to(tl.float32), mask=inside)


@triton.jit
def _update_block(
    places, left, grads, values, firsts, seconds, factor, decay, keep1, add1, keep2, add2, step_size, root, eps, WHOLE: tl.constexpr
):  # fmt: skip
    """places [BLOCK]; `root` is that of the second bias correction, which torch applies before eps."""
    inside = places < left
    grad = _load(grads + places, inside, WHOLE) * factor
    value = _load(values + places, inside, WHOLE) * decay
    first = _load(firsts + places, inside, WHOLE) * keep1 + grad * add1
    second = _load(seconds + places, inside, WHOLE) * keep2 + grad * grad * add2
    value -= step_size * first / (tl.sqrt(second) / root + eps)
    _store(values + places, value, inside, WHOLE)
    _store(firsts + places, first, inside, WHOLE)
    _store(seconds + places, second, inside, WHOLE)


@triton.jit
def update_kernel(
    grads_ptr, pointers_ptr, chunk_tensors_ptr, chunk_starts_ptr, sizes_ptr, groups_ptr, settings_ptr, corrections_ptr, results_ptr, tensors,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parameters and moments of one chunk, unless the update is skipped."""
    if tl.load(results_ptr + 1) == 0.0:
        chunk = tl.program_id(0)
        tensor = tl.load(chunk_tensors_ptr + chunk)
        start = tl.multiple_of(tl.load(chunk_starts_ptr + chunk), 16)
        left = tl.minimum(tl.load(sizes_ptr + tensor) - start, CHUNK).to(tl.int32)
        factor = tl.load(results_ptr + 2)
        group = settings_ptr + tl.load(groups_ptr + tensor) * COLUMNS
        keep1, add1 = tl.load(group + BETA1).to(tl.float32), tl.load(group + ONE_MINUS_BETA1).to(tl.float32)
        keep2, add2 = tl.load(group + BETA2).to(tl.float32), tl.load(group + ONE_MINUS_BETA2).to(tl.float32)
        eps, decay = tl.load(group + EPS).to(tl.float32), tl.load(group + DECAY).to(tl.float32)
        step_size, root = tl.load(corrections_ptr + tensor), tl.load(corrections_ptr + tensors + tensor)
        grads = _floats(tl.load(grads_ptr + tensor)) + start
        values = _floats(tl.load(pointers_ptr + tensor)) + start
        firsts = _floats(tl.load(pointers_ptr + tensors + tensor)) + start
        seconds = _floats(tl.load(pointers_ptr + 2 * tensors + tensor)) + start
        whole = left // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            _update_block(
                at + tl.arange(0, BLOCK), left, grads, values, firsts, seconds,
                factor, decay, keep1, add1, keep2, add2, step_size, root, eps, True,
            )  # fmt: skip
        if whole < left:
            _update_block(
                whole + tl.arange(0, BLOCK), left, grads, values, firsts, seconds,
                factor, decay, keep1, add1, keep2, add2, step_size, root, eps, False,
            )  # fmt: skip


def compile_cases(architecture: int) -> list[CompileCase]:
    """The three kernels at their one setting on a GPU."""
    where = {"chunk_tensors_ptr": "*i32", "chunk_starts_ptr": "*i64", "sizes_ptr": "*i64"}
    constants, warps = {"CHUNK": 16384, "BLOCK": 2048}, {"num_warps": 8}
    shared = {
        "groups_ptr": "*i32",
        "settings_ptr": "*fp64",
        "corrections_ptr": "*fp32",
        "results_ptr": "*fp32",
        "tensors": "i32",
    }
    finish = {"partials_ptr": "*fp32", "loss_ptr": "*fp32", "steps_ptr": "*i64", "chunks": "i32", "clip_norm": "fp32"}
    return [
        CompileCase(
            "partial_norms",
            partial_norms_kernel,
            where | {"grads_ptr": "*i64", "partials_ptr": "*fp32"},
            constants,
            (),
            warps,
        ),
        CompileCase(
            "finish", finish_kernel, finish | shared, {"HAS_LOSS": True, "CLIPS": True, "BLOCK": 1024}, (), warps
        ),
        CompileCase(
            "update",
            update_kernel,
            where | shared | {"grads_ptr": "*i64", "pointers_ptr": "*i64"},
            constants,
            (),
            warps,
        ),
    ]
