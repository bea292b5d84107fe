"""frozen_linear and the kernels in front of it: quantised rows, norms, FP8 products and their input-gradients; what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.frozen_linear import (
    FP8,
    Rows,
    fp8_unsupported_reason,
    frozen_linear,
    quantise_rows,
    quantise_weight,
    reference_quantise_rows,
    rows_config,
    rows_unsupported_reason,
)
from vpgtrans.kernels.frozen_norm import Norm, norm_and_quantise, reference_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_KERNEL, NO_FP8 = rows_unsupported_reason(DEVICE, 64), fp8_unsupported_reason(DEVICE)
needs_kernel = pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL))
needs_fp8 = pytest.mark.skipif(NO_FP8 is not None, reason=str(NO_FP8))
NORMS = [Norm("layer", 1e-5), Norm("rms", 1e-6), Norm("rms_rounded", 1e-6)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same_rows(found: Rows, wanted: Rows):
    """Equal scales to a rounding step, and values that differ, rarely, by one step of e4m3."""
    assert found.values.dtype == FP8 and found.values.shape == wanted.values.shape
    assert torch.allclose(found.scales, wanted.scales, rtol=3e-7, atol=0)
    a, b = found.values.float(), wanted.values.float()
    assert ((a - b).abs() <= 0.125 * b.abs().clamp(min=2.0**-6)).all() and int((a != b).sum()) <= 1e-2 * a.numel()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 256), (2, 1408), (0, 16)])
def test_rows(dtype, shape):
    x = normal(*shape, dtype=dtype) * torch.logspace(-3, 3, shape[0], device=DEVICE).to(dtype)[:, None]
    with poisoned_memory():
        same_rows(quantise_rows(x, "triton"), reference_quantise_rows(x))


@needs_kernel
def test_rows_that_are_zero_strided_or_not_finite():
    x = normal(4, 40)
    x[1] = 0
    rows = quantise_rows(x, "triton")
    assert rows.scales[1] == 1 and (rows.values[1].float() == 0).all()
    same_rows(quantise_rows(x.t().contiguous().t(), "triton"), rows)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[2, 3] = value
        for found in (quantise_rows(x, "triton"), reference_quantise_rows(x)):
            restored = found.values.float() * found.scales
            assert restored[2].isnan().any() and restored[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", pytest.param("scaled_mm", marks=needs_fp8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, outputs, inputs", [((3,), 16, 32), ((2, 5), 48, 16), ((1,), 32, 48), ((0,), 16, 16)])
@pytest.mark.parametrize("copies", [1, 2])
def test_product_and_input_gradient(impl, dtype, rows, outputs, inputs, copies):
    """Both directions against float64 products of the values that the FP8 copies stand for."""
    x, weight = normal(*rows, inputs, dtype=dtype).requires_grad_(), normal(outputs, inputs, seed=1).bfloat16()
    bias, grad_y = normal(outputs, seed=2).bfloat16(), normal(*rows, outputs, seed=3).bfloat16().to(dtype)
    quantised = quantise_weight(weight, copies)
    wide = lambda r: r.values.double() * r.scales.double()  # noqa: E731
    with poisoned_memory():
        y = frozen_linear(x, quantised, bias, impl=impl)
        y.backward(grad_y)
    scales = (
        1.0 if copies == 2 else quantised.by_output.scales.t().bfloat16()
    )  # one copy: those of outputs go into the gradient
    x_rows, grad_rows = (quantise_rows(t.flatten(0, -2)) for t in (x.detach(), grad_y.bfloat16() * scales))
    exact = (wide(x_rows) @ wide(quantised.by_output).t() + bias.double()).view(y.shape)
    assert_within_budget("y", y, exact, exact.bfloat16().to(dtype))
    backward = wide(quantised.by_input).t() if copies == 2 else quantised.by_output.values.double()
    exact = (wide(grad_rows) @ backward).view(x.shape)
    assert_within_budget("x.grad", x.grad, exact, exact.bfloat16().to(dtype))


@pytest.mark.parametrize("copies", [1, 2])
def test_the_error_is_that_of_e4m3(copies):
    """Against the unrounded product: 2.6 % of each operand's rounding for normal values, 3.7 % together; not less, or nothing was rounded."""
    x, weight, grad_y = normal(64, 256).requires_grad_(), normal(128, 256, seed=1), normal(64, 128, seed=2)
    y = frozen_linear(x, quantise_weight(weight, copies), impl="reference")
    y.backward(grad_y)
    for found, exact in ((y, F.linear(x, weight)), (x.grad, grad_y @ weight)):
        assert 0.03 < ((found - exact).norm() / exact.norm()).item() < 0.045


