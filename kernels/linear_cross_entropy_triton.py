"""The Triton kernel of `linear_cross_entropy`: a row of logits becomes softmax minus one-hot in place, and its loss."""

from __future__ import annotations

import triton
import triton.language as tl

from .compile_only import CompileCase

LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: -inf minus -inf would be NaN in lanes that hold none


@triton.jit
def _load_logits(row_ptr, columns, vocabulary, row_stride, softcap, SOFTCAP: tl.constexpr):
    """Logits after the soft-cap, -inf past the vocabulary, and the tanh, whose square the gradient needs.

    The mask is the row's stride, a multiple of 64, so that loads are 16 bytes wide for any vocabulary; the buffer's padding is read and dropped.
    """
    logits = tl.load(row_ptr + columns, mask=columns < row_stride, other=0.0).to(tl.float32)
    tanh = logits
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0)  # right at both infinities
        logits = softcap * tanh
    return tl.where(columns < vocabulary, logits, float("-inf")), tanh


@triton.jit
def softmax_minus_onehot_kernel(
    logits_ptr, labels_ptr, losses_ptr, vocabulary, row_stride, softcap,
    BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program a row. losses = log-sum-exp minus the label's logit; with a gradient, logits are overwritten by theirs."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    is_known = (label >= 0) & (label < vocabulary)
    target, _target_tanh = _load_logits(row_ptr, tl.where(is_known, label, 0), vocabulary, row_stride, softcap, SOFTCAP)

    # One running maximum and sum a lane: no exchange between warps until the row has been read.
    highest = tl.full([BLOCK_V], LOWEST, tl.float32)  # [BLOCK_V]
    total = tl.zeros([BLOCK_V], tl.float32)  # [BLOCK_V]
    for start in range(0, vocabulary, BLOCK_V):
        logits, _tanh = _load_logits(row_ptr, start + tl.arange(0, BLOCK_V), vocabulary, row_stride, softcap, SOFTCAP)
        higher = tl.maximum(highest, logits)
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    row_highest = tl.max(highest, 0)
    row_total = tl.sum(total * tl.exp(highest - row_highest), 0)
    tl.store(losses_ptr + row, tl.where(is_known, tl.log(row_total) + (row_highest - target), float("nan")))

    if WITH_GRADIENT:
        inverse = 1.0 / row_total
        for start in range(0, vocabulary, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            logits, tanh = _load_logits(row_ptr, columns, vocabulary, row_stride, softcap, SOFTCAP)
            gradient = tl.exp(logits - row_highest) * inverse - tl.where(columns == label, 1.0, 0.0)
            if SOFTCAP:
                gradient *= 1.0 - tanh * tanh
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < row_stride)


def compile_cases(architecture: int) -> list[CompileCase]:
    """The settings of LLaMA's, Gemma 2's and OPT's vocabularies; the same for every architecture."""
    from .linear_cross_entropy import launch_config

    cases = []
    for name, dtype, vocabulary, softcap, with_gradient in (
        ("llama", "bf16", 32000, False, True), ("gemma_2", "bf16", 256000, True, True), ("gemma_2", "fp32", 256000, True, True),
        ("opt_loss_only", "bf16", 50272, False, False),
    ):  # fmt: skip
        config = launch_config(2048, vocabulary, 2304, 2)
        types = {
            "logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "losses_ptr": "*fp32", "vocabulary": "i32", "row_stride": "i32",
            "softcap": "fp32",
        }  # fmt: skip
        constants = {"BLOCK_V": config.block_vocabulary, "SOFTCAP": softcap, "WITH_GRADIENT": with_gradient}
        cases.append(
            CompileCase(
                f"softmax_minus_onehot {name} {dtype}",
                softmax_minus_onehot_kernel,
                types,
                constants,
                ("row_stride",),
                {"num_warps": config.num_warps},
            )
        )
    return cases
