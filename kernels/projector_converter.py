"""Projector and word converter as one product, written straight into the rows of the language model's input.

`projector_converter` replaces

    y = F.linear(F.linear(x, W_s, b_s), W_c, b_c)
    inputs = words.index_copy(0, slots, y[rows])

with x (M, d_v) the VPG's soft prompts, W_s (d_s, d_v) the source's projector, W_c (d_t, d_s) the word converter; `linear_into` is the same for one
weight.  W_t = W_c W_s and b_t = W_c b_s + b_c (arXiv 2305.01278, section 4) are formed once an optimiser step (`MergedFactors`: by the version
counters of the factors); the gradients of what trains follow from dW_t and db_t: dW_s = W_c^T dW_t, dW_c = dW_t W_s^T + db_t b_s^T,
db_s = W_c^T db_t, db_c = db_t.

Arithmetic at M = 1152 rows (36 images of 32 queries), d_v, d_s, d_t = 768, 2560, 4096: chain 2 M d_s (d_v + d_t) = 28.7 GFLOP, merged
2 M d_v d_t = 7.2 and 16.1 once a step.  Forward alone the two meet at d_s d_t d_v / (d_s (d_v + d_t) - d_t d_v) = 866 rows a step; with
d_s = 768, d_t = 2048 at 2,048 rows.  `choose_projection` counts the backward too.  Scattering in the epilogue saves reading and writing
M d_t again: 2 x 9.4 MB, 4.7 us at 4 TB/s beside 9 us of the product at 790 TFLOP/s; and the copy of the other rows.

There is no kernel for the chain with its intermediate on chip.  It fits up to d_s of about 1,024 (32 rows x 1,024 fp32 are half a register file),
but then every block of 32 rows reads all of W_s and W_c: 4.3 MB for 768 -> 768 -> 2048, 155 MB from L2 at 1152 rows on 36 of 132 SMs, to save
2 x 1.8 MB of intermediate, 0.9 us.  Blocks of 128 rows fill 132 SMs only from 16,900 rows on, where merging is long cheaper.  So the chain is two
products by torch (cuBLAS), the second with the scatter.

In the engine a run merges projector and converter before it trains (engine/transfer/merge.py), and what trains is one linear: `linear_into` is what
it uses.  `MergedFactors` and `projector_converter` are for training the two factors apart, which no recipe asks for.

Bench: benches/bench_projector_converter.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_support import architecture, log_fallback_once, triton_unsupported_reason

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Impl = Literal["reference", "triton"]


class MergedFactors:
    """W_t and b_t of a pair of projector and converter, formed anew when a factor's tensor or its version counter has changed.

    Optimisers and `copy_` count; writes through `.data` do not: call `clear` after those.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._seen: tuple[tuple[weakref.ref, int], ...] = ()
        self._dtype: torch.dtype | None = None
        self._merged: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def form(
        self, source: Tensor, source_bias: Tensor, converter: Tensor, converter_bias: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(W_t (d_t, d_v), b_t (d_t,)) in `dtype`, formed in float32 or wider, without a graph."""
        factors = (source, source_bias, converter, converter_bias)
        fresh = (
            self._merged is not None
            and self._dtype == dtype
            and not any(f.is_inference() for f in factors)  # which have no version counter
            and all(ref() is f and version == f._version for (ref, version), f in zip(self._seen, factors, strict=True))
        )
        if not fresh:
            wide = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in factors]
            with torch.autocast(source.device.type, enabled=False):
                weight, bias = wide[2] @ wide[0], torch.addmv(wide[3], wide[2], wide[1])
            self._merged = weight.to(dtype), bias.to(dtype)
            self._dtype = dtype
            self._seen = tuple((weakref.ref(f), -1 if f.is_inference() else f._version) for f in factors)
        return self._merged


def projector_converter(
    x: Tensor,  # (M, d_v)
    source: Tensor,  # W_s (d_s, d_v)
    source_bias: Tensor,  # (d_s,)
    converter: Tensor,  # W_c (d_t, d_s)
    converter_bias: Tensor,  # (d_t,)
    *,
    merged: MergedFactors | None = None,
    into: Tensor | None = None,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    form: Literal["merged", "chained"] | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """(x W_s^T + b_s) W_c^T + b_c -> (M, d_t), or written into rows of `into`, which is returned.

    Args:
        x, source, source_bias, converter, converter_bias: floating, one device.  The result has x's dtype (under torch.autocast its dtype);
            the factors may be wider.
        merged: keeps W_t between calls; the caller holds one for a pair of factors.  None forms it each time.
        into, slots, rows, impl: as for `linear_into`.
        form: None lets `choose_projection` pick for these rows as one optimiser step, or takes "merged" where `merged` is given.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, form or impl that do not fit.  RuntimeError: as `linear_into`.
    """
    if form not in (None, "merged", "chained"):
        raise ValueError(f"projector_converter: form is {form!r}, expected None, 'merged' or 'chained'")
    factors = (source, source_bias, converter, converter_bias)
    _check_factors(x, *factors)
    if form is None and merged is None:
        trains = tuple(
            torch.is_grad_enabled() and (w.requires_grad or b.requires_grad) for w, b in (factors[:2], factors[2:])
        )
        x_gradient = torch.is_grad_enabled() and x.requires_grad
        form = choose_projection(len(x), x.shape[1], *converter.shape[::-1], trains=trains, input_gradient=x_gradient)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if form == "chained":
        x, weight, bias = (
            F.linear(x, source.to(dtype), source_bias.to(dtype)),
            converter.to(dtype),
            converter_bias.to(dtype),
        )
    else:
        weight, bias = _Merge.apply(*factors, dtype, merged or MergedFactors())
    if into is None and slots is None and rows is None:
        return F.linear(x, weight, bias)
    return linear_into(x, weight, bias, into, slots, rows, impl=impl)


def linear_into(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    into: Tensor,  # (T, N), contiguous
    slots: Tensor,  # (V,) int64, rows of `into`, each at most once
    rows: Tensor | None = None,  # (V,) int64, rows of x; None: all in order
    *,
    impl: Impl | None = None,
) -> Tensor:
    """into[slots] = x[rows] W^T + b, in place; returns `into`, or where that needs no gradient the same memory with this one's history.

    Differentiable in x, weight, bias and `into` (whose overwritten rows get zero).  Where a slot or a row lies outside, the kernel writes nothing
    to the slot, torch raises; neither writes elsewhere.  Under torch.autocast x, weight and bias are cast to into's dtype.  torch.compile breaks
    its graph here, because the buffer is written in place.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or strides that do not fit.
        RuntimeError: impl="triton" where `projector_converter_unsupported_reason` has one.
    """
    if torch.is_autocast_enabled(x.device.type) and isinstance(into, Tensor):
        x, weight, bias = (t if t is None else t.to(into.dtype) for t in (x, weight, bias))
    _check_linear(x, weight, bias, into, slots, rows, impl)
    reason = None if impl == "reference" else projector_converter_unsupported_reason(x.dtype, x.device)
    if impl == "triton" and reason is not None:
        raise RuntimeError(f"linear_into: impl='triton' cannot run here: {reason}")
    if impl is None and reason is not None:
        log_fallback_once("projector_converter", reason)
    if not into.requires_grad:
        into = into.detach()  # autograd cannot record several inputs written into a view of what needs no gradient
    return _LinearInto.apply(x, weight, bias, into, slots, rows, impl != "reference" and reason is None)


def reference_projector_converter(
    x: Tensor, source: Tensor, source_bias: Tensor, converter: Tensor, converter_bias: Tensor, into: Tensor | None = None,
    slots: Tensor | None = None, rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition: the chain, then a copy of `into` with rows replaced."""
    y = F.linear(F.linear(x, source, source_bias), converter, converter_bias)
    if into is None:
        return y
    return into.index_copy(0, slots, y if rows is None else y[rows])


def projector_converter_unsupported_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot run; None where it can."""
    if dtype not in DTYPES:
        return f"the kernel takes bfloat16, float16 and float32, got {dtype}"
    return triton_unsupported_reason(device)


def choose_projection(
    rows: int, width: int, source_width: int, target_width: int, *, trains: tuple[bool, bool] = (False, False),
    input_gradient: bool = False, micro_batches: int = 1,
) -> Literal["merged", "chained"]:  # fmt: skip
    """The form with fewer FLOPs over an optimiser step of `rows` rows in `micro_batches`.

    width, source_width, target_width: d_v, d_s, d_t.  trains: projector, converter.  input_gradient: of x.
    """
    first, second, merged = source_width * width, target_width * source_width, target_width * width
    trains_any = any(trains)
    product = merged * source_width
    merging = product * (1 + micro_batches * sum(trains)) + rows * merged * (1 + input_gradient + trains_any)
    chain = first + second + trains[0] * first + trains[1] * second + input_gradient * first
    chain += (trains[0] or input_gradient) * second
    return "merged" if merging < rows * chain else "chained"


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the result, step of the inner dimension, warps, pipeline stages."""

    block_rows: int
    block_columns: int
    block_inner: int
    warps: int
    stages: int


def launch_config(
    rows: int, columns: int, dtype: torch.dtype, architecture: int, multiprocessors: int = 132
) -> LaunchConfig:
    """The tile that wastes least of the last wave; a smaller one counts as slower, because it reads more for the same product."""
    if dtype == torch.float32:
        return LaunchConfig(32, 32, 32, 4, 2)  # ordinary units, no tensor cores
    if architecture >= 90:
        # 128 x 256 fp32 over 256 threads are 128 registers each; a step is (128 + 256) x 64 x 2 = 48 KiB.
        tiles = {
            LaunchConfig(128, 256, 64, 8, 3): 1.0,
            LaunchConfig(128, 128, 64, 8, 4): 0.85,
            LaunchConfig(64, 128, 64, 4, 4): 0.65,
        }
    else:
        # mma.sync keeps operands in registers too, so half the tile.
        tiles = {LaunchConfig(128, 128, 32, 8, 4): 1.0, LaunchConfig(64, 128, 32, 4, 4): 0.85}

    def cost(item: tuple[LaunchConfig, float]) -> float:
        tile, share = item
        blocks = -(-rows // tile.block_rows) * -(-columns // tile.block_columns)
        return -(-blocks // multiprocessors) * tile.block_rows * tile.block_columns / share

    return min(tiles.items(), key=cost)[0]


class _Merge(torch.autograd.Function):
    """Factors -> (W_t, b_t) from the cache; the factors' gradients from those of W_t and b_t."""

    @staticmethod
    def forward(ctx, source, source_bias, converter, converter_bias, dtype, merged):
        weight, bias = merged.form(source, source_bias, converter, converter_bias, dtype)
        needs_source, needs_source_bias, needs_converter = ctx.needs_input_grad[:3]
        ctx.dtypes = [t.dtype for t in (source, source_bias, converter, converter_bias)]
        ctx.save_for_backward(
            source if needs_converter else None,
            source_bias if needs_converter else None,
            converter if needs_source or needs_source_bias else None,
        )
        ctx.compute_dtype = dtype
        weight, bias = weight.view_as(weight), bias.view_as(bias)
        # Whoever takes them then computes no gradient that none of the factors asks for.
        unused = [weight] * (not needs_source and not needs_converter)
        unused += [bias] * (not needs_source_bias and not needs_converter and not ctx.needs_input_grad[3])
        ctx.mark_non_differentiable(*unused)
        return weight, bias

    @staticmethod
    def backward(ctx, grad_weight, grad_bias):
        source, source_bias, converter = (t if t is None else t.to(ctx.compute_dtype) for t in ctx.saved_tensors)
        needs = ctx.needs_input_grad
        found = [
            converter.T @ grad_weight if needs[0] else None,
            converter.T @ grad_bias if needs[1] else None,
            torch.addr(grad_weight @ source.T, grad_bias, source_bias) if needs[2] else None,
            grad_bias if needs[3] else None,
        ]
        return (*(g if g is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True)), None, None)


class _LinearInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, into, slots, rows, use_triton):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.mark_dirty(into)
        ctx.x_shape = x.shape
        ctx.save_for_backward(
            x if needs_weight else None,
            weight if needs_x else None,
            slots,
            rows if needs_x or needs_weight else None,
        )
        if use_triton:
            tensors = (t if t is None else t.contiguous() for t in (x, weight, bias, into, slots, rows))
            scatter_linear(*tensors)
        else:
            into.index_copy_(0, slots, F.linear(x if rows is None else x[rows], weight, bias))
        return into

    @staticmethod
    def backward(ctx, grad):
        x, weight, slots, rows = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_into = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = None
        if needs_x or needs_weight or needs_bias:
            written = grad[slots]
            if needs_x:
                grad_x = written @ weight
                if rows is not None:
                    # Sorted, not atomic: the same sum every time where a row went to several slots.
                    grad_x = grad_x.new_zeros(ctx.x_shape).index_put_((rows,), grad_x, accumulate=True)
            if needs_weight:
                grad_weight = written.T @ (x if rows is None else x[rows])
            if needs_bias:
                grad_bias = written.sum(0)
        grad_into = grad.index_fill(0, slots, 0) if needs_into else None
        return grad_x, grad_weight, grad_bias, grad_into, None, None, None


@torch.library.custom_op("vpgtrans::scatter_linear", mutates_args=("into",))
def scatter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor, slots: Tensor, rows: Tensor | None
) -> None:
    """The kernel behind `linear_into`; all contiguous."""
    from .projector_converter_triton import scatter_linear_kernel

    count, columns = len(slots), weight.shape[0]
    if not count or not columns:
        return
    on_gpu = x.device.type == "cuda"
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else 132
    settings = launch_config(count, columns, x.dtype, architecture(x.device), multiprocessors)
    blocks = -(-count // settings.block_rows) * -(-columns // settings.block_columns)
    scatter_linear_kernel[(blocks,)](
        x, weight, weight if bias is None else bias, into, slots, slots if rows is None else rows, count, columns, x.shape[1], len(x), len(into),
        BLOCK_ROWS=settings.block_rows, BLOCK_COLUMNS=settings.block_columns, BLOCK_INNER=settings.block_inner, GROUP=8,
        BIAS=bias is not None, GATHER=rows is not None, PRECISION="ieee", num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip


@scatter_linear.register_fake
def _(x, weight, bias, into, slots, rows):
    return None


def _check_factors(x: Tensor, source: Tensor, source_bias: Tensor, converter: Tensor, converter_bias: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"projector_converter: x is {x.dtype} {tuple(x.shape)}, expected floating (M, d_v); flatten images and queries"
        )
    if source.ndim != 2 or converter.ndim != 2:
        raise ValueError(
            f"projector_converter: expected source (d_s, {x.shape[1]}) and converter (d_t, d_s), got {tuple(source.shape)} and "
            f"{tuple(converter.shape)}"
        )
    expected = {
        "source": (source, (source.shape[0], x.shape[1])),
        "source_bias": (source_bias, source.shape[:1]),
        "converter": (converter, (converter.shape[0], source.shape[0])),
        "converter_bias": (converter_bias, converter.shape[:1]),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"projector_converter: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(
                f"projector_converter: {name} is {tensor.dtype} on {tensor.device}, expected a floating dtype on {x.device}, as x"
            )


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, into: object, slots: object, rows: Tensor | None, impl: object
) -> None:
    if impl not in (None, "reference", "triton"):
        raise ValueError(f"linear_into: impl is {impl!r}, expected None, 'reference' or 'triton'")
    if not isinstance(into, Tensor) or not isinstance(slots, Tensor):
        raise TypeError(
            "linear_into: expected tensors for into and slots; give both, or neither to projector_converter"
        )
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"linear_into: expected x (M, K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    columns = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (columns,):
        raise ValueError(f"linear_into: bias has shape {tuple(bias.shape)}, expected {(columns,)}")
    if into.ndim != 2 or into.shape[1] != columns or not into.is_contiguous():
        raise ValueError(
            f"linear_into: into has shape {tuple(into.shape)} and strides {into.stride()}, expected contiguous (T, {columns}); "
            "flatten rows and tokens"
        )
    for name, tensor in {"weight": weight, "bias": bias, "into": into}.items():
        if tensor is not None and (tensor.dtype != x.dtype or not x.is_floating_point()):
            raise TypeError(f"linear_into: {name} is {tensor.dtype} and x {x.dtype}, expected one floating dtype")
    length = len(x) if rows is None else len(slots)
    for name, index in {"slots": slots, "rows": rows}.items():
        if index is not None and (index.dtype != torch.int64 or tuple(index.shape) != (length,)):
            raise ValueError(
                f"linear_into: {name} is {index.dtype} {tuple(index.shape)}, expected int64 ({length},): one entry for each row written"
            )
    for name, tensor in {"weight": weight, "bias": bias, "into": into, "slots": slots, "rows": rows}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear_into: {name} is on {tensor.device}, expected {x.device} as x; move one of them")