def test_a_plain_weight_is_linear_and_keeps_nothing_of_x():
    x, weight = normal(4, 8).requires_grad_(), normal(6, 8, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, weight)
    assert torch.equal(y, F.linear(x, weight)) and all(t.data_ptr() != x.data_ptr() for t in kept)
    quantised = quantise_weight(normal(16, 16))
    x = normal(4, 16).requires_grad_()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, quantised)
    assert not kept
    y.sum().backward()
    assert x.grad is not None


def test_autocast_decides_the_dtype():
    quantised = quantise_weight(normal(16, 32))
    x = normal(4, 32)
    assert frozen_linear(x, quantised).dtype == torch.float32
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert frozen_linear(x, quantised).dtype == torch.bfloat16


def test_small_gradients_of_float16_survive_one_copy():
    x, weight, grad_y = normal(4, 32).half().requires_grad_(), normal(16, 32, seed=1), 1e-5 * normal(4, 16, seed=2)
    frozen_linear(x, quantise_weight(weight, copies=1)).backward(grad_y.half())
    exact = grad_y.half().float() @ weight
    assert ((x.grad.float() - exact).norm() / exact.norm()).item() < 0.06


def test_two_copies_take_the_memory_of_bf16():
    quantised = quantise_weight(normal(128, 256).bfloat16())
    held = [
        quantised.by_output.values,
        quantised.by_input.values,
        quantised.by_output.scales,
        quantised.by_input.scales,
    ]
    assert sum(t.numel() * t.element_size() for t in held) == 2 * 128 * 256 + 4 * (128 + 256)
    assert quantised.by_input.values.shape == (256, 128) and quantised.by_input.values.is_contiguous()


@needs_kernel
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (2, 2, 300)])
def test_norm(norm, dtype, shape):
    x = (normal(*shape, dtype=dtype) * 3 + 1).requires_grad_()
    weight, grad_y = 1 + 0.3 * normal(shape[-1], seed=1, dtype=dtype), normal(*shape, seed=3, dtype=dtype)
    bias = normal(shape[-1], seed=2, dtype=dtype) if norm.kind == "layer" else None

    def run(function, *tensors):
        result = function(*tensors, norm)
        y = result[0] if isinstance(result, tuple) else result
        y.backward(grad_y.to(y.dtype))
        return result, y.detach(), tensors[0].grad

    doubles = [None if t is None else t.detach().double() for t in (x, weight, bias)]
    _, exact, exact_grad = run(reference_norm, doubles[0].requires_grad_(), *doubles[1:])
    _, plain, plain_grad = run(reference_norm, x.detach().clone().requires_grad_(), weight, bias)
    with poisoned_memory():
        (_, rows), y, grad = run(lambda *a: norm_and_quantise(*a, impl="triton"), x, weight, bias)
    assert_within_budget("y", y, exact, plain)
    assert_within_budget("x.grad", grad, exact_grad, plain_grad)
    again = quantise_rows(y.flatten(0, -2), "triton")
    assert torch.equal(rows.values.float(), again.values.float()) and torch.equal(rows.scales, again.scales)
    with torch.no_grad():
        assert norm_and_quantise(x, weight, bias, norm, impl="triton")[0].grad_fn is None
    _, reference_rows = norm_and_quantise(x, weight, bias, norm, impl="reference")
    assert ((rows.scales / reference_rows.scales - 1).abs() < 2e-2).all()


@needs_kernel
def test_norm_of_strided_and_of_no_rows():
    x, weight = normal(8, 64).t(), normal(8, seed=1)
    for norm in NORMS:
        y, _ = norm_and_quantise(x.clone().t().contiguous().t().requires_grad_(), weight, None, norm, "triton")
        assert torch.allclose(y, reference_norm(x, weight, None, norm), atol=1e-5)
        empty = x[:0].requires_grad_()
        y, rows = norm_and_quantise(empty, weight, None, norm, "triton")
        y.sum().backward()
        assert y.shape == empty.grad.shape == (0, 8) and rows.scales.shape == (0, 1)


