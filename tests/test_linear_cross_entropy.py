"""linear_cross_entropy: torch's three lines, chunks and the kernel against float64; what it keeps, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.linear_cross_entropy import (
    launch_config,
    linear_cross_entropy,
    logits_buffer,
    reference_linear_cross_entropy,
)
from vpgtrans.kernels.triton_support import triton_unsupported_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CANNOT_RUN = triton_unsupported_reason(DEVICE)
FORMS = ("chunked", pytest.param("triton", marks=pytest.mark.skipif(CANNOT_RUN is not None, reason=str(CANNOT_RUN))))


def operands(rows, vocabulary, width, dtype=torch.float32, bias=False, size=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * size
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    more = torch.randn(vocabulary, generator=generator) if bias else None
    values = [None if t is None else t.to(DEVICE, dtype) for t in (hidden, weight, more)]
    return values[0].requires_grad_(), values[1], labels.to(DEVICE), values[2]


def loss_and_gradient(function, hidden, *more, scale=0.37, **settings):
    loss = function(hidden, *more, **settings)
    (loss * scale).backward()
    gradient, hidden.grad = hidden.grad, None
    return loss.detach(), gradient


def doubles(*tensors):
    wide = [t.detach().double() if t is not None and t.is_floating_point() else t for t in tensors]
    return wide[0].requires_grad_(), *wide[1:]


def check(impl, hidden, weight, labels, bias=None, softcap=None):
    exact = loss_and_gradient(reference_linear_cross_entropy, *doubles(hidden, weight, labels, bias), softcap)
    plain = loss_and_gradient(reference_linear_cross_entropy, hidden, weight, labels, bias, softcap)
    with poisoned_memory():
        found = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, bias, softcap, impl=impl)
    assert found[0].dtype == torch.float32 and found[1].shape == hidden.shape
    assert_within_budget(f"hidden.grad ({impl})", found[1], exact[1], plain[1])
    # Errors of the rows may cancel in torch's sum by luck: the budget is twice the sum of their sizes, and a rounding step of the result.
    rows = [(hidden[i : i + 1], weight, labels[i : i + 1], bias) for i in range(len(hidden))]
    made = [
        reference_linear_cross_entropy(*r, softcap) - reference_linear_cross_entropy(*doubles(*r), softcap)
        for r in rows
    ]
    allowed = 2 * sum(abs(m.item()) for m in made) + torch.finfo(torch.float32).eps * exact[0].item()
    assert abs(found[0].item() - exact[0].item()) <= allowed, (found[0].item(), exact[0].item(), allowed)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, None), (False, 3.0), (True, 30.0)])
def test_loss_and_gradient(impl, dtype, bias, softcap):
    hidden, weight, labels, more = operands(9, 300, 16, dtype, bias)
    check(impl, hidden, weight, labels, more, softcap)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("rows, vocabulary, width", [(1, 1, 1), (1, 2, 8), (3, 257, 5), (2, 9000, 4), (40, 7, 3)])
def test_odd_shapes(impl, rows, vocabulary, width):
    hidden, weight, labels, _ = operands(rows, vocabulary, width)
    check(impl, hidden, weight, labels)


@pytest.mark.parametrize("impl", FORMS)
def test_extreme_logits(impl):
    """Logits of some thousands, where a softmax without its maximum overflows, and a tanh at both of its ends."""
    hidden, weight, labels, _ = operands(6, 40, 8, size=3e3)
    check(impl, hidden, weight, labels)
    check(impl, hidden, weight, labels, softcap=30.0)


@pytest.mark.parametrize("impl", FORMS)
def test_many_chunks_are_one(impl, monkeypatch):
    monkeypatch.setattr("vpgtrans.kernels.linear_cross_entropy.MAX_CHUNK_BYTES", 1)  # 128 rows each
    hidden, weight, labels, bias = operands(130, 33, 8, bias=True)
    assert launch_config(130, 33, 8, 4).chunk_rows == 128
    check(impl, hidden, weight, labels, bias)


@pytest.mark.parametrize("impl", FORMS)
def test_strided_inputs(impl):
    hidden, weight, labels, _ = operands(12, 48, 16)
    wide = torch.stack([labels, labels + 1], 1)
    check(impl, hidden.detach()[::2, 1::2].requires_grad_(), weight[:, ::2], wide[::2, 0])
    check(impl, hidden.detach().t().contiguous().t().requires_grad_(), weight.t().contiguous().t(), wide[:, 0])


@pytest.mark.parametrize("impl", FORMS)
def test_only_what_is_asked_for(impl, monkeypatch):
    """Neither all logits nor, without a gradient, anything of the size of one exists; the head gets none."""
    monkeypatch.setattr("vpgtrans.kernels.linear_cross_entropy.MAX_CHUNK_BYTES", 1)  # 128 rows each
    rows, vocabulary, width = 140, 70, 128
    hidden, weight, labels, _ = operands(rows, vocabulary, width)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.update(t.untyped_storage().nbytes() // 4 for t in tree_leaves(result) if torch.is_tensor(t))
            return result

    def largest_new(start):
        known = {t.untyped_storage().nbytes() // 4 for t in (hidden, weight, labels)}
        sizes.clear()
        with Sizes(), start:
            loss = linear_cross_entropy(hidden, weight, labels, impl=impl)
        return loss, max(s for s in sizes if s not in known)

    sizes: set[int] = set()
    loss, largest = largest_new(torch.no_grad())
    assert not loss.requires_grad and largest == 128 * 128  # a chunk of rows of 70, each at a multiple of 64
    loss, _ = largest_new(torch.enable_grad())
    assert [t.shape for t in loss.grad_fn.saved_tensors] == [hidden.shape]
    loss.backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("impl", FORMS)
def test_no_rows(impl):
    hidden, weight, labels, _ = operands(0, 10, 4)
    loss = linear_cross_entropy(hidden, weight, labels, impl=impl)
    loss.backward()
    assert loss == 0.0 and hidden.grad.shape == (0, 4)


def test_finite_differences():
    hidden, weight, labels, bias = doubles(*operands(4, 11, 5, bias=True))
    for softcap in (None, 2.0):
        run = lambda h, cap=softcap: linear_cross_entropy(h, weight, labels, bias, cap, impl="chunked")  # noqa: E731
        assert torch.autograd.gradcheck(run, (hidden,))


@pytest.mark.skipif(CANNOT_RUN is not None, reason=str(CANNOT_RUN))
def test_nothing_foreign_is_read_for_a_label_out_of_range():
    hidden, weight, labels, _ = operands(3, 20, 4)
    for bad in (-100, 20, 2**40):
        labels[1] = bad
        assert linear_cross_entropy(hidden, weight, labels, impl="triton").isnan()


@pytest.mark.skipif(CANNOT_RUN is not None, reason=str(CANNOT_RUN))
def test_what_is_not_finite_shows():
    hidden, weight, labels, _ = operands(3, 20, 4)
    for value in (torch.inf, torch.nan):
        with torch.no_grad():
            hidden[1, 2] = value
        loss, gradient = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, impl="triton")
        assert loss.isnan() and not gradient[1].isfinite().any() and gradient[0].isfinite().all()


def test_within_autocast_and_compiled():
    hidden, weight, labels, _ = operands(5, 30, 8)
    exact = linear_cross_entropy(hidden, weight, labels, impl="chunked")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, impl="chunked"), exact)
    if CANNOT_RUN is None:
        traced = torch.compile(linear_cross_entropy, backend="aot_eager")(hidden, weight, labels, impl="triton")
        assert torch.allclose(traced, exact)


@pytest.mark.skipif(CANNOT_RUN is not None, reason=str(CANNOT_RUN))
@pytest.mark.parametrize("family, softcap", [("llama", None), ("llama", 5.0), ("opt-350m", None)])
def test_a_language_model_has_the_same_loss_with_it(make_llm, monkeypatch, family, softcap):
    llm = make_llm(family).to(DEVICE)
    llm.model.config.final_logit_softcapping = softcap
    generator = torch.Generator().manual_seed(1)
    hidden = (
        torch.randn(5, llm.model.get_output_embeddings().in_features, generator=generator).to(DEVICE).requires_grad_()
    )
    labels = torch.randint(0, llm.vocabulary_size, (5,), generator=generator).to(DEVICE)
    exact = loss_and_gradient(lambda h: F.cross_entropy(llm.logits(h), labels, reduction="sum"), hidden)
    for fused in (False, True):
        monkeypatch.setattr(llm, "fuses_head", fused)
        loss, gradient = loss_and_gradient(lambda h: llm.cross_entropy_sum(h, labels), hidden)
        assert torch.allclose(loss, exact[0], rtol=2e-6) and torch.allclose(gradient, exact[1], atol=2e-6)


def test_errors():
    hidden, weight, labels, bias = operands(4, 10, 8, bias=True)
    for arguments, error, message in [
        ((hidden[None], weight, labels), ValueError, r"hidden: expected \[rows, width\], got \(1, 4, 8\); flatten"),
        ((hidden, weight[:, 1:], labels), ValueError, r"weight: expected \[vocabulary, 8\], got \(10, 7\)"),
        ((hidden, weight[:0], labels), ValueError, r"weight: expected \[vocabulary, 8\], got \(0, 8\)"),
        ((hidden, weight, labels[1:]), ValueError, r"labels: expected \[4\], one a row of hidden, got \(3,\)"),
        ((hidden, weight, labels, bias[1:]), ValueError, r"bias: expected \[10\], got \(9,\)"),
        ((hidden, weight, labels.int()), TypeError, r"labels: expected int64, got torch.int32; convert them"),
        ((labels[:, None], weight, labels), ValueError, r"weight"),
        ((hidden.long(), weight, labels), TypeError, r"hidden: expected a floating dtype, got torch.int64"),
        ((hidden, weight.bfloat16(), labels), TypeError, r"weight: expected torch.float32 .* got torch.bfloat16"),
        ((hidden, weight, labels, bias.half()), TypeError, r"bias: expected torch.float32 .* got torch.float16"),
        ((hidden, weight.clone().requires_grad_(), labels), ValueError, r"weight: expected a frozen head, .* F.linear"),
        ((hidden, weight, labels, bias.clone().requires_grad_()), ValueError, r"bias: expected a frozen head"),
        ((hidden, weight.to("meta"), labels), ValueError, r"weight: expected on cpu .* got meta; move it"),
        ((hidden, weight, labels, None, 0.0), ValueError, r"softcap: expected a finite number above 0"),
        ((hidden, weight, labels, None, None, "fused"), ValueError, r"impl: expected None, 'reference'.* got 'fused'"),
    ]:
        with pytest.raises(error, match=message.replace("cpu", DEVICE.type)):
            linear_cross_entropy(*arguments)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: the kernel takes .*float64"):
        linear_cross_entropy(*doubles(hidden, weight), labels, impl="triton")


def test_launch_settings():
    assert launch_config(2048, 32000, 4096, 2).chunk_rows == 1024  # VL-LLaMA-7B: one wave of the second GEMM
    assert launch_config(2500, 50272, 2560, 2).chunk_rows == 1280  # OPT-2.7B: two even chunks rather than 1,664 and 836
    assert launch_config(100, 50272, 4096, 2).chunk_rows == 100
    for rows in (1, 127, 128, 5000, 100_000):
        for vocabulary, width in ((150, 192), (32000, 4096), (50257, 768), (256000, 2304), (262144, 5376)):
            for itemsize in (2, 4):
                config = launch_config(rows, vocabulary, width, itemsize)
                assert 1 <= config.chunk_rows <= rows and (config.chunk_rows % 128 == 0 or config.chunk_rows == rows)
                assert config.chunk_rows * vocabulary * itemsize <= 1 << 30
                assert 256 <= config.block_vocabulary == config.num_warps * 256 <= 8192
    buffer = logits_buffer(3, 32001, torch.empty(0, dtype=torch.bfloat16))
    assert buffer.shape == (3, 32064) and buffer.stride() == (32064, 1)


def test_chunks_take_at_most_two_fifths_of_torchs_memory():
    """torch keeps 12 bytes a logit in the backward (log-softmax and two float32 gradients); here a chunk's and hidden's gradient."""
    for rows, vocabulary, width in ((512, 32000, 4096), (2048, 32000, 4096), (2048, 50272, 2560), (8192, 256000, 2304)):
        chunk = launch_config(rows, vocabulary, width, 2).chunk_rows
        assert 2 * (chunk * vocabulary + rows * width) <= 0.4 * 12 * rows * vocabulary


def test_compiled_within_budgets(compiled_kernels):
    found = compiled_kernels("linear_cross_entropy")
    assert {r["architecture"] for r in found} == {80, 90} and len(found) == 8
    for kernel in found:
        assert kernel["spill_bytes"] == 0 and kernel["local_accesses"] == 0, kernel
        assert kernel["registers"] <= 64, kernel  # two rows of 32 warps live on a multiprocessor
        assert kernel["shared_bytes"] <= 1024, kernel
        assert kernel["wide_loads"] >= 1 and kernel["wide_stores"] >= ("loss_only" not in kernel["name"]), kernel
