"""Sum of token losses behind a frozen head, and its gradient to the hidden states, without the logits ever existing in full.

It replaces

    logits = F.linear(hidden, weight, bias)                                       # (rows, vocabulary), twice more for the gradient
    logits = softcap * torch.tanh(logits / softcap)                               # Gemma's, where asked for
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")

Rows are the supervised positions only (`hidden[predict]`), so every label counts. The head is frozen: no gradient of weight or bias is
formed, and nothing but the gradient of `hidden` is kept from forward to backward. A chunk of rows goes through cuBLAS, one kernel turns
its logits in place into softmax minus one-hot and writes the losses, a second GEMM gives the chunk's gradient: 4·R·V·K FLOP for R rows,
vocabulary V and width K, a third less than where the backward forms the logits again (6·R·V·K).

Arithmetic, bf16, VL-LLaMA-7B (V = 32,000, K = 4,096), 2,048 rows in two chunks: 1.07 TFLOP, 1.36 ms at 790 TFLOP/s. The logits are written,
read twice, written and read: 10 bytes each, 0.66 GB, 0.14 ms at 4.8 TB/s if none of it stays in L2; the weight is streamed twice a chunk,
1.05 GB, under the multiplication. Memory: a chunk's logits, 2 bytes each, and the gradient of `hidden`, 82 MB, against torch's 12 bytes a
logit of every row (log-softmax and two gradients in float32), 786 MB: 10 %; 19 % where one chunk holds all rows.

A form that keeps the logits on chip was reckoned and left out. Its gradient forms the logits a second time: 2·K FLOP more a logit, 10.4 ps
at K = 4,096, to save 10 bytes, 2.1 ps; both are equal at K = 820, and there the K·4 bytes of a row's float32 gradient (64 rows of 768:
192 KiB) leave no room for tiles, so that it would have to pass through memory for every block of the vocabulary.

The idea of gradients formed in the forward pass by chunks is Liger-Kernel's (arXiv 2410.10989, section 3.2); of losses without stored logits,
Cut Your Losses (arXiv 2411.09009). Bench: benches/bench_linear_cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_support import log_fallback_once, triton_unsupported_reason

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STRIDE_MULTIPLE = 64  # elements: rows of the logits' buffer start at whole 128-byte lines whatever the vocabulary
MAX_CHUNK_BYTES = 1 << 30
Epilogue = Callable[[Tensor, int, Tensor, Tensor, float | None, bool], Tensor]


def linear_cross_entropy(
    hidden: Tensor,  # [rows, width], the supervised rows
    weight: Tensor,  # [vocabulary, width], frozen
    labels: Tensor,  # [rows] int64, 0..vocabulary - 1
    bias: Tensor | None = None,  # [vocabulary], frozen
    softcap: float | None = None,
    impl: Literal["reference", "chunked", "triton"] | None = None,
) -> Tensor:
    """Cross-entropy summed over all rows; scalar, float32 (float64 for float64 inputs).

    Differentiable in `hidden` alone, once. Within torch.autocast the operands keep their own dtype: give `hidden` in that of `weight`.

    Args:
        softcap: logits become `softcap * tanh(logits / softcap)`.
        impl: "reference" is torch's three lines; "chunked" goes chunk by chunk in torch; "triton" does with the fused kernel; None takes
            "triton" where it runs and "chunked" elsewhere.

    A label out of range raises IndexError on the CPU; in the kernel, which cannot wait for the device, it makes the loss NaN and reads nothing.

    Raises:
        TypeError: `labels` not int64, or dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, a `weight` or `bias` that requires a gradient, a `softcap` not above 0, unknown `impl`.
        RuntimeError: `impl="triton"` where the kernel cannot run.
    """
    _check(hidden, weight, labels, bias, softcap, impl)
    if impl == "reference":
        return reference_linear_cross_entropy(hidden, weight, labels, bias, softcap)
    reason = None if impl == "chunked" else linear_cross_entropy_unsupported_reason(hidden)
    if reason is not None:
        if impl == "triton":
            raise RuntimeError(f"linear_cross_entropy: impl='triton' cannot run here: {reason}")
        log_fallback_once("linear_cross_entropy", reason)
    use_kernel = impl != "chunked" and reason is None
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, softcap, use_kernel, with_gradient)


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The definition of the result: torch's own lines, every logit in memory."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="sum")


def linear_cross_entropy_unsupported_reason(hidden: Tensor) -> str | None:
    """Why the Triton kernel cannot run on the logits of `hidden`; None where it can."""
    if hidden.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float16, bfloat16 and float32, not {hidden.dtype}"
    return triton_unsupported_reason(hidden.device)


@dataclass(frozen=True)
class LaunchConfig:
    """chunk_rows: rows whose logits exist at once. block_vocabulary: logits that a program of `num_warps` warps treats at a time."""

    chunk_rows: int
    block_vocabulary: int
    num_warps: int


def launch_config(rows: int, vocabulary: int, width: int, itemsize: int) -> LaunchConfig:
    """Settings for these sizes; the same for every architecture.

    The second GEMM's output has chunk_rows x width elements: 132 tiles of 128 x 256, one wave of an H100's or H200's 132 multiprocessors,
    need 4.3 M (1,024 rows at width 4,096), and from 512 rows on reading the weight takes under a third of the time of multiplying by it.
    A chunk takes at most 1 GiB. Chunks are evened out, so that the last is not a sliver.
    """
    wanted = max(512, _floor(132 * 128 * 256 // max(width, 1), 128))
    fitting = max(128, _floor(MAX_CHUNK_BYTES // (itemsize * max(vocabulary, 1)), 128))
    chunks = max(1, math.ceil(rows / min(wanted, fitting)))
    chunk_rows = max(1, min(rows, math.ceil(math.ceil(rows / chunks) / 128) * 128))
    # 8 logits a thread are one 16-byte load in bf16; with 32 warps two rows are live on a multiprocessor, whose second reading L2 then serves
    # (264 rows of 32,000 are 17 MB).
    block = min(8192, max(256, 1 << (vocabulary - 1).bit_length()))
    return LaunchConfig(chunk_rows, block, max(1, block // 256))


def logits_buffer(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """Uninitialised [rows, vocabulary rounded up to STRIDE_MULTIPLE]; the columns past the vocabulary are padding."""
    return like.new_empty(rows, math.ceil(vocabulary / STRIDE_MULTIPLE) * STRIDE_MULTIPLE)


def torch_epilogue(
    buffer: Tensor, vocabulary: int, labels: Tensor, losses: Tensor, softcap: float | None, with_gradient: bool
) -> Tensor:
    """As `triton_epilogue`, in torch; the gradient may lie in other memory."""
    logits = buffer[:, :vocabulary]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    capped = torch.tanh(wide / softcap) if softcap is not None else None
    log_probabilities = torch.log_softmax(wide if capped is None else capped * softcap, -1)
    losses.copy_(log_probabilities.gather(1, labels[:, None])[:, 0].neg_())
    if not with_gradient:
        return logits
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((1, 1), -1.0).expand(len(labels), 1))
    if capped is not None:
        gradient *= 1.0 - capped * capped
    return gradient.to(logits.dtype)


def triton_epilogue(
    buffer: Tensor, vocabulary: int, labels: Tensor, losses: Tensor, softcap: float | None, with_gradient: bool
) -> Tensor:
    """Each row's loss into `losses`; with a gradient, logits in a `logits_buffer` are overwritten by theirs, which is returned."""
    config = launch_config(len(buffer), vocabulary, 1, buffer.element_size())
    block, warps = config.block_vocabulary, config.num_warps
    _softmax_minus_onehot(buffer, vocabulary, labels, losses, softcap or 0.0, with_gradient, block, warps)
    return buffer[:, :vocabulary]


