"""Projector and converter as one product, written into packed rows: against float64, the cache of the merged weight, what is refused."""

from __future__ import annotations

import pytest
import torch

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.projector_converter import (
    LaunchConfig,
    MergedFactors,
    choose_projection,
    launch_config,
    linear_into,
    projector_converter,
    projector_converter_unsupported_reason,
    reference_projector_converter,
    scatter_linear,
)
from vpgtrans.kernels.triton_support import log_fallback_once

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("x", "source", "source_bias", "converter", "converter_bias", "into")
# rows, d_v, d_s, d_t, rows of the buffer.  150 rows and 300 columns are several tiles, ragged in each direction.
SHAPES = {"small": (6, 16, 24, 32, 11), "one": (1, 1, 1, 1, 1), "several tiles": (150, 40, 24, 300, 170)}


def make(shape, dtype=torch.float32):
    """The six tensors as leaves; slots in no order."""
    count, width, source_width, target_width, buffer = shape
    generator = torch.Generator().manual_seed(0)

    def leaf(*sizes):
        values = torch.randn(*sizes, generator=generator, dtype=torch.float64) * sizes[-1] ** -0.5
        return values.to(DEVICE, dtype).requires_grad_()

    tensors = (
        leaf(count, width), leaf(source_width, width), leaf(source_width), leaf(target_width, source_width), leaf(target_width),
        leaf(buffer, target_width),
    )  # fmt: skip
    return tensors, torch.randperm(buffer, generator=generator)[:count].to(DEVICE)


def results(run, tensors, *places, needed=NAMES, **options):
    """Output and the gradients of one fixed weighting of it."""
    *inputs, into = tensors
    out = run(*inputs, into=into + 0, slots=places[0], rows=places[1] if len(places) > 1 else None, **options)
    weighting = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    leaves = [t for n, t in zip(NAMES, tensors, strict=True) if n in needed]
    return (out, *torch.autograd.grad(out, leaves, weighting))


def in_double(tensors):
    return tuple(t.detach().double().requires_grad_() for t in tensors)