@needs_kernel
def test_compiled_by_aot_eager():
    x, weight = normal(3, 32).requires_grad_(), normal(32, seed=1)
    run = lambda x: norm_and_quantise(x, weight, None, NORMS[1], "triton")[0]  # noqa: E731
    assert torch.allclose(torch.compile(run, backend="aot_eager")(x), run(x))


def test_errors():
    x, weight, bias = normal(4, 32), normal(16, 32), normal(16)
    quantised = quantise_weight(weight)
    for call, error, message in [
        (lambda: frozen_linear(x[:, 1:], weight), ValueError, r"x: expected \[\.\.\., 32\] .* got \(4, 31\)"),
        (lambda: frozen_linear(x, weight, bias[1:]), ValueError, r"bias: expected \[16\], got \(15,\)"),
        (lambda: frozen_linear(x, weight.clone().requires_grad_()), ValueError, r"weight: expected a frozen one, .*F.linear"),
        (lambda: frozen_linear(x, quantised, bias.clone().requires_grad_()), ValueError, r"bias: expected a frozen one"),
        (lambda: frozen_linear(x, weight.to("meta")), ValueError, r"weight: expected on .* got meta; move it"),
        (lambda: frozen_linear(x.double(), quantised), TypeError, r"x: expected bfloat16, .* got torch.float64"),
        (lambda: frozen_linear(x, quantised, None, quantise_rows(x[1:])), ValueError, r"rows: expected those of x, \(4, 32\), got \(3, 32\)"),
        (lambda: frozen_linear(x, quantised, impl="cutlass"), ValueError, r"impl: .* got 'cutlass'"),
        (lambda: quantise_weight(weight[1:]), ValueError, r"multiples of 16, got \(15, 32\); keep it unquantised"),
        (lambda: quantise_rows(x[None]), ValueError, r"x: expected \[rows, width\], got \(1, 4, 32\)"),
        (lambda: quantise_rows(x.double()), TypeError, r"x: expected bfloat16, .* got torch.float64"),
        (lambda: quantise_rows(x, "cuda"), ValueError, r"impl: .* got 'cuda'"),
        (lambda: quantise_rows(normal(1, 32769), "triton"), RuntimeError, r"cannot run here: "),
        (lambda: norm_and_quantise(x, bias, None, NORMS[0]), ValueError, r"weight: expected \[32\], got \(16,\)"),
        (lambda: norm_and_quantise(x, x[0], x[0], NORMS[1]), ValueError, r"bias: expected None with kind 'rms'"),
        (lambda: norm_and_quantise(x, x[0], None, Norm("group", 1e-5)), ValueError, r"kind: .* got 'group'"),
        (lambda: norm_and_quantise(x.double(), x[0], None, NORMS[0]), TypeError, r"x: .* got torch.float64"),
        (lambda: norm_and_quantise(x, x[0].clone().requires_grad_(), None, NORMS[0]), ValueError, r"weight: expected a frozen one"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert "the tensors are on meta" in fp8_unsupported_reason(torch.device("meta"))


def test_launch_settings():
    for width in (1, 768, 1408, 4096, 11008, 28672, 32768):
        config = rows_config(width)
        assert width <= config.block_width <= max(256, 2 * width) and config.block_width % (32 * config.num_warps) == 0
        assert config.block_width // (32 * config.num_warps) <= 64
    assert rows_config(4096).num_warps == 8


def test_compiled_within_budgets(compiled_kernels):
    found = compiled_kernels("frozen_linear")
    assert [r["architecture"] for r in found] == [80] * 2 + [90] * 6  # e4m3 cannot be written on sm_80
    for kernel in found:
        assert kernel["spill_bytes"] == 0 and kernel["local_accesses"] == 0, kernel
        assert kernel["registers"] <= 128 and kernel["shared_bytes"] <= 16 * 1024, kernel
        assert kernel["wide_loads"] >= 4 and kernel["wide_stores"] >= 2, kernel