# The whole buffer, not its view without padding: functionalised graphs copy what an operation writes to, and a view's copy has no padding.
@torch.library.custom_op("vpgtrans::softmax_minus_onehot", mutates_args=("buffer", "losses"))
def _softmax_minus_onehot(
    buffer: Tensor, vocabulary: int, labels: Tensor, losses: Tensor, softcap: float, with_gradient: bool, block: int, warps: int
) -> None:  # fmt: skip
    from .linear_cross_entropy_triton import softmax_minus_onehot_kernel

    softmax_minus_onehot_kernel[(len(buffer),)](
        buffer, labels, losses, vocabulary, buffer.shape[1], softcap,
        BLOCK_V=block, SOFTCAP=softcap > 0, WITH_GRADIENT=with_gradient, num_warps=warps,
    )  # fmt: skip


@_softmax_minus_onehot.register_fake
def _(
    buffer: Tensor, vocabulary: int, labels: Tensor, losses: Tensor, softcap: float, with_gradient: bool, block: int, warps: int
) -> None:  # fmt: skip
    return None


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradient of `hidden` in the forward pass, where one is asked for; backward scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, softcap, use_kernel: bool, with_gradient: bool) -> Tensor:
        epilogue = triton_epilogue if use_kernel else torch_epilogue
        with torch.autocast(hidden.device.type, enabled=False):
            loss, gradient = _by_chunks(
                hidden.detach(), weight, labels.contiguous(), bias, softcap, epilogue, with_gradient
            )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None, None, None


def _by_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, epilogue: Epilogue, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The summed loss, and its gradient to `hidden` where asked for."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    chunk_rows = launch_config(rows, vocabulary, width, hidden.element_size()).chunk_rows
    losses = hidden.new_empty(rows, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    gradient = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device) if with_gradient else None
    buffer = logits_buffer(min(chunk_rows, rows), vocabulary, hidden)
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        chunk = buffer[: part.stop - start]
        logits = chunk[:, :vocabulary]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        grad_logits = epilogue(chunk, vocabulary, labels[part], losses[part], softcap, with_gradient)
        if gradient is not None:
            torch.mm(grad_logits, weight, out=gradient[part])
    return losses.sum(), gradient


def _floor(value: int, multiple: int) -> int:
    return value // multiple * multiple


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, impl: str | None
) -> None:
    name = "linear_cross_entropy"
    if impl not in (None, "reference", "chunked", "triton"):
        raise ValueError(f"{name}: impl: expected None, 'reference', 'chunked' or 'triton', got {impl!r}")
    if hidden.ndim != 2:
        raise ValueError(f"{name}: hidden: expected [rows, width], got {tuple(hidden.shape)}; flatten the other axes")
    rows, width = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != width or not weight.shape[0]:
        raise ValueError(f"{name}: weight: expected [vocabulary, {width}], got {tuple(weight.shape)}")
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"{name}: labels: expected [{rows}], one a row of hidden, got {tuple(labels.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{name}: bias: expected [{weight.shape[0]}], got {tuple(bias.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels: expected int64, got {labels.dtype}; convert them with .long()")
    if not hidden.is_floating_point():
        raise TypeError(f"{name}: hidden: expected a floating dtype, got {hidden.dtype}")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: {label}: expected {hidden.dtype} as hidden has, got {tensor.dtype}; convert one")
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: {label}: expected a frozen head, got one that requires a gradient, which is not formed here; "
                "call requires_grad_(False), or use F.linear and F.cross_entropy"
            )
    for label, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: {label}: expected on {hidden.device} as hidden is, got {tensor.device}; move it")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap: expected a finite number above 0, or None for none, got {softcap}")