@pytest.mark.parametrize("form", ["merged", "chained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_forward_and_every_gradient(name, dtype, form):
    tensors, slots = make(SHAPES[name], dtype)
    exact = results(reference_projector_converter, in_double(tensors), slots)
    plain = results(reference_projector_converter, tensors, slots)
    with poisoned_memory():
        got = results(projector_converter, tensors, slots, form=form, impl="triton")
    for part, result, right, usual in zip(("out", *NAMES), got, exact, plain, strict=True):
        assert_within_budget(f"{name}: {part}", result, right, usual)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_x_in_any_order_and_twice(impl):
    tensors, slots = make(SHAPES["small"])
    rows = torch.tensor([5, 0, 0, 3, 2, 5, 1], device=DEVICE)
    slots = torch.randperm(11, generator=torch.Generator().manual_seed(1))[:7].to(DEVICE)
    exact = results(reference_projector_converter, in_double(tensors), slots, rows)
    plain = results(reference_projector_converter, tensors, slots, rows)
    got = results(projector_converter, tensors, slots, rows, form="merged", impl=impl)
    for part, result, right, usual in zip(("out", *NAMES), got, exact, plain, strict=True):
        assert_within_budget(part, result, right, usual)


@pytest.mark.parametrize("form", ["merged", "chained"])
def test_without_a_buffer(form):
    tensors, _ = make(SHAPES["small"], torch.float64)
    *inputs, _ = tensors
    assert torch.autograd.gradcheck(lambda *t: projector_converter(*t, form=form), inputs)
    torch.testing.assert_close(projector_converter(*inputs, form=form), reference_projector_converter(*inputs))


@pytest.mark.parametrize(
    "needed", [("x",), ("source",), ("source_bias",), ("converter",), ("converter_bias",), ("source", "source_bias")]
)
def test_only_what_is_asked_for_is_computed(needed):
    tensors, slots = make(SHAPES["small"])
    everything = dict(zip(NAMES, results(projector_converter, tensors, slots, form="merged")[1:], strict=True))
    some = [t.detach().requires_grad_(n in needed) for n, t in zip(NAMES, tensors, strict=True)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        found = results(projector_converter, some, slots, needed=needed, form="merged")
    for name, grad in zip(needed, found[1:], strict=True):
        torch.testing.assert_close(grad, everything[name], rtol=0, atol=0)
    assert (some[0].data_ptr() in saved) == (needed[0] in ("source", "converter"))


def test_only_the_slots_are_written_and_in_place():
    tensors, slots = make(SHAPES["several tiles"])
    *inputs, into = (t.detach() for t in tensors)
    before = into.clone()
    out = projector_converter(*inputs, into=into, slots=slots, form="merged", impl="triton")
    assert out.data_ptr() == into.data_ptr()
    others = torch.ones(len(into), dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    assert torch.equal(into[others], before[others]) and not torch.equal(into[slots], before[slots])


def test_what_lies_outside_is_written_nowhere():
    x = make(SHAPES["small"])[0][0].detach()
    weight = torch.ones(32, 16, device=DEVICE)
    guarded = torch.full((13, 32), 7.0, device=DEVICE)
    buffer = guarded[1:-1]
    slots = torch.tensor([3, -1, 11, 1 << 40, 5], device=DEVICE)
    rows = torch.tensor([0, 1, 2, 3, 6], device=DEVICE)
    linear_into(x, weight, None, buffer, slots, rows, impl="triton")
    written = (guarded != 7).any(1).nonzero().flatten().tolist()
    assert written == [4]
    with pytest.raises(IndexError):
        linear_into(x, weight, None, buffer, slots, rows, impl="reference")


def test_the_merged_weight_is_formed_once_a_step(monkeypatch):
    tensors, slots = make(SHAPES["small"])
    *inputs, into = tensors
    merged, formed = MergedFactors(), []
    addmv = torch.addmv
    monkeypatch.setattr(torch, "addmv", lambda *a: formed.append(1) or addmv(*a))
    factors = inputs[1:]
    optimizer = torch.optim.AdamW(factors, lr=0.1)

    def run():
        return results(projector_converter, (*inputs, into), slots, merged=merged)

    for step in range(3):
        torch.testing.assert_close(run(), run())
        assert len(formed) == step + 1
        torch.testing.assert_close(
            run(), results(reference_projector_converter, (*inputs, into), slots), rtol=1e-4, atol=1e-5
        )
        for tensor in factors:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    run()
    assert len(formed) == 4
    with torch.no_grad():
        factors[0].data.mul_(2)  # unseen, as documented
    run()
    assert len(formed) == 4
    merged.clear()
    run()
    assert len(formed) == 5
    other = [inputs[0], factors[0].detach().clone().requires_grad_(), *factors[1:]]
    results(projector_converter, (*other, into), slots, merged=merged)
    assert len(formed) == 6


def test_autocast_over_float32_factors():
    tensors, slots = make(SHAPES["small"])
    *inputs, into = tensors
    buffer = into.detach().bfloat16()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = projector_converter(*inputs, into=buffer, slots=slots, merged=MergedFactors(), impl="triton")
    grads = torch.autograd.grad(out[slots].float().square().sum(), inputs)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
    exact = reference_projector_converter(*in_double(inputs))
    assert_within_budget("out", out[slots], exact, reference_projector_converter(*(t.bfloat16() for t in inputs)))
    assert projector_converter(*inputs, form="chained").dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_to_write(impl):
    tensors, slots = make((0, 16, 24, 32, 11))
    out, *grads = results(projector_converter, tensors, slots, form="merged", impl=impl)
    assert torch.equal(out, tensors[-1])
    assert not any(g.any() for g in grads[:-1]) and grads[0].shape == (0, 16)


def test_non_contiguous_inputs():
    tensors, slots = make(SHAPES["small"])
    *inputs, into = (t.detach() for t in tensors)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    expected = projector_converter(*inputs, into=into.clone(), slots=slots, form="chained", impl="triton")
    got = projector_converter(*strided, into=into.clone(), slots=slots, form="chained", impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_operator_is_sound_and_compiles():
    tensors, slots = make(SHAPES["small"])
    *inputs, into = (t.detach() for t in tensors)
    weight = torch.randn(32, 16, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(scatter_linear, (inputs[0], weight, None, into.clone(), slots, None), test_utils=checks)
    compiled = torch.compile(
        lambda x, w, b: linear_into(x, weight, None, w + 0, b, impl="triton") * 2, backend="aot_eager"
    )
    expected = linear_into(inputs[0], weight, None, into + 0, slots, impl="triton") * 2
    torch.testing.assert_close(compiled(inputs[0], into, slots), expected)


def test_the_form_by_shape():
    assert choose_projection(865, 768, 2560, 4096) == "chained" and choose_projection(866, 768, 2560, 4096) == "merged"
    assert choose_projection(2000, 768, 768, 2048) == "chained" and choose_projection(2100, 768, 768, 2048) == "merged"
    # The product for dW_s is paid each micro-batch.
    training = {"trains": (True, False), "input_gradient": True}
    assert choose_projection(1152, 768, 2560, 4096, **training) == "merged"
    assert choose_projection(1152, 768, 2560, 4096, micro_batches=6, **training) == "chained"


def test_launch_settings():
    assert launch_config(16 * 1024, 4096, torch.bfloat16, 90) == LaunchConfig(128, 256, 64, 8, 3)
    assert launch_config(64, 4096, torch.bfloat16, 90) == LaunchConfig(64, 128, 64, 4, 4)
    assert launch_config(16 * 1024, 4096, torch.bfloat16, 80, 108).block_inner == 32
    assert launch_config(64, 64, torch.float32, 90).block_rows == 32


def test_reasons(caplog):
    assert "float64" in projector_converter_unsupported_reason(torch.float64, DEVICE)
    assert "NVIDIA" in projector_converter_unsupported_reason(torch.bfloat16, torch.device("meta"))
    tensors, slots = make(SHAPES["small"], torch.float64)
    *inputs, into = (t.detach() for t in tensors)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: .*float64"):
        projector_converter(*inputs, into=into, slots=slots, impl="triton")
    log_fallback_once.cache_clear()
    for _ in range(2):
        projector_converter(*inputs, into=into, slots=slots)
    assert [r.getMessage() for r in caplog.records] == [
        "projector_converter runs its torch reference: the kernel takes bfloat16, float16 and float32, got torch.float64"
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "flatten images and queries"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "expected floating"),
        ({"source": torch.zeros(5)}, ValueError, r"expected source \(d_s, 4\)"),
        ({"source": torch.zeros(5, 3)}, ValueError, r"source has shape \(5, 3\), expected \(5, 4\)"),
        ({"converter": torch.zeros(6, 4)}, ValueError, r"converter has shape \(6, 4\), expected \(6, 5\)"),
        ({"converter_bias": torch.zeros(6, device="meta")}, ValueError, "converter_bias is torch.float32 on meta"),
        ({"form": "fused"}, ValueError, "form is 'fused'"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ({"slots": None}, TypeError, "give both, or neither"),
        ({"into": torch.zeros(7, 5)}, ValueError, r"expected contiguous \(T, 6\)"),
        ({"into": torch.zeros(6, 7).T}, ValueError, r"strides \(1, 7\)"),
        ({"into": torch.zeros(7, 6, dtype=torch.bfloat16)}, TypeError, "into is torch.bfloat16 and x torch.float32"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, ValueError, r"slots is torch.int32 \(2,\), expected int64"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, ValueError, "one entry for each row written"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, ValueError, r"rows is torch.int64 \(3,\)"),
        ({"slots": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "slots is on meta"),
    ],
)  # fmt: skip
def test_what_is_refused(change, error, message):
    arguments = {
        "x": torch.zeros(2, 4), "source": torch.zeros(5, 4), "source_bias": torch.zeros(5), "converter": torch.zeros(6, 5),
        "converter_bias": torch.zeros(6), "into": torch.zeros(7, 6), "slots": torch.tensor([0, 3]),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        projector_converter(**(arguments | change))


def test_compiled_budgets(compiled_kernels):
    for kernel in compiled_kernels("projector_converter"):
        hopper = kernel["architecture"] == 90
        assert kernel["registers"] <= 232 and kernel["spill_bytes"] == kernel["local_accesses"] == 0, kernel
        assert kernel["shared_bytes"] <= (144 if hopper else 48) * 1024, kernel
        assert (kernel["wgmma"] >= 4 and kernel["mma"] == 0) if hopper else kernel["mma"] >= 32, kernel


def test_into_a_view_of_what_needs_no_gradient():
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*s, generator=generator).to(DEVICE).requires_grad_() for s in ((2, 3), (4, 3), (4,)))
    words = torch.zeros(2, 3, 4, device=DEVICE)
    rows = linear_into(x, weight, bias, words.flatten(0, 1), torch.tensor([4, 1], device=DEVICE), impl="reference")
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(words.flatten(0, 1)[[4, 1]], expected) and not words.requires_grad
    grads = torch.autograd.grad(rows.square().sum(), (x, weight, bias))
    for grad, right in zip(grads, torch.autograd.grad(expected.square().sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(grad, right)
