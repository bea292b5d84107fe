"""Prompt assembly: exact copies in, and back only what the visual rows' gradients sum to."""

from __future__ import annotations

import itertools

import pytest
import torch

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.prompt_assembly import (
    launch_config,
    prompt_assembly,
    prompt_assembly_unsupported_reason,
    reference_prompt_assembly,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(rows=2, tokens=7, width=24, images=2, queries=2, dtype=torch.float32, prompt_dtype=None, seed=0):
    """Image 0 is split over two rows: its prompt rows have two slots each, the last image's none where `images` is 3."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, tokens), generator=generator)
    table = torch.randn(11, width, generator=generator).to(dtype)
    prompts = torch.randn(images, queries, width, generator=generator).to(prompt_dtype or dtype)
    slots = [*range(queries), *range(queries, 2 * queries), *range(tokens, tokens + queries)]
    source = [*range(queries), *range(queries, 2 * queries), *range(queries)]
    return [t.to(DEVICE) for t in (ids, table, prompts, torch.tensor(slots), torch.tensor(source))]


def run(arguments, gradient, impl, wide=False):
    ids, table, prompts, slots, source = arguments
    if wide:
        table, prompts = table.double(), prompts.double()
    leaf = prompts.detach().clone().requires_grad_()
    out = prompt_assembly(ids, table, leaf, slots, source, impl=impl)
    out.backward(gradient.to(out.dtype))
    return out.detach(), leaf.grad


def test_rows_by_hand():
    table = torch.arange(8.0).repeat_interleave(2).view(8, 2).to(DEVICE)
    prompts = torch.tensor([[[10.0, 11.0], [12.0, 13.0]]], device=DEVICE)
    ids = torch.tensor([[5, 0, 0, 3], [0, 0, 2, 1]], device=DEVICE)
    slots, source = torch.tensor([[1, 2, 4, 5], [0, 1, 0, 1]], device=DEVICE)
    for impl in ("reference", "triton"):
        leaf = prompts.clone().requires_grad_()
        out = prompt_assembly(ids, table, leaf, slots, source, impl=impl)
        assert out[..., 0].tolist() == [[5, 10, 12, 3], [10, 12, 2, 1]]
        assert out[..., 1].tolist() == [[5, 11, 13, 3], [11, 13, 2, 1]]
        out.backward(torch.arange(16.0, device=DEVICE).view(2, 4, 2))
        assert leaf.grad.tolist() == [[[2 + 8, 3 + 9], [4 + 10, 5 + 11]]]


@pytest.mark.parametrize("dtype, prompt_dtype", list(itertools.product([torch.float32, torch.bfloat16], repeat=2)))
@pytest.mark.parametrize("shape", [{}, {"width": 1}, {"width": 1040, "tokens": 5}, {"images": 3, "queries": 3}])
def test_kernels_against_float64(dtype, prompt_dtype, shape):
    arguments = inputs(dtype=dtype, prompt_dtype=prompt_dtype, **shape)
    gradient = torch.randn(*arguments[0].shape, arguments[1].shape[1], generator=torch.Generator().manual_seed(1)).to(
        DEVICE
    )
    gradient = gradient.to(dtype).double()
    with poisoned_memory():
        out, grad = run(arguments, gradient, "triton")
    plain, plain_grad = run(arguments, gradient, "reference")
    exact, exact_grad = run(arguments, gradient, "reference", wide=True)
    if prompt_dtype == dtype or dtype == torch.float32:
        assert torch.equal(out, plain)  # copies
    assert_within_budget("out", out, exact, plain)  # the interpreter cuts off where float32 becomes bfloat16
    assert_within_budget("gradient", grad, exact_grad, plain_grad)


def test_reference_in_float64():
    ids, table, prompts, slots, source = inputs(width=3)
    prompts = prompts.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: reference_prompt_assembly(ids, table.double(), p, slots, source), (prompts,)
    )


def test_the_gradient_is_the_same_every_time_and_in_one_order():
    """Large and small terms of one prompt row: another order would round otherwise."""
    ids, table, prompts, _, _ = inputs(rows=1, tokens=9, width=4, images=1, queries=1)
    slots, source = torch.tensor([0, 5, 2, 8], device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
    gradient = torch.zeros(1, 9, 4, device=DEVICE)
    for slot, value in ((0, 1e8), (5, 1.0), (2, -1e8), (8, 3.0)):
        gradient[0, slot] = value
    in_order = torch.tensor(1e8) + 1.0 - 1e8 + 3.0
    found = [run((ids, table, prompts, slots, source), gradient, "triton")[1] for _ in range(2)]
    assert torch.equal(*found) and (found[0] == in_order).all()


def test_frozen_prompts_cost_no_backward(monkeypatch):
    from vpgtrans.kernels import prompt_assembly as module

    ids, table, prompts, slots, source = inputs()
    assert not prompt_assembly(ids, table, prompts, slots, source, impl="triton").requires_grad
    monkeypatch.setattr(module, "_backward", None)  # would raise if called
    table.requires_grad_()
    module._PromptAssembly.apply(ids, table, prompts, slots, source).sum().backward()
    assert table.grad is None


def test_a_table_that_trains_goes_to_torch():
    ids, table, prompts, slots, source = inputs()
    table.requires_grad_()
    prompt_assembly(ids, table, prompts, slots, source).sum().backward()
    assert table.grad.sum() == (ids.numel() - slots.numel()) * table.shape[1]
    with pytest.raises(ValueError, match="'triton': the word embeddings train"):
        prompt_assembly(ids, table, prompts, slots, source, impl="triton")


def test_any_strides():
    ids, table, prompts, slots, source = inputs()
    expected = prompt_assembly(ids, table, prompts, slots, source, impl="triton")
    wider = torch.cat([table, table], 1)[:, : table.shape[1]]
    views = ids.T.contiguous().T, wider, prompts.mT.contiguous().mT, slots.repeat_interleave(2)[::2], source
    assert torch.equal(prompt_assembly(*views, impl="triton"), expected)
    assert torch.equal(prompt_assembly(ids, table.T.contiguous().T, *views[2:], impl="triton"), expected)
    leaf = prompts.clone().requires_grad_()
    prompt_assembly(ids, table, leaf, slots, source, impl="triton").sum().backward()  # an expanded gradient
    assert leaf.grad[0].eq(2).all() and leaf.grad[1].eq(1).all()


def test_indices_out_of_range_read_nothing():
    ids, table, prompts, slots, source = inputs()
    ids[0, 6], ids[1, 5] = 11, -3
    source[0], source[1] = 4, -7
    prompts.requires_grad_()
    out = prompt_assembly(ids, table, prompts, slots, source, impl="triton")
    assert out.isnan().all(-1).nonzero().tolist() == [[0, 0], [0, 1], [0, 6], [1, 5]]
    assert out.isnan().any(-1).sum() == 4
    out.backward(torch.ones_like(out))
    assert prompts.grad[0].eq(1).all()  # its second slots


def test_empty_and_textless_batches():
    ids, table, prompts, slots, source = inputs()
    out = prompt_assembly(ids, table, prompts, slots[:0], source[:0], impl="triton")
    assert torch.equal(out, table[ids])
    assert prompt_assembly(ids[:0], table, prompts, slots[:0], source[:0]).shape == (0, 7, 24)


def test_errors_name_the_argument():
    good = dict(zip(("ids", "table", "prompts", "slots", "source"), inputs(), strict=True))
    for name, broken, message in (
        ("table", good["table"][0], r"table: expected \(vocabulary, width\), got shape \(24,\)"),
        ("prompts", good["prompts"][..., :20], r"prompts: expected \(images, queries, 24\).*another language model"),
        ("ids", good["ids"].int(), r"ids: expected int64 with 2 dimensions, got torch.int32"),
        ("slots", good["slots"][None], "slots: expected int64 with 1 dimensions"),
        ("source", good["source"][1:], "source: expected one for each of 6 slots, got 5"),
        ("prompts", good["prompts"].to("meta"), "prompts: expected a tensor on .*, got one on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt_assembly(**{**good, name: broken})
    with pytest.raises(ValueError, match="impl: expected None"):
        prompt_assembly(**good, impl="cuda")
    with pytest.raises(ValueError, match=r"'triton': table of torch.float64"):
        prompt_assembly(**{**good, "table": good["table"].double()}, impl="triton")


def test_reasons(monkeypatch):
    ids, table, prompts, _, _ = inputs()
    assert prompt_assembly_unsupported_reason(ids, table, prompts) is None
    assert "prompts of torch.int64" in prompt_assembly_unsupported_reason(ids, table, prompts.long())
    assert "empty" in prompt_assembly_unsupported_reason(ids[:0], table, prompts)
    vast = torch.empty(1, 1, dtype=torch.long, device="meta").expand(2**16, 2**15)
    assert "2**31" in prompt_assembly_unsupported_reason(vast, table, prompts)
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert prompt_assembly_unsupported_reason(ids, table, prompts) == "the tensors are on the CPU"


def test_the_operators_as_torch_sees_them():
    from vpgtrans.kernels.prompt_assembly import _backward, _forward

    arguments = inputs()
    torch.library.opcheck(_forward, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
    gradient = torch.randn(14, 24, device=DEVICE)
    torch.library.opcheck(
        _backward, (gradient, *arguments[3:], 4, torch.bfloat16), test_utils=("test_schema", "test_faketensor")
    )


def test_launch_settings():
    assert launch_config(4096, torch.bfloat16).block_width == 1024  # 16 bytes a thread
    assert launch_config(4096, torch.float32).block_width == 512
    assert launch_config(5, torch.float32).block_width == 16


def test_compiled_within_budget(compiled_kernels):
    """At 80 registers a multiprocessor holds 6 blocks of 128 threads, 48 KiB of loads in flight; 4.8 TB/s at 0.7 us of latency want 25."""
    found = compiled_kernels("prompt_assembly")
    assert len(found) == 4
    for kernel in found:
        assert kernel["registers"] <= 80, kernel
        assert kernel["spill_bytes"] == 0 and kernel["local_accesses"] == 0 and kernel["shared_bytes"] <= 1024, kernel
